//! The executable's Datapath.* calls, run as xapi-storage-script runs them.

#![expect(clippy::unwrap_used, reason = "a test ends where it fails")]

mod calls;
mod costs;
mod device;
mod hosts;
mod import;
mod nonsense;
mod rough;
mod scene;
mod scratch;
mod session;
mod tapdisk;
