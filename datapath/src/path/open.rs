//! Datapath.open: begins a VM's use of a volume, before the VM starts.

use plugin::activation;
use plugin::error::Result;
use plugin::host::Host;
use plugin::id::VolumeUri;
use serde::Deserialize;

use super::parsed;

/// The volume, and whether what the VM writes is to stay.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    #[serde(deserialize_with = "parsed")]
    uri: VolumeUri,
    persistent: bool,
}

/// Decides whether what is written from now on stays, as it does without this call, or is thrown away at the next
/// Datapath.close or Datapath.open. What was to be thrown away before is thrown away now. xapi calls this before it
/// attaches the volume, and not again for a VM that is resumed.
///
/// # Errors
///
/// See [`activation::open`].
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let Parameters { uri, persistent } = parameters;
    activation::open(host, uri, persistent)
}
