//! What a destination says of its content, and what nodes are said to hold: true, whatever is done in between.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../support/mod.rs"]
mod support;

mod disk;
mod names;
mod others;
mod sessions;
mod walk;
