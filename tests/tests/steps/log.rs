//! What QEMU's blklogwrites noted of a device's writes, and what the device may hold after a power cut.
//!
//! The format is that of the kernel's dm-log-writes (Documentation/admin-guide/device-mapper/log-writes.rst): a block
//! that describes the log, then for each request a block that describes it, with the data behind it.

use std::fs;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use fake_xapi::conformance::random::Random;

const MAGIC: u64 = 0x006a_7366_7773_6872;

/// The unit in which the log is counted, in bytes.
pub const SECTOR: u64 = 512;

/// What a disk writes whole or not at all, in bytes.
const ATOM: u64 = 4096;

const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;

/// A request that the device has answered.
struct Entry {
    /// Where it writes, in bytes.
    offset: u64,
    /// Where in the log its data is; empty if it has none.
    data: Range<usize>,
    flags: u64,
    /// Where in the log the next one begins.
    end: u64,
}

/// All that was written to a device, in order.
pub struct Log {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

/// What became of the writes that no flush has followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsynced {
    /// None of them is on the disk.
    Lost,
    /// All of them are.
    Kept,
    /// Some of them are, and of some a part: as chance has it.
    Some(u64),
}

/// A moment at which the power goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// So many requests were answered.
    pub at: usize,
    /// What is left of what was not flushed by then.
    pub unsynced: Unsynced,
}

impl Log {
    /// Reads a log that nobody writes to any more.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path)?;
        let number = |at: usize| -> Result<u64> {
            let field = bytes.get(at..at + 8).context("the log ends too soon")?;
            Ok(u64::from_le_bytes(field.try_into()?))
        };
        ensure!(number(0)? == MAGIC && number(8)? == 1, "this is no log of writes");
        let (count, sector) = (number(16)?, number(24)? & 0xffff_ffff);
        ensure!(sector == SECTOR, "the log has sectors of {sector} bytes");
        let mut entries = Vec::new();
        let mut place = SECTOR as usize;
        for _ in 0..count {
            let (offset, flags) = (number(place)? * SECTOR, number(place + 16)?);
            let length = if flags & DISCARD == 0 { number(place + 8)? * SECTOR } else { 0 };
            let begin = place + SECTOR as usize;
            place = begin + length as usize;
            entries.push(Entry { offset, data: begin..place, flags, end: place as u64 });
        }
        ensure!(place <= bytes.len(), "the log ends in the middle of a request");
        Ok(Self { bytes, entries })
    }

    /// Tells how many requests were answered when the log had so many bytes.
    pub fn answered(&self, length: u64) -> usize {
        self.entries.partition_point(|entry| entry.end <= length)
    }

    /// Lists the flushes.
    pub fn flushes(&self) -> impl Iterator<Item = usize> {
        (0..self.entries.len()).filter(|index| self.entries[*index].flags & FLUSH != 0)
    }

    /// Gives the writes that were answered at a moment, and that no flush has followed by then.
    fn unsynced(&self, at: usize) -> Range<usize> {
        let flush = self.entries[..at].iter().rposition(|entry| entry.flags & FLUSH != 0);
        flush.map_or(0, |flush| flush + 1)..at
    }

    /// Tells whether there is anything that may be lost at a moment.
    pub fn has_unsynced(&self, at: usize) -> bool {
        self.unsynced(at).any(|index| !self.entries[index].data.is_empty())
    }

    /// Makes what the device may hold after a power cut, out of what it held in the beginning.
    pub fn replay(&self, cut: Cut, device: &File) -> Result<()> {
        let unsynced = self.unsynced(cut.at);
        for entry in &self.entries[..unsynced.start] {
            device.write_all_at(&self.bytes[entry.data.clone()], entry.offset)?;
        }
        let mut chance = match cut.unsynced {
            Unsynced::Some(seed) => Some(Random::from_seed(seed)),
            Unsynced::Lost | Unsynced::Kept => None,
        };
        // In some cuts hardly anything is kept, in others nearly all.
        let share = chance.as_mut().map_or(0, |random| random.below(7) + 1);
        for entry in &self.entries[unsynced] {
            let data = &self.bytes[entry.data.clone()];
            let is_kept = cut.unsynced == Unsynced::Kept || entry.flags & FUA != 0;
            if is_kept {
                device.write_all_at(data, entry.offset)?;
                continue;
            }
            let Some(random) = &mut chance else { continue };
            if random.below(8) >= share {
                continue;
            }
            let is_torn = random.below(4) == 0;
            for (index, atom) in data.chunks(ATOM as usize).enumerate() {
                if !is_torn || random.below(2) == 0 {
                    device.write_all_at(atom, entry.offset + index as u64 * ATOM)?;
                }
            }
        }
        Ok(())
    }
}
