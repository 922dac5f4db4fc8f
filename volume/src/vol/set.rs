//! Volume.set: stores a key and its value with a volume.

use plugin::error::Result;
use plugin::host::Host;
use serde::Deserialize;

use crate::request::{SrName, VolumeName};

/// The volume, the key and the value, which mean nothing here.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    key: VolumeName,
    k: String,
    v: String,
}

/// Stores the value under the key, in the place of an earlier one.
///
/// # Errors
///
/// When the volume does not exist or its record cannot be written.
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let sr = parameters.sr.open(host)?;
    let key = parameters.key.key()?;
    sr.lock(host, key)?.update(key, |volume| {
        volume.keys.insert(parameters.k, parameters.v);
    })
}
