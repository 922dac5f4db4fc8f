//! What the methods' parameters share: SRs, volumes and sizes as requests give them.

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::id::{SrUuid, VolumeKey};
use plugin::store::{Sr, plan};
use serde::Deserialize;

/// An SR as SR.attach named it. Anything else names no attached SR.
#[derive(Clone, Debug, Deserialize)]
#[serde(transparent)]
pub struct SrName(String);

impl SrName {
    /// Gives the SR's uuid.
    pub fn uuid(&self) -> Result<SrUuid> {
        self.0.parse().map_err(|_| Error::SrNotAttached(shown(&self.0)))
    }

    /// Opens the SR, which is to be attached.
    pub fn open(&self, host: &Host) -> Result<Sr> {
        Sr::attached(host, self.uuid()?)
    }
}

/// A volume as Volume.create named it. Anything else names no volume.
#[derive(Clone, Debug, Deserialize)]
#[serde(transparent)]
pub struct VolumeName(String);

impl VolumeName {
    /// Gives the volume's key.
    pub fn key(&self) -> Result<VolumeKey> {
        self.0.parse().map_err(|_| Error::VolumeDoesNotExist(shown(&self.0)))
    }
}

/// A size in bytes as xapi asks for it, which may be anything.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(transparent)]
pub struct Size(i128);

impl Size {
    /// Gives the size that a volume gets for it.
    pub fn bytes(self) -> Result<u64> {
        plan::size(self.0)
    }
}

/// Gives the start of a string, for an error.
fn shown(text: &str) -> String {
    text.chars().take(100).collect()
}
