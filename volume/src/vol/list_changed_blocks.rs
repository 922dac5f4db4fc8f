//! Volume.list_changed_blocks: tells which blocks differ between two volumes of one disk.

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::smapi::ChangedBlocks;
use plugin::store::{BLOCK, Bitmap};
use serde::Deserialize;

use crate::request::{SrName, VolumeName};
use crate::usage;

/// The volume that is compared with, `key`, the one that is compared, `key2`, and the extent in bytes; a negative length
/// reaches to the end.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    key: VolumeName,
    key2: VolumeName,
    offset: i128,
    length: i128,
}

/// Tells the changed blocks of the extent, widened to whole blocks and ending with the second volume. The two may be
/// any volumes of one disk's tree, whichever is older, with data or without.
///
/// # Errors
///
/// [`Error::ChangesNotTracked`], [`Error::UnrelatedVolumes`]; [`Error::ActivatedOnAnotherHost`] where another host's
/// daemon may know of changes that are not in the files.
pub fn execute(host: &Host, parameters: Parameters) -> Result<ChangedBlocks> {
    let Parameters { sr, key, key2, offset, length } = parameters;
    let sr = sr.open(host)?;
    let (from, to) = (key.key()?, key2.key()?);
    let offset =
        u64::try_from(offset).map_err(|_| Error::BadRequest(format!("the offset {offset} is impossible")))?;
    let length = if length < 0 { u64::MAX } else { u64::try_from(length).unwrap_or(u64::MAX) };
    sr.load(from)?;
    let mut tree = sr.lock(host, to)?;
    if !tree.tree.volumes.contains_key(&from) {
        return Err(Error::UnrelatedVolumes { from: from.to_string(), to: to.to_string() });
    }
    // Their files are read: nobody may be copying into them.
    tree.settle(host, from)?;
    for key in [from, to] {
        if !tree.volume(key)?.cbt_enabled {
            return Err(Error::ChangesNotTracked(key.to_string()));
        }
        usage::flush(host, &tree, key)?;
    }
    let Bitmap(bitmap) = tree.changed_blocks(from, to, offset, length)?;
    Ok(ChangedBlocks { granularity: BLOCK, bitmap })
}
