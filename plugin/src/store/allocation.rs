//! Where a qcow2 file has something of its own, read from its tables.
//!
//! Frozen files do not change, so that no lock of QEMU's is needed. What a daemon has written and not yet flushed is not
//! in the tables of a file that it writes to. The format is QEMU's docs/interop/qcow2.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::error::{Error, Result};
use crate::qemu::Image;

/// The size of a block in bytes: the granularity in which changes are told, and our clusters' size.
pub const BLOCK: u64 = 64 << 10;

/// What one layer has of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing: what lies below shows.
    Unset,
    /// Zeroes, known without reading them.
    Zero,
    /// Zeroes in a part of it, and nothing in the rest: it reads as zeroes where what lies below does.
    PartZero,
    /// Data.
    Data,
}

impl State {
    /// Gives what a reader finds of a block that looks so from above, when the next layer has `own` of it.
    pub fn over(self, own: Self) -> Self {
        match (self, own) {
            (Self::Unset, own) => own,
            (Self::PartZero, Self::Unset) => Self::PartZero,
            (Self::PartZero, own) => own,
            (found, _) => found,
        }
    }

    /// Tells whether what lies below does not matter.
    pub fn is_known(self) -> bool {
        matches!(self, Self::Zero | Self::Data)
    }

    /// Gives what a block has of which one part is so and another so.
    fn beside(self, other: Self) -> Self {
        match (self, other) {
            (one, other) if one == other => one,
            (Self::Data, _) | (_, Self::Data) => Self::Data,
            _ => Self::PartZero,
        }
    }
}

/// The largest first-level table that QEMU opens, in entries.
const MAX_L1: u32 = (32 << 20) / 8;
/// The bits of a table's entry that are an offset in the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The bit of a compressed cluster.
const COMPRESSED: u64 = 1 << 62;
/// The bit of a cluster that reads as zeroes.
const ZERO: u64 = 1;
/// The incompatible feature of entries with a bitmap of subclusters.
const EXTENDED_L2: u64 = 1 << 4;

/// A file whose first-level table was read.
#[derive(Debug)]
pub struct Allocation {
    file: File,
    path: PathBuf,
    virtual_size: u64,
    cluster_bits: u32,
    /// Bytes of an entry of a second-level table.
    entry: u64,
    l1: Vec<u64>,
}

