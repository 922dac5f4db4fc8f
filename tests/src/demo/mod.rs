//! The worked example of the SXM v3 design, on a disk that holds a real ext4 file system filled from real files.
//!
//! ```text
//! T1 snap1 ─┬─ T2 snap2
//!           └─ T3 revert to snap1 ── T4 snap3 ── T5 snap4 ── T6 the running disk
//! ```
//!
//! The file system is different at every step. Each state of it is made offline as a raw image; what differs from the state
//! before is written through NBD to the active disk. Behind the file system lies a region for the guest's records.

mod bars;
mod files;
mod filesystem;
mod history;

pub use bars::bars;
pub use filesystem::{Files, Filesystem, check};
pub use history::{DISK, GUEST_REGION, History, SNAPSHOTS};
