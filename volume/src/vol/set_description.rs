//! Volume.set_description: changes a volume's description.

use plugin::error::Result;
use plugin::host::Host;
use serde::Deserialize;

use crate::request::{SrName, VolumeName};

/// The volume and its new description.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    key: VolumeName,
    new_description: String,
}

/// Changes the description.
///
/// # Errors
///
/// When the volume does not exist or its record cannot be written.
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let sr = parameters.sr.open(host)?;
    let key = parameters.key.key()?;
    sr.lock(host, key)?.update(key, |volume| volume.description = parameters.new_description)
}
