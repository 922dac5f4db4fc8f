//! What is fuzzed: a function for each place where bytes come in that somebody else made.
//!
//! Built for tests and for the fuzzer only (`cfg(fuzzing)`, which cargo-fuzz sets), so that it reaches what is private.
//! A target is given any bytes and panics when something does not hold that has to: that every error says what it is
//! about, that what was accepted is what it should be, that what was read is written as it was, and how much memory
//! that took. tests/fuzz runs the targets under libFuzzer; [`replay`] runs them in `cargo test` over what that has found,
//! and over mutations of it, so that they hold without another toolchain. docs/testing.md says how.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a target fails by panicking")]

mod image;
mod memory;
mod nbd;
mod qmp;
mod record;
#[cfg(test)]
mod replay;
mod request;

use crate::error::Error;

/// A target: its name, which is that of its corpus, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// The targets.
pub const TARGETS: &[Target] = &[
    ("image", image::run),
    ("record", record::run),
    ("nbd_client", nbd::client),
    ("nbd_server", nbd::server),
    ("nbd_relay", nbd::relay),
    ("qmp", qmp::run),
    ("request", request::run),
];

/// Runs a target on an input, and judges what memory it took.
///
/// # Panics
///
/// When the target finds something, or there is no such target.
pub fn run(name: &str, input: &[u8]) {
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).expect("a target has a name");
    let peak = memory::peak_of(|| target(input));
    // What is made of an input is larger than it by some factor, but never by what a field in it says.
    let allowed = (4 << 20) + input.len() * 64;
    assert!(peak <= allowed, "{} bytes of input took {peak} bytes of memory", input.len());
}

/// Judges an error: it says what it is about, in a text that nobody makes grow.
fn judge(error: &Error, about: &str) {
    let text = error.chain();
    assert!(text.contains(about), "{text:?} does not say {about:?}");
    assert!(text.len() <= 2000, "an error of {} bytes: {:.200}", text.len(), text);
}
