//! What the SMAPIv3 volume and datapath plugins for qcow2 are made of.
//!
//! ```text
//!   xapi-storage-script                       xapi-storage-script
//!          │ Volume.*, SR.*                          │ Datapath.*, Data.*
//!   ┌──────▼──────┐                           ┌──────▼──────┐
//!   │   volume    │                           │  datapath   │
//!   └──────┬──────┘                           └──────┬──────┘
//!          │      smapi: requests, answers, errors   │
//!          ├──────────────── plugin ─────────────────┤
//!   ┌──────▼──────┐    ┌─────────────┐     ┌─────────▼─────────┐
//!   │    store    │    │    host     │     │    qemu, nbd      │
//!   │ SR on disk  │    │ paths, uuid │     │ daemon, QMP, jobs │
//!   └─────────────┘    └─────────────┘     └───────────────────┘
//! ```
//!
//! Both executables live for one call. What outlives a call is on disk: in the SR ([`store`]), or under the
//! host's runtime directory ([`host`]). Whatever is killed at any point, the next call finds a state that it
//! can finish or undo.

pub mod activation;
pub mod attachment;
pub mod clock;
pub mod device;
pub mod error;
pub mod failures;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod gc;
pub mod host;
pub mod id;
pub mod lock;
pub mod log;
pub mod mirror;
pub mod nbd;
pub mod qemu;
pub mod record;
pub mod size;
pub mod smapi;
pub mod status;
pub mod store;
pub mod trace;

pub use error::{Error, Result};
