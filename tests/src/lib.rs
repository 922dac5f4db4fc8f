//! Plays xapi and xapi-storage-script against a SMAPIv3 plugin, strictly.
//!
//! ```text
//!   sxm        the three flows of a storage migration, with xapi's clean-up
//!    |    db   VMs, their snapshots, their disks
//!   smapiv2    SR, VDI, DP and DATA calls, as xapi-storage-script turns them into scripts
//!   host       plugin directories, SRs, HTTP server, NBD proxies of one host
//!   script     runs one script: records it, injects faults
//!   wire       encoding and decoding, no I/O
//!
//!   scenario   a whole run, judged: report (what holds), story (what happened when), page (both as HTML)
//! ```
//!
//! Each layer uses those below it; a host's HTTP server is what calls back into smapiv2. Nothing here shares a type
//! with the plugins.

pub mod bench;
pub mod conformance;
pub mod db;
pub mod demo;
pub mod disk;
pub mod draw;
pub mod guest;
pub mod host;
pub mod nbd;
pub mod page;
pub mod plan;
pub mod processes;
pub mod report;
pub mod scenario;
pub mod script;
pub mod smapiv2;
pub mod story;
pub mod sxm;
pub mod wire;
