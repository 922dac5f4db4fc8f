//! Volume.compare: lists the blocks in which a volume may differ from another.

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::smapi::BlockList;
use plugin::store::{BLOCK, Bitmap};
use serde::Deserialize;

use crate::request::{SrName, VolumeName};
use crate::usage;

/// The volume, `key`, and the one that it is compared with, `key2`.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    key: VolumeName,
    key2: VolumeName,
}

/// Lists the blocks of the first volume that were written or discarded since the two parted, as
/// [`super::list_changed_blocks`] does, whether changes are tracked or not. With a volume of another disk, or one that
/// does not exist, it lists the blocks of the first that may hold anything but zeroes.
///
/// # Errors
///
/// [`Error::DataDestroyed`] of the first volume; [`Error::ActivatedOnAnotherHost`] where another host's daemon may know
/// of changes that are not in the files.
pub fn execute(host: &Host, parameters: Parameters) -> Result<BlockList> {
    let sr = parameters.sr.open(host)?;
    let key = parameters.key.key()?;
    let mut tree = sr.lock(host, key)?;
    tree.tree.volume_with_data(key)?;
    usage::flush(host, &tree, key)?;
    let other = parameters.key2.key().ok().filter(|other| tree.tree.volumes.contains_key(other));
    let bitmap = match other {
        Some(other) => {
            tree.settle(host, other)?;
            usage::flush(host, &tree, other)?;
            match tree.changed_blocks(other, key, 0, u64::MAX) {
                Err(Error::UnrelatedVolumes { .. }) => tree.written_blocks(key)?,
                changed => changed?,
            }
        }
        None => tree.written_blocks(key)?,
    };
    Ok(BlockList { blocksize: BLOCK, ranges: ranges(&bitmap) })
}

/// Gives the runs of set bits.
fn ranges(Bitmap(bytes): &Bitmap) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let bits = bytes.iter().flat_map(|byte| (0..8).map(move |bit| byte & 0x80 >> bit != 0));
    for (block, _) in (0..).zip(bits).filter(|(_, set)| *set) {
        match ranges.last_mut() {
            Some((start, count)) if *start + *count == block => *count += 1,
            _ => ranges.push((block, 1)),
        }
    }
    ranges
}
