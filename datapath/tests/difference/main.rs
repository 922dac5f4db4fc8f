//! Mirrors that send only what the destination lacks: the executable between hosts with SRs of their own.

#![expect(clippy::unwrap_used, reason = "a test ends where it fails")]

mod announced;
mod doubted;
#[path = "../supervisor/eventually.rs"]
mod eventually;
mod guest;
#[path = "../supervisor/link.rs"]
mod link;
mod random;
mod scene;
mod site;
mod started;
