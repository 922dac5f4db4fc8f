//! What people and other programs see of the plugins: the host's log, spans, the status, and what nobody is to see.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, clippy::print_stdout, reason = "a test talks to people")]

mod listener;
mod log;
mod migration;
mod site;
mod spans;
mod status;
#[path = "../world/mod.rs"]
mod world;