impl Allocation {
    /// Opens a file whose header was found acceptable ([`super::LoadedTree::checked_image`]).
    ///
    /// # Errors
    ///
    /// [`Error::Image`] when its tables cannot be what they should be, [`Error::Io`] when they cannot be read.
    pub fn open(image: &Image) -> Result<Self> {
        let path = &image.path;
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path)
            .map_err(Error::on("opening", path))?;
        let head: [u64; 13] = words(&read_at(&file, path, 0, 104)?);
        let high = |word: u64| u32::try_from(word >> 32).unwrap_or(u32::MAX);
        let low = |word: u64| u32::try_from(word & u64::from(u32::MAX)).unwrap_or(u32::MAX);
        // Bytes 20, 36, 40 and 72 of the header.
        let (cluster_bits, l1_size, l1_offset, features) = (low(head[2]), low(head[4]), head[5], head[9]);
        debug_assert_eq!(high(head[0]), 0x5146_49fb);
        if !(9..=21).contains(&cluster_bits) || l1_size > MAX_L1 {
            return Err(damaged(path, "its first-level table is impossible"));
        }
        let length = file.metadata().map_err(Error::on("reading the state of", path))?.len();
        if l1_offset.checked_add(u64::from(l1_size) * 8).is_none_or(|end| end > length) {
            return Err(damaged(path, "its first-level table lies beyond its end"));
        }
        let entry = if features & EXTENDED_L2 == 0 { 8 } else { 16 };
        let l1 = read_at(&file, path, l1_offset, u64::from(l1_size) * 8)?;
        let l1 = l1.as_chunks::<8>().0.iter().map(|bytes| u64::from_be_bytes(*bytes)).collect();
        Ok(Self { file, path: path.clone(), virtual_size: image.virtual_size, cluster_bits, entry, l1 })
    }

    /// Tells what the file has of the blocks from `first` on, below what the states given say ([`State::over`]).
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn fill(&self, first: u64, states: &mut [State]) -> Result<()> {
        let (cluster, table) = (1_u64 << self.cluster_bits, (1_u64 << self.cluster_bits) / self.entry);
        let end = ((first + states.len() as u64) * BLOCK).min(self.virtual_size).div_ceil(cluster);
        let mut own: Vec<Option<State>> = vec![None; states.len()];
        let mut next = first * BLOCK / cluster;
        while next < end {
            let until = ((next / table + 1) * table).min(end);
            let l1 = usize::try_from(next / table).ok().and_then(|index| self.l1.get(index));
            let offset = l1.map_or(0, |entry| entry & OFFSET);
            let entries = match offset {
                0 => Vec::new(),
                _ => {
                    let start = offset + next % table * self.entry;
                    read_at(&self.file, &self.path, start, (until - next) * self.entry)?
                }
            };
            for index in next..until {
                let at = usize::try_from((index - next) * self.entry).unwrap_or(usize::MAX);
                let state = entries.get(at..).map_or(State::Unset, |bytes| self.state(bytes));
                // A cluster is a part of a block, or several.
                let blocks = index * cluster / BLOCK..=((index + 1) * cluster - 1) / BLOCK;
                for block in blocks.filter(|block| *block >= first) {
                    let slot = usize::try_from(block - first).ok().and_then(|at| own.get_mut(at));
                    if let Some(slot) = slot {
                        *slot = Some(slot.map_or(state, |other| other.beside(state)));
                    }
                }
            }
            next = until;
        }
        for (state, own) in states.iter_mut().zip(own) {
            *state = state.over(own.unwrap_or(State::Unset));
        }
        Ok(())
    }

    /// Tells whether there are tables for any of `count` blocks from `first` on; where there are none the file has nothing.
    pub fn has_tables(&self, first: u64, count: u64) -> bool {
        let reach = (1_u64 << self.cluster_bits) / self.entry * (1_u64 << self.cluster_bits);
        let (from, until) = (first * BLOCK / reach, ((first + count) * BLOCK).div_ceil(reach));
        (from..until).any(|at| {
            let entry = usize::try_from(at).ok().and_then(|at| self.l1.get(at));
            entry.is_some_and(|entry| entry & OFFSET != 0)
        })
    }

    /// Tells whether what the file has is known by parts of a cluster ([`super::Unit::Sector`]).
    pub fn is_by_sector(&self) -> bool {
        self.entry == 16
    }

    /// Tells whether the file has nothing of its own: neither data nor zeroes.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn is_empty(&self) -> Result<bool> {
        let length = 1_u64 << self.cluster_bits;
        // Each table has a place of its own. Without this bound a small file could have all of a large disk's.
        let mut room = self.file.metadata().map_err(Error::on("reading the state of", &self.path))?.len();
        for offset in self.l1.iter().map(|entry| entry & OFFSET).filter(|offset| *offset != 0) {
            room = room.checked_sub(length).ok_or_else(|| damaged(&self.path, "its tables lie on each other"))?;
            let table = read_at(&self.file, &self.path, offset, length)?;
            let entry = usize::try_from(self.entry).unwrap_or(usize::MAX);
            if table.chunks(entry).any(|bytes| self.state(bytes) != State::Unset) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Judges an entry of a second-level table.
    fn state(&self, bytes: &[u8]) -> State {
        let [entry, subclusters]: [u64; 2] = words(bytes);
        if entry & COMPRESSED != 0 {
            return State::Data;
        }
        if self.entry == 16 {
            return match subclusters {
                0 => State::Unset,
                // The lower half says where data is, the upper one where zeroes are.
                all_zero if all_zero == u64::from(u32::MAX) << 32 => State::Zero,
                zeroes if zeroes & u64::from(u32::MAX) == 0 => State::PartZero,
                _ => State::Data,
            };
        }
        match entry {
            _ if entry & ZERO != 0 => State::Zero,
            _ if entry & OFFSET == 0 => State::Unset,
            _ => State::Data,
        }
    }
}

/// Gives the big-endian words that bytes begin with; those that are missing are zero.
fn words<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_be_bytes(*bytes);
    }
    words
}

/// Reads exactly so many bytes of a table.
fn read_at(file: &File, path: &Path, offset: u64, length: u64) -> Result<Vec<u8>> {
    let length = usize::try_from(length).map_err(|_| damaged(path, "a table is too large"))?;
    let mut bytes = vec![0; length];
    match file.read_exact_at(&mut bytes, offset) {
        Ok(()) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(damaged(path, "a table lies beyond its end"))
        }
        Err(error) => Err(Error::on("reading", path)(error)),
    }
}

