//! Datapath.open: begins a VM's use of a volume, before the VM starts.

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::id::VolumeUri;
use plugin::store::Sr;
use serde::Deserialize;

use super::parsed;

/// The volume, and whether what the VM writes is to stay.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    #[serde(deserialize_with = "parsed")]
    uri: VolumeUri,
    persistent: bool,
}

/// Checks that the volume is there; writes stay, as they do without this call.
///
/// # Errors
///
/// [`Error::Unsupported`] when writes are not to stay: xapi must not take a disk for one that forgets when it
/// does not. [`Error::SrNotAttached`], [`Error::VolumeDoesNotExist`].
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let Parameters { uri, persistent } = parameters;
    Sr::attached(host, uri.sr)?.load(uri.volume)?;
    if persistent { Ok(()) } else { Err(Error::Unsupported("disks that forget what was written".to_owned())) }
}
