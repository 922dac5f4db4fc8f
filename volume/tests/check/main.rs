//! The administrator's program: what a check finds, what a repair puts right, and what is drawn of a tree.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../support/mod.rs"]
mod support;

mod damage;
mod flips;
mod healthy;
mod killed;
mod program;
mod rebuilt;
mod refused;
mod scene;
mod tree;
