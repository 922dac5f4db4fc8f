//! QEMU: its image tool, its storage daemon, and the protocol the daemon is spoken to.
//!
//! ```text
//!   attachment ──► daemon   one qemu-storage-daemon a volume: start, find again, stop
//!        │
//!        ├───────► discovery  which program that is, by what it can do
//!        │
//!        ├───────► graph    what the daemon has open: a chain of nodes under one export
//!        │           │
//!        │           ├─► devices   its nodes, as it describes them
//!        │           └─► exchange  nodes in the middle of the chain for others
//!        └───────► qmp      the daemon's monitor
//!
//!   store ───────► img      qemu-img, for images that nobody has open
//!   gc ──────────► merge    a storage daemon that copies between two layers, and ends
//! ```
//!
//! QEMU never learns a chain from the images themselves: every layer is given to it, with its format and its
//! backing, so that nothing a guest writes to its disk can make another file be opened.

pub mod daemon;
pub mod devices;
mod discovery;
pub mod exchange;
pub mod graph;
pub mod img;
pub mod merge;
mod program;
pub mod qmp;
mod schema;

use std::future::Future;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::id::NodeId;
pub use discovery::{StorageDaemon, known_daemons, storage_daemon};
pub use program::find as find_program;

/// What is private and fuzzed ([`crate::fuzz`]).
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed {
    pub(crate) use super::discovery::{FileIdentity, Findings, understand};
}

/// One qcow2 file of a chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// The node it is.
    pub node: NodeId,
    /// Where it is: an absolute path.
    pub path: PathBuf,
    /// The size that a reader of this layer sees, in bytes.
    pub virtual_size: u64,
}

impl Image {
    /// Gives the path as QEMU takes it in JSON.
    ///
    /// # Errors
    ///
    /// [`Error::BadRequest`] when the path is not UTF-8, which QMP cannot carry.
    pub fn filename(&self) -> Result<&str> {
        self.path.to_str().ok_or_else(|| Error::BadRequest(format!("the path {} is not UTF-8", self.path.display())))
    }
}

/// Runs what needs QEMU, on a runtime of one thread that ends with it. Called from within a runtime, which then waits,
/// it runs in a thread of its own.
///
/// # Errors
///
/// Those of the future; else the runtime could not be made.
pub fn block_on<T: Send>(future: impl Future<Output = Result<T>> + Send) -> Result<T> {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Error::io("starting the runtime", error))?;
        runtime.block_on(future)
    };
    if tokio::runtime::Handle::try_current().is_err() {
        return run();
    }
    std::thread::scope(|scope| match scope.spawn(run).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// Describes a chain, top first, to QEMU's tools: one name that needs no header to be followed.
///
/// # Errors
///
/// [`Error::BadRequest`] when a path is not UTF-8.
pub fn chain_filename(images: &[Image]) -> Result<String> {
    let mut below = Value::Null;
    for image in images.iter().rev() {
        let file = json!({"driver": "file", "filename": image.filename()?});
        below = json!({"driver": "qcow2", "file": file, "backing": below});
    }
    Ok(format!("json:{below}"))
}
