//! Migrations made to fail at every step: nothing is left at the destination, nothing is lost at the source, and the same
//! migration then succeeds.
//!
//! A case is named by what is broken; one that fails says how to run it alone.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, clippy::print_stdout, reason = "a test talks to people")]

mod calls;
#[path = "../steps/device.rs"]
#[allow(dead_code, reason = "each suite uses a part of it")]
mod device;
mod disk;
#[path = "../steps/faulty.rs"]
#[allow(dead_code, reason = "each suite uses a part of it")]
mod faulty;
#[path = "../steps/place.rs"]
#[allow(dead_code, reason = "each suite uses a part of it")]
mod place;
mod processes;
mod promises;
mod small;
mod space;
mod sweep;
mod wires;
#[path = "../world/mod.rs"]
mod world;
