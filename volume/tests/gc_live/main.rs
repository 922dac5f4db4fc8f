//! What is deleted gives its space back while a guest goes on writing, and the guest notices nothing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "a test talks to people")]

#[path = "../support/mod.rs"]
mod support;

mod deaths;
mod guest;
mod limit;
mod merges;
mod others;
mod scene;
