//! Disks that come from an SMAPIv1 SR, under a writing guest, and with everything failing that can.
//!
//! Of the calls of a migration a few are chosen, so that every method is among them; FAKE_XAPI_SWEEP=all has every
//! single one fail, come twice, be where the user cancels or the toolstack is restarted.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, clippy::print_stdout, reason = "a test talks to people")]

mod arrival;
mod breaks;
mod calls;
mod moments;
mod random;
#[path = "../failures/small.rs"]
mod small;
#[path = "../failures/sweep.rs"]
mod sweep;
mod world;

/// Whether every single case is wanted.
fn all() -> bool {
    std::env::var("FAKE_XAPI_SWEEP").is_ok_and(|value| value == "all") || std::env::var_os(sweep::ONLY).is_some()
}
