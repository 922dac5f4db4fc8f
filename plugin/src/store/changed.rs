//! Which blocks differ between two volumes, told by what the nodes between them have of their own.
//!
//! ```text
//!      from      to           A block differs when a node above the lowest one that both lineages share has
//!        │        │           something of it, unless both volumes read zeroes there.
//!       [A]      [C]
//!        │        │           What a node has is in its qcow2 tables; where its file is gone, or had another
//!       [B]───────┘           node merged into it, in `<node>.changed.json`.
//!        │
//!       [R]
//! ```
//!
//! A block that was written with what it held already counts as changed: to know better, both would have to be read.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::allocation::{Allocation, BLOCK, State};
use super::locked::LoadedTree;
use crate::error::{Error, Result};
use crate::id::{NodeId, VolumeKey};
use crate::record::{self, Durability, Record};

/// How the name of a record of a node's changes ends.
pub(super) const CHANGED_SUFFIX: &str = ".changed.json";

/// How many blocks are looked at together: what one second-level table of our files describes.
const WINDOW: u64 = BLOCK / 8;

/// The record of what a node had of its own above its parent, `<node>.changed.json`.
///
/// Format 1 is an object of these fields, of which the last may be absent. A range is its first block and the number of blocks; ranges are in
/// order and apart from each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Changed {
    format: u64,
    /// The size of a block in bytes.
    block: u64,
    /// Where it had data.
    data: Vec<(u64, u64)>,
    /// Where it was known to read zeroes.
    zero: Vec<(u64, u64)>,
    /// Where a part of the block was known to, and the rest was as below.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    part_zero: Vec<(u64, u64)>,
}

impl Record for Changed {
    const FORMAT: u64 = 1;
}

/// One node of a lineage.
#[derive(Debug)]
struct Layer {
    virtual_size: u64,
    source: Source,
}

/// Where a node's changes are known from.
#[derive(Debug)]
enum Source {
    Tables(Allocation),
    Record(Changed),
}

/// The blocks that differ, one bit a block, the first in the highest bit of the first byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap(pub Vec<u8>);

impl LoadedTree {
    /// Tells which blocks of `to` differ from those of `from`, in the extent given: its end may lie beyond the volume's.
    /// What lies beyond the end of the smaller volume reads as zeroes.
    ///
    /// What a running daemon has not flushed is not seen.
    ///
    /// # Errors
    ///
    /// [`Error::VolumeDoesNotExist`]; [`Error::UnrelatedVolumes`]; else a node's tables or record cannot be read.
    pub fn changed_blocks(&self, from: VolumeKey, to: VolumeKey, offset: u64, length: u64) -> Result<Bitmap> {
        let (from_node, to_node) = (self.volume(from)?.node, self.volume(to)?.node);
        let (from_line, to_line) = (self.tree.lineage(from_node), self.tree.lineage(to_node));
        let shared: BTreeSet<NodeId> = to_line.iter().filter(|node| from_line.contains(node)).copied().collect();
        if shared.is_empty() {
            return Err(Error::UnrelatedVolumes { from: from.to_string(), to: to.to_string() });
        }
        let layers = |line: &[NodeId], wanted: bool| -> Result<Vec<Layer>> {
            let chosen = line.iter().filter(|node| shared.contains(node) == wanted);
            chosen.map(|node| self.layer(*node)).collect()
        };
        let (above_from, above_to) = (layers(&from_line, false)?, layers(&to_line, false)?);
        let below = layers(&to_line, true)?;

        let size = self.tree.virtual_size(to_node)?;
        let end = offset.saturating_add(length).min(size).div_ceil(BLOCK);
        let start = (offset / BLOCK).min(end);
        let mut bitmap = Bitmap(vec![0; usize::try_from((end - start).div_ceil(8)).unwrap_or(usize::MAX)]);
        let mut first = start;
        while first < end {
            let count = usize::try_from(WINDOW.min(end - first)).unwrap_or(usize::MAX);
            let (mut old, mut new) = (vec![State::Unset; count], vec![State::Unset; count]);
            fill(&above_from, first, &mut old)?;
            fill(&above_to, first, &mut new)?;
            let set = |(old, new): (&State, &State)| *old != State::Unset || *new != State::Unset;
            let touched: Vec<bool> = old.iter().zip(&new).map(set).collect();
            if touched.contains(&true) {
                fill(&below, first, &mut old)?;
                fill(&below, first, &mut new)?;
                let has_data = |at: usize| old[at] == State::Data || new[at] == State::Data;
                for at in (0..count).filter(|at| touched[*at] && has_data(*at)) {
                    bitmap.set(first - start + at as u64);
                }
            }
            first += count as u64;
        }
        Ok(bitmap)
    }

    /// Tells which blocks of a volume may hold anything but zeroes.
    ///
    /// # Errors
    ///
    /// As [`Self::changed_blocks`].
    pub fn written_blocks(&self, key: VolumeKey) -> Result<Bitmap> {
        let node = self.volume(key)?.node;
        let lineage = self.tree.lineage(node);
        let layers = lineage.iter().map(|node| self.layer(*node)).collect::<Result<Vec<_>>>()?;
        let end = self.tree.virtual_size(node)?.div_ceil(BLOCK);
        let mut bitmap = Bitmap(vec![0; usize::try_from(end.div_ceil(8)).unwrap_or(usize::MAX)]);
        let mut first = 0;
        while first < end {
            let mut states = vec![State::Unset; usize::try_from(WINDOW.min(end - first)).unwrap_or(usize::MAX)];
            fill(&layers, first, &mut states)?;
            let data = states.iter().zip(first..end).filter(|(state, _)| **state == State::Data);
            data.for_each(|(_, block)| bitmap.set(block));
            first += states.len() as u64;
        }
        Ok(bitmap)
    }

