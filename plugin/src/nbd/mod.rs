//! NBD as a mirror needs it: where the peer is, what it says of its export before any data flows, and its choice.
//!
//! The protocol is NBD's `doc/proto.md`; the options used are NBD_OPT_INFO for a mirror, where QEMU's own client
//! negotiates the rest on the same connection, and NBD_OPT_GO where requests are made here.

mod handshake;
mod uri;

pub use handshake::{ClientFlags, ExportInfo, Greeting, choose_export, query_export};
pub use uri::{Address, NbdUri};
