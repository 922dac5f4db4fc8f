//! A small asynchronous NBD client over unix sockets, for the guest and for reading what a host exports.
//!
//! It speaks fixed newstyle as the NBD project's doc/proto.md has it: `NBD_OPT_STRUCTURED_REPLY` where the server knows it,
//! `NBD_OPT_GO` with the description and the block sizes asked for, and then any number of commands in flight at once.
//! It is deliberately unforgiving: a reply that the protocol does not allow closes the connection.
//!
//! ```text
//! Uri::parse("nbd:unix:/run/x/nbd.sock:exportname=5b1f…")
//!   └─ Client::connect ── handshake ── Export { size, flags, description, block sizes }
//!        ├─ writer task: takes commands from a queue, puts them on the socket
//!        └─ reader task: gives each reply to the command that waits for it
//! ```

mod client;
mod error;
mod handshake;
mod reply;
mod tapdisk;
mod uri;
mod wire;

pub use client::Client;
pub use error::Error;
pub use handshake::{Export, Options};
pub use tapdisk::Tapdisk;
pub use uri::Uri;
