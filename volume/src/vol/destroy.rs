//! Volume.destroy: removes a volume and the nodes that only it needs.

use plugin::error::{Error, Result};
use plugin::gc;
use plugin::host::Host;
use plugin::mirror;
use serde::Deserialize;

use crate::request::{SrName, VolumeName};
use crate::usage;

/// The volume.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    key: VolumeName,
}

/// Removes the volume. One that does not exist is success: xapi destroys some volumes twice. Works on a full file
/// system.
///
/// # Errors
///
/// [`plugin::Error::VolumeInUse`] or [`plugin::Error::ActivatedOnAnotherHost`] while a guest has it.
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let sr = parameters.sr.open(host)?;
    let Ok(key) = parameters.key.key() else {
        return Ok(());
    };
    match sr.lock(host, key) {
        Ok(mut tree) => {
            usage::release(host, &tree, key)?;
            tree.stop_merge(host)?;
            let id = tree.id;
            tree.destroy(key)?;
            gc::start_for(host, &sr, id);
        }
        // A call that was killed may have left what follows.
        Err(Error::VolumeDoesNotExist(_)) => {}
        Err(error) => return Err(error),
    }
    if let Err(error) = mirror::forget_volume(host, key) {
        tracing::warn!(error = error.chain(), "records of mirrors are left");
    }
    Ok(())
}
