//! NBD as a mirror needs it: where the peer is, and what it says of its export before any data flows.
//!
//! The protocol is NBD's `doc/proto.md`; the options used are NBD_OPT_INFO and nothing else, because QEMU's own
//! client negotiates the rest on the same connection.

mod handshake;
mod uri;

pub use handshake::{ClientFlags, ExportInfo, Greeting, query_export};
pub use uri::{Address, NbdUri};
