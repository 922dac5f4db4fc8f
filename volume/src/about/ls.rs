//! Plugin.ls: the SRs that are attached on this host.

use plugin::error::Result;
use plugin::host::Host;
use plugin::id::SrUuid;
use plugin::store::Sr;
use serde::Deserialize;

/// Nothing is asked.
#[derive(Debug, Deserialize)]
pub struct Parameters {}

/// Lists the attached SRs.
///
/// # Errors
///
/// When the runtime directory cannot be read.
pub fn execute(host: &Host, _: Parameters) -> Result<Vec<SrUuid>> {
    Sr::all_attached(host)
}
