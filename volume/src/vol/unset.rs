//! Volume.unset: removes a key that was stored with a volume.

use plugin::error::Result;
use plugin::host::Host;
use serde::Deserialize;

use crate::request::{SrName, VolumeName};

/// The volume and the key.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    key: VolumeName,
    k: String,
}

/// Removes the key; one that is not there is success, because xapi removes keys that it never set.
///
/// # Errors
///
/// When the volume does not exist or its record cannot be written.
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let sr = parameters.sr.open(host)?;
    let key = parameters.key.key()?;
    sr.lock(host, key)?.update(key, |volume| {
        volume.keys.remove(&parameters.k);
    })
}