    /// Opens what tells of a node's changes.
    fn layer(&self, node: NodeId) -> Result<Layer> {
        if let Some(past) = self.tree.history.get(&node) {
            let source = Source::Record(self.read_changed(node)?);
            return Ok(Layer { virtual_size: past.virtual_size, source });
        }
        let image = self.checked_image(node)?;
        Ok(Layer { virtual_size: image.virtual_size, source: Source::Tables(Allocation::open(&image)?) })
    }

    /// Reads the record of what a node changed.
    pub(super) fn read_changed(&self, node: NodeId) -> Result<Changed> {
        let path = changed_path(&self.directory, node);
        let changed: Changed = record::read(&path).map_err(|error| match error {
            Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Error::DamagedRecord { path: path.clone(), reason: "the file does not exist".to_owned() }
            }
            error => error,
        })?;
        match changed.check() {
            Ok(()) => Ok(changed),
            Err(reason) => Err(Error::DamagedRecord { path, reason }),
        }
    }

    /// Writes down what a node that has a file changed, durably, for a commit after which the file may go.
    ///
    /// # Errors
    ///
    /// When its tables cannot be read or the record cannot be written.
    pub(super) fn record_changes(&self, node: NodeId) -> Result<()> {
        let layer = self.layer(node)?;
        let (data, zero, part_zero) = (Vec::new(), Vec::new(), Vec::new());
        let mut changed = Changed { format: Changed::FORMAT, block: BLOCK, data, zero, part_zero };
        let end = layer.virtual_size.div_ceil(BLOCK);
        let mut first = 0;
        while first < end {
            let mut states = vec![State::Unset; usize::try_from(WINDOW.min(end - first)).unwrap_or(usize::MAX)];
            layer.fill(first, &mut states)?;
            for (state, block) in states.iter().zip(first..end) {
                match state {
                    State::Unset => {}
                    State::Zero => append(&mut changed.zero, block),
                    State::PartZero => append(&mut changed.part_zero, block),
                    State::Data => append(&mut changed.data, block),
                }
            }
            first += states.len() as u64;
        }
        record::write(&changed_path(&self.directory, node), &changed, Durability::Durable)
    }
}

/// Tells what a reader of layers, the top first, finds in the blocks from `first` on.
fn fill(layers: &[Layer], first: u64, states: &mut [State]) -> Result<()> {
    for layer in layers {
        layer.fill(first, states)?;
        // Beyond the end of a layer are zeroes, whatever is below it.
        let beyond = layer.virtual_size.div_ceil(BLOCK).saturating_sub(first);
        let beyond = usize::try_from(beyond).unwrap_or(usize::MAX).min(states.len());
        states[beyond..].iter_mut().for_each(|state| *state = state.over(State::Zero));
        if states.iter().all(|state| state.is_known()) {
            break;
        }
    }
    Ok(())
}

impl Layer {
    fn fill(&self, first: u64, states: &mut [State]) -> Result<()> {
        match &self.source {
            Source::Tables(allocation) => allocation.fill(first, states),
            Source::Record(changed) => {
                changed.fill(first, states);
                Ok(())
            }
        }
    }
}

impl Changed {
    pub(crate) fn fill(&self, first: u64, states: &mut [State]) {
        let lists = [(&self.data, State::Data), (&self.zero, State::Zero), (&self.part_zero, State::PartZero)];
        for (ranges, state) in lists {
            let reaches = ranges.partition_point(|(start, count)| start + count <= first);
            for (start, count) in &ranges[reaches..] {
                let within = |block: u64| usize::try_from(block.saturating_sub(first)).unwrap_or(usize::MAX);
                let (from, until) = (within(*start), within(start + count).min(states.len()));
                if from >= until {
                    break;
                }
                states[from..until].iter_mut().for_each(|found| *found = found.over(state));
            }
        }
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        if self.block != BLOCK {
            return Err(format!("it is of blocks of {} bytes", self.block));
        }
        for ranges in [&self.data, &self.zero, &self.part_zero] {
            let mut end = 0;
            for (start, count) in ranges {
                if *start < end || *count == 0 {
                    return Err("its ranges are not in order".to_owned());
                }
                end = start.checked_add(*count).ok_or_else(|| "a range has no end".to_owned())?;
            }
        }
        Ok(())
    }
}

/// Adds a block behind all others.
fn append(ranges: &mut Vec<(u64, u64)>, block: u64) {
    match ranges.last_mut() {
        Some((start, count)) if *start + *count == block => *count += 1,
        _ => ranges.push((block, 1)),
    }
}

impl Bitmap {
    fn set(&mut self, block: u64) {
        let byte = usize::try_from(block / 8).ok().and_then(|at| self.0.get_mut(at));
        if let Some(byte) = byte {
            *byte |= 0x80 >> (block % 8);
        }
    }
}

/// Gives the path of the record of a node's changes.
pub(super) fn changed_path(directory: &Path, node: NodeId) -> PathBuf {
    directory.join(format!("{node}{CHANGED_SUFFIX}"))
}
