//! Which parts of a volume a copy is to copy.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::host::Host;
use crate::id::MirrorKey;
use crate::record::{self, Durability, Record};

/// Consecutive bytes of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Range {
    /// Where they begin.
    pub offset: u64,
    /// How many they are.
    pub length: u64,
}

/// The parts that a copy is to copy, in order and apart from each other: `<run>/mirrors/<key>/blocks.json`, written
/// once. They are no part of the copy's record, which is written often.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blocks {
    format: u64,
    ranges: Vec<Range>,
}

impl Record for Blocks {
    const FORMAT: u64 = 1;
}

impl Blocks {
    /// Takes a list of blocks as SMAPIv3 has it: pairs of a first block and a number of blocks, both counted in blocks of
    /// `block_size` bytes (xen-api `ocaml/xapi-storage/generator/lib/common.mli`, blocklist), in any order. A last block
    /// that is longer than what is left of the `size` bytes ends with them.
    ///
    /// # Errors
    ///
    /// [`Error::BadRequest`] when a block is not one of the volume's.
    pub fn new(block_size: i64, pairs: &[(i64, i64)], size: u64) -> Result<Self> {
        let refused = |reason: String| Error::BadRequest(format!("the block list is wrong: {reason}"));
        let block = u64::try_from(block_size).ok().filter(|block| *block > 0);
        let block = block.ok_or_else(|| refused(format!("blocks of {block_size} bytes")))?;
        let mut ranges = Vec::with_capacity(pairs.len());
        for (first, count) in pairs {
            let outside = || refused(format!("{count} blocks from {first} on, of a volume of {size} bytes"));
            let first = u64::try_from(*first).map_err(|_| outside())?;
            let count = u64::try_from(*count).map_err(|_| outside())?;
            let end = first.checked_add(count).filter(|end| *end <= size.div_ceil(block)).ok_or_else(outside)?;
            // Neither overflows by more than the last block, which is cut.
            let (offset, end) = (first.saturating_mul(block), end.saturating_mul(block).min(size));
            if offset < end {
                ranges.push(Range { offset, length: end - offset });
            }
        }
        ranges.sort_unstable();
        let mut apart: Vec<Range> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match apart.last_mut() {
                Some(last) if range.offset <= last.offset + last.length => {
                    last.length = last.length.max(range.offset + range.length - last.offset);
                }
                _ => apart.push(range),
            }
        }
        Ok(Self { format: Self::FORMAT, ranges: apart })
    }

    /// Gives the parts.
    pub fn ranges(&self) -> &[Range] {
        &self.ranges
    }

    /// Counts their bytes.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.length).sum()
    }

    fn path(host: &Host, key: MirrorKey) -> PathBuf {
        host.mirror_dir(key).join("blocks.json")
    }

    /// Reads what a copy is to copy; `None` when it is none.
    ///
    /// # Errors
    ///
    /// When it is there and cannot be read.
    pub fn load(host: &Host, key: MirrorKey) -> Result<Option<Self>> {
        record::read_if_present(&Self::path(host, key))
    }

    /// Writes down what a copy is to copy, before its record.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn store(&self, host: &Host, key: MirrorKey) -> Result<()> {
        record::write(&Self::path(host, key), self, Durability::UntilReboot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(block_size: i64, pairs: &[(i64, i64)], size: u64) -> Vec<(u64, u64)> {
        let blocks = Blocks::new(block_size, pairs, size).unwrap();
        blocks.ranges().iter().map(|range| (range.offset, range.length)).collect()
    }

    #[test]
    fn blocks_are_put_in_order_and_joined() {
        assert_eq!(ranges(10, &[(5, 1), (0, 2), (1, 3), (4, 1), (8, 0)], 100), [(0, 60)]);
        assert_eq!(ranges(10, &[(5, 1), (0, 2)], 100), [(0, 20), (50, 10)]);
        assert_eq!(ranges(10, &[], 100), []);
    }

    #[test]
    fn the_last_block_ends_with_the_volume() {
        assert_eq!(ranges(64, &[(1, 1)], 100), [(64, 36)]);
        assert_eq!(ranges(i64::MAX, &[(0, 1)], 100), [(0, 100)]);
    }

    #[test]
    fn blocks_that_are_not_there_are_refused() {
        for (block_size, pair) in [
            (0, (0, 1)),
            (-1, (0, 1)),
            (10, (-1, 1)),
            (10, (0, -1)),
            (10, (10, 1)),
            (10, (9, 2)),
            (10, (i64::MAX, i64::MAX)),
        ] {
            assert!(Blocks::new(block_size, &[pair], 100).is_err(), "{block_size} {pair:?}");
        }
    }
}
