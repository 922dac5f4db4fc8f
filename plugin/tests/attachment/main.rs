//! A volume's life on a host, with the real storage daemon and clients that are not ours.

#![expect(clippy::unwrap_used, reason = "a test ends where it fails")]

mod chains;
mod deaths;
mod flips;
mod live;
mod scene;
