//! Datapath.close: ends a VM's use of a volume.

use plugin::error::Result;
use plugin::host::Host;
use plugin::id::VolumeUri;
use serde::Deserialize;

use super::parsed;

/// The volume.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    #[expect(dead_code, reason = "it is decoded to refuse what is no volume's URI")]
    #[serde(deserialize_with = "parsed")]
    uri: VolumeUri,
}

/// Does nothing: Datapath.open left nothing to undo. A volume that is gone is closed.
///
/// # Errors
///
/// None.
pub fn execute(_: &Host, _: Parameters) -> Result<()> {
    Ok(())
}