fn damaged(path: &Path, reason: &str) -> Error {
    Error::Image { path: path.to_owned(), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::id::NodeId;

    /// Writes into an overlay of some kind and tells what it has of each block.
    fn written(options: &str, virtual_size: u64, commands: &[&str]) -> Vec<State> {
        let directory = tempfile::tempdir().unwrap();
        let (base, path) = (directory.path().join("base.qcow2"), directory.path().join("top.qcow2"));
        let run = |command: &mut Command| assert!(command.output().unwrap().status.success(), "{command:?}");
        let size = virtual_size.to_string();
        run(Command::new("qemu-img").args(["create", "-f", "qcow2"]).arg(&base).arg(&size));
        let mut create = Command::new("qemu-img");
        create.args(["create", "-f", "qcow2", "-o", options, "-F", "qcow2", "-b"]).arg(&base).arg(&path).arg(&size);
        run(&mut create);
        for command in commands {
            run(Command::new("qemu-io").args(["-d", "unmap", "-f", "qcow2", "-c", command]).arg(&path));
        }
        let allocation = Allocation::open(&Image { node: NodeId::random(), path, virtual_size }).unwrap();
        let mut states = vec![State::Unset; usize::try_from(virtual_size.div_ceil(BLOCK)).unwrap()];
        allocation.fill(0, &mut states).unwrap();
        assert_eq!(allocation.is_empty().unwrap(), states.iter().all(|state| *state == State::Unset), "{commands:?}");
        // In parts it is the same.
        for (first, state) in (0..).zip(&states) {
            let mut one = [State::Unset];
            allocation.fill(first, &mut one).unwrap();
            assert_eq!(one[0], *state, "{first}");
        }
        states
    }

    #[test]
    fn data_zeroes_and_nothing_are_told_apart_whatever_the_clusters_are() {
        for options in [
            "cluster_size=64k",
            "cluster_size=4k",
            "cluster_size=512",
            "cluster_size=128k",
            "cluster_size=2M",
            "cluster_size=64k,extended_l2=on",
            "cluster_size=128k,extended_l2=on",
        ] {
            let size = 80 << 20;
            let states = written(options, size, &["write 0 2M", "write -z 4M 2M", "discard 8M 2M", "write 64M 2M"]);
            let at = |mib: usize| states[mib * 16..(mib + 2) * 16].to_vec();
            assert_eq!(at(0), [State::Data; 32], "{options}");
            assert_eq!(at(4), [State::Zero; 32], "{options}");
            assert_eq!(at(8), [State::Zero; 32], "{options}");
            assert_eq!(at(64), [State::Data; 32], "{options}");
            for unset in [2, 6, 10, 62, 66, 78] {
                assert_eq!(at(unset), [State::Unset; 32], "{options} {unset}");
            }
        }
    }

    #[test]
    fn zeroes_in_a_part_of_a_block_are_not_taken_for_data() {
        let options = "cluster_size=16k,extended_l2=on";
        let commands = ["write -z 61440 196608", "write -z 262144 512", "write 393216 512", "write -z 409600 16k"];
        let states = written(options, 8 * BLOCK, &commands);
        use State::{Data, PartZero, Unset, Zero};
        assert_eq!(states, [PartZero, Zero, Zero, PartZero, PartZero, Unset, Data, Unset]);
    }

    #[test]
    fn a_file_that_was_only_read_is_empty() {
        for options in ["cluster_size=64k", "cluster_size=16k,extended_l2=on"] {
            assert_eq!(written(options, 2 * BLOCK, &["read 0 64k"]), [State::Unset; 2], "{options}");
            assert_eq!(written(options, 2 * BLOCK, &["write -z 64k 64k"]), [State::Unset, State::Zero], "{options}");
        }
    }

    #[test]
    fn a_part_of_a_block_counts_as_the_block() {
        for options in ["cluster_size=64k", "cluster_size=4k", "cluster_size=64k,extended_l2=on"] {
            let states = written(options, (1 << 20) + 4096, &["write 0 512", "write 196608 1k", "write 1M 512"]);
            let data: Vec<usize> = (0..17).filter(|block| states[*block] == State::Data).collect();
            assert_eq!(data, [0, 3, 16], "{options}");
        }
    }
}
