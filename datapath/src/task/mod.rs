//! The methods of Task: mirrors and copies once more, by their keys alone.
//!
//! xapi-storage-script forwards none of them (xen-api `ocaml/xapi-storage-script/main.ml`); SMAPIv3 wants them of every
//! plugin with operations that outlive a call, which is this one (`ocaml/xapi-storage/generator/lib/task.ml`).

pub mod cancel;
pub mod destroy;
pub mod ls;
pub mod stat;

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::id::{MirrorKey, Shortened};
use plugin::mirror::MirrorRecord;
use serde::Deserialize;

/// The parameters of the methods that are about one task.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    id: String,
}

impl Parameters {
    /// Finds the task; `None` when there is none.
    fn find(&self, host: &Host) -> Result<Option<MirrorRecord>> {
        match self.id.parse::<MirrorKey>() {
            Ok(key) => MirrorRecord::load(host, key),
            Err(_) => Ok(None),
        }
    }

    /// Makes the error for a task that is none.
    fn unknown(&self) -> Error {
        Error::BadRequest(format!("there is no task {:?}", Shortened(&self.id)))
    }
}
