//! Volume.data_destroy: removes a snapshot's data and keeps what changed in it.

use plugin::error::{Error, Result};
use plugin::gc;
use plugin::host::Host;
use plugin::mirror;
use serde::Deserialize;

use crate::request::{SrName, VolumeName};
use crate::usage;

/// The snapshot.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    key: VolumeName,
}

/// Removes the data. The volume is still described and listed, as one of type `CBT_Metadata`, and the changes from and
/// to it are still told; what other volumes read of its data stays with them. Again, it is success.
///
/// # Errors
///
/// [`Error::ChangesNotTracked`] where nothing would be left of the volume; [`Error::VolumeInUse`] or
/// [`Error::ActivatedOnAnotherHost`] while a guest has it. The volume is then as before.
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let sr = parameters.sr.open(host)?;
    let key = parameters.key.key()?;
    let mut tree = sr.lock(host, key)?;
    let volume = tree.volume(key)?;
    if volume.data_destroyed {
        // A call that was killed may have left the file.
        tree.sweep([]);
    } else {
        if !volume.cbt_enabled {
            return Err(Error::ChangesNotTracked(key.to_string()));
        }
        usage::release(host, &tree, key)?;
        tree.stop_merge(host)?;
        tree.destroy_data(key)?;
    }
    let id = tree.id;
    drop(tree);
    gc::start_for(host, &sr, id);
    if let Err(error) = mirror::forget_volume(host, key) {
        tracing::warn!(error = error.chain(), "records of mirrors are left");
    }
    Ok(())
}
