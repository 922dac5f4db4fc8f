//! The numbers of the NBD protocol that are used here, as its `doc/proto.md` has them.

use crate::error::Error;

pub(super) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// What begins every simple reply.
pub(super) const REPLY_MAGIC: u32 = 0x6744_6698;
/// What begins every request.
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;

/// The length of a request without its payload.
pub(super) const REQUEST_BYTES: usize = 28;

pub(super) const FIXED_NEWSTYLE: u16 = 1;
pub(super) const NO_ZEROES: u16 = 2;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_INFO: u32 = 3;
/// The bit of every reply that says no.
pub(super) const REP_ERROR: u32 = 1 << 31;
pub(super) const REP_ERR_UNSUP: u32 = REP_ERROR | 1;
pub(super) const REP_ERR_UNKNOWN: u32 = REP_ERROR | 6;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_DESCRIPTION: u16 = 2;

pub(super) const READ: u16 = 0;
/// The one request that carries a payload.
pub(super) const WRITE: u16 = 1;
/// The goodbye, which has no answer.
pub(super) const DISCONNECT: u16 = 2;
pub(super) const FLUSH: u16 = 3;
/// A request that writes without a payload.
pub(super) const WRITE_ZEROES: u16 = 6;

pub(super) const IS_READ_ONLY: u16 = 1 << 1;
pub(super) const SENDS_FLUSH: u16 = 1 << 2;
pub(super) const SENDS_WRITE_ZEROES: u16 = 1 << 6;

/// The padding after an export's size and flags, where the client did not ask to be spared it.
pub(super) const PADDING: usize = 124;

/// What a server says of the export that was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Its size in bytes.
    pub size: u64,
    /// Its transmission flags.
    pub flags: u16,
}

impl Export {
    /// Tells whether it refuses writes.
    pub fn is_read_only(self) -> bool {
        self.flags & IS_READ_ONLY != 0
    }
}

/// Makes the error of a peer that breaks the protocol.
pub(super) fn protocol(doing: &str, reason: impl Into<String>) -> Error {
    let source = std::io::Error::new(std::io::ErrorKind::InvalidData, reason.into());
    Error::Io { doing: doing.to_owned(), source }
}
