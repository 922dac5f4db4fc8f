//! The methods of Data: mirrors and copies.

pub mod cancel;
pub mod copy;
pub mod destroy;
pub mod ls;
pub mod mirror;
mod start;
pub mod stat;

use plugin::error::Result;
use plugin::host::Host;
use plugin::id::MirrorKey;
use plugin::mirror::MirrorRecord;
use plugin::smapi::Operation;
use serde::Deserialize;

/// The parameters of the methods that are about one operation.
#[derive(Debug, Deserialize)]
pub struct OperationParameters {
    operation: Operation,
}

/// What an operation is.
enum Known {
    /// A mirror or a copy of its own.
    Own(MirrorRecord),
    /// A copy that a mirror does by the way.
    Within(MirrorRecord),
}

impl OperationParameters {
    /// Gives the key of the record; `None` when no operation can have it.
    fn key(&self) -> Option<MirrorKey> {
        let (Operation::MirrorV1(key) | Operation::CopyV1(key)) = &self.operation;
        key.parse().ok()
    }

    /// Finds the operation; `None` when there is none.
    fn find(&self, host: &Host) -> Result<Option<Known>> {
        let Some(key) = self.key() else { return Ok(None) };
        Ok(match (MirrorRecord::load(host, key)?, &self.operation) {
            (Some(record), Operation::CopyV1(_)) if !record.copy => Some(Known::Within(record)),
            (Some(record), Operation::MirrorV1(_)) if record.copy => None,
            (record, _) => record.map(Known::Own),
        })
    }
}

/// Takes from `dbg` what names the caller: a trace context may follow on another line.
fn caller(dbg: &str) -> String {
    dbg.lines().next().unwrap_or_default().to_owned()
}
