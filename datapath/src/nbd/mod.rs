//! NBD as an import's relay and a copy speak it themselves: both sides of the handshake that chooses an export by its
//! name, and requests with simple replies.
//!
//! The protocol is NBD's `doc/proto.md`. Every server and client knows this much of it, the oldest ones included.

mod client;
mod server;

pub use client::{Connection, choose};
pub use server::negotiate;

use plugin::error::Error;

const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// What begins every simple reply.
pub const REPLY_MAGIC: u32 = 0x6744_6698;

/// What begins every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;

/// The length of a request without its payload.
pub const REQUEST_BYTES: usize = 28;

const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const REP_ACK: u32 = 1;
const REP_ERR_UNSUP: u32 = (1 << 31) | 1;

const READ: u16 = 0;
/// NBD_CMD_WRITE: the one request that carries a payload.
pub const WRITE: u16 = 1;
/// NBD_CMD_DISC: the goodbye, which has no answer.
pub const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
/// NBD_CMD_WRITE_ZEROES: a request that writes without a payload.
pub const WRITE_ZEROES: u16 = 6;

const IS_READ_ONLY: u16 = 1 << 1;
const SENDS_FLUSH: u16 = 1 << 2;
const SENDS_WRITE_ZEROES: u16 = 1 << 6;

/// The padding after an export's size and flags, where the client did not ask to be spared it.
const PADDING: usize = 124;

/// What a server says of the export that was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Its size in bytes.
    pub size: u64,
    /// Its transmission flags.
    pub flags: u16,
}

/// Makes the error of a peer that breaks the protocol.
fn protocol(doing: &str, reason: impl Into<String>) -> Error {
    let source = std::io::Error::new(std::io::ErrorKind::InvalidData, reason.into());
    Error::Io { doing: doing.to_owned(), source }
}
