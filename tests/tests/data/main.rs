//! The data side of fake-xapi against the real storage daemon and QEMU's own tools.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod daemon;
mod disk;
mod guest;
mod machine;
mod nbd;
mod plan;
#[path = "../strategy/mod.rs"]
mod strategy;
