//! Volume.stat: describes a volume.

use plugin::error::Result;
use plugin::host::Host;
use plugin::smapi::VolumeRecord;
use serde::Deserialize;

use crate::request::{SrName, VolumeName};

/// The volume.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    key: VolumeName,
}

/// Describes the volume, without waiting for calls that change it.
///
/// # Errors
///
/// When it does not exist or its tree's record cannot be read.
pub fn execute(host: &Host, parameters: Parameters) -> Result<VolumeRecord> {
    // The SR first: without it nothing can be said about a volume.
    let sr = parameters.sr.open(host)?;
    sr.stat(parameters.key.key()?)
}
