//! Task.ls: the tasks that are known.

use plugin::error::Result;
use plugin::host::Host;
use plugin::mirror::MirrorRecord;
use serde::Deserialize;

/// Task.ls takes nothing.
#[derive(Debug, Deserialize)]
pub struct Parameters {}

/// Lists the tasks of this host that go on or ended and were not forgotten, oldest first.
///
/// # Errors
///
/// When the directory of mirrors cannot be read.
pub fn execute(host: &Host, _: Parameters) -> Result<Vec<String>> {
    Ok(MirrorRecord::all(host)?.iter().map(|record| record.key.to_string()).collect())
}
