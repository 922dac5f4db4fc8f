//! Volume.set_name: changes a volume's name.

use plugin::error::Result;
use plugin::host::Host;
use serde::Deserialize;

use crate::request::{SrName, VolumeName};

/// The volume and its new name.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    key: VolumeName,
    new_name: String,
}

/// Changes the name.
///
/// # Errors
///
/// When the volume does not exist or its record cannot be written.
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let sr = parameters.sr.open(host)?;
    let key = parameters.key.key()?;
    sr.lock(host, key)?.update(key, |volume| volume.name = parameters.new_name)
}
