//! Datapath.close: ends a VM's use of a volume.

use plugin::activation;
use plugin::error::Result;
use plugin::host::Host;
use plugin::id::VolumeUri;
use serde::Deserialize;

use super::parsed;

/// The volume.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    #[serde(deserialize_with = "parsed")]
    uri: VolumeUri,
}

/// Throws away what was written, if Datapath.open said so; a volume that is still active, at its last deactivation. A
/// volume that is gone is closed.
///
/// # Errors
///
/// See [`activation::close`].
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    activation::close(host, parameters.uri)
}
