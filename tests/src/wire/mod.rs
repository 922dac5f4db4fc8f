//! The SMAPIv3 script protocol as xapi-storage-script speaks it: its own encoder, and decoders that
//! refuse what the daemon refuses.
//!
//! Requests are built from fields in the order of their declaration; the daemon sends them the other
//! way round ([`Request::encode`]). Answers are decoded from a [`Json`] value that has kept integers,
//! floats and absent fields apart, because the daemon does too: `1.0` is no size, and an optional
//! field may be absent but not null.

mod answer;
mod datapath;
mod failure;
mod json;
mod request;

pub use answer::{Blocks, ChangedBlocks, Health, Plugin, ProbeResult, SrStat, Volume};
pub use datapath::{Attached, Implementation, MirrorStatus, Operation};
pub use failure::{Backtrace, Failure};
pub use json::{Fields, Json, Malformed};
pub use request::Request;

#[cfg(test)]
mod golden_tests;
