//! Data.ls: the mirrors and copies that are known.

use plugin::error::Result;
use plugin::host::Host;
use plugin::mirror::MirrorRecord;
use plugin::smapi::Operation;
use serde::Deserialize;

/// Data.ls takes nothing.
#[derive(Debug, Deserialize)]
pub struct Parameters {}

/// Lists the mirrors and copies of this host that go on or ended and were not forgotten, oldest first.
///
/// # Errors
///
/// When the directory of mirrors cannot be read.
pub fn execute(host: &Host, _: Parameters) -> Result<Vec<Operation>> {
    let named = |record: &MirrorRecord| match record.copy {
        true => Operation::copy(record.key),
        false => Operation::mirror(record.key),
    };
    Ok(MirrorRecord::all(host)?.iter().map(named).collect())
}
