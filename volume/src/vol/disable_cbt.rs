//! Volume.disable_cbt: stops telling which blocks of a volume change.

use plugin::error::Result;
use plugin::host::Host;
use serde::Deserialize;

use crate::request::{SrName, VolumeName};

/// The volume.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    key: VolumeName,
}

/// Disables it; snapshots that were made before keep what they have. Disabled already, it stays so.
///
/// # Errors
///
/// When the volume does not exist or its record cannot be written.
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let sr = parameters.sr.open(host)?;
    let key = parameters.key.key()?;
    sr.lock(host, key)?.update(key, |volume| volume.cbt_enabled = false)
}
