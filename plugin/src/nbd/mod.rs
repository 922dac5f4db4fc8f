//! NBD as mirrors, copies and imports need it: where a peer is, both sides of the handshake, requests with simple
//! replies, and what is passed on between a client and a server.
//!
//! The protocol is NBD's `doc/proto.md`. For a mirror NBD_OPT_INFO is asked, and QEMU's own client negotiates the rest
//! on the same connection; where requests are made here, NBD_OPT_GO. The server's side knows NBD_OPT_EXPORT_NAME alone,
//! which every client knows, the oldest ones included.

mod client;
mod frames;
mod handshake;
mod requests;
mod server;
mod uri;
mod wire;
mod zeroes;

pub use client::{Connection, choose};
pub use frames::{Command, REPLY_BYTES, REQUEST_BYTES, reply, request};
pub use handshake::{ClientFlags, ExportInfo, Greeting, choose_export, query_export};
pub use requests::{End, pass_requests};
pub use server::{Choice, negotiate};
pub use uri::{Address, NbdUri};
pub use wire::Export;
pub use zeroes::Ahead;
