//! What the images of a volume hold, as qemu-img reads them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Result;
use fake_xapi::disk::{RawCopy, Sr, known};

use super::operation::{BLOCK, Disk};

/// The pieces in which a block is looked at, in bytes.
const PART: u64 = 4096;

/// What a volume was found to hold.
#[derive(Clone, Debug)]
pub struct Held {
    size: u64,
    /// The bytes in each block, where they are not all zeroes.
    blocks: BTreeMap<u64, BTreeSet<u8>>,
}

impl Held {
    /// Reads all of a volume that nobody has open.
    pub fn of(sr: &Sr, key: &str) -> Result<Self> {
        known::of(&sr.chain_of(key)?, || Self::read(&sr.node_of(key)?.image))
    }

    fn read(image: &Path) -> Result<Self> {
        let raw = RawCopy::of(image)?;
        let mut blocks: BTreeMap<u64, BTreeSet<u8>> = BTreeMap::new();
        let mut seen: BTreeMap<u64, u64> = BTreeMap::new();
        raw.each_piece(|offset, data| {
            for (index, part) in data.chunks(PART as usize).enumerate() {
                let block = (offset + index as u64 * PART) / BLOCK;
                let is_all_one = part.first().is_some_and(|first| *part == [*first; PART as usize][..part.len()]);
                let bytes = if is_all_one { &part[..1] } else { part };
                blocks.entry(block).or_default().extend(bytes);
                *seen.entry(block).or_default() += part.len() as u64;
            }
            Ok(())
        })?;
        for (block, bytes) in &mut blocks {
            // The rest is a hole.
            if seen[block] < BLOCK {
                bytes.insert(0);
            }
        }
        blocks.retain(|_, bytes| bytes.iter().any(|byte| *byte != 0));
        Ok(Self { size: raw.size(), blocks })
    }

    /// Tells whether each byte is that of one of the disks.
    pub fn is(&self, disks: &[&Disk]) -> bool {
        let numbers: BTreeSet<&u64> =
            self.blocks.keys().chain(disks.iter().flat_map(|disk| disk.blocks.keys())).collect();
        let zero = BTreeSet::from([0]);
        let of = |disk: &Disk, number| disk.blocks.get(number).copied().unwrap_or_default();
        disks.iter().any(|disk| disk.size == self.size)
            && numbers.into_iter().all(|number| {
                let may: BTreeSet<u8> = disks.iter().map(|disk| of(disk, number)).collect();
                self.blocks.get(number).unwrap_or(&zero).is_subset(&may)
            })
    }
}
