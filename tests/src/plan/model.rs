//! What a plan's disks and snapshots must hold, worked out without any storage.

use std::collections::BTreeMap;

use super::{Action, Error, Extent, Step};

/// The VM of a plan, its disks and its snapshots.
#[derive(Debug, Clone)]
pub struct Model {
    disks: Vec<Disk>,
    /// The snapshot that the disks are based on now.
    parent: Option<String>,
    snapshots: BTreeMap<String, Snapshot>,
}

#[derive(Debug, Clone)]
struct Snapshot {
    parent: Option<String>,
    disks: Vec<Disk>,
}

/// The content of one disk at one time: all that was done to it, in order.
///
/// Plans are short, so that replaying them for the bytes that are looked at is simpler than any map of extents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    size: u64,
    history: Vec<Action>,
}

/// A byte that is not what the model says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// Where it is.
    pub offset: u64,
    /// What is there.
    pub found: u8,
    /// What has to be there.
    pub expected: u8,
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "byte {} is {:#04x}, not {:#04x}", self.offset, self.found, self.expected)
    }
}

impl Model {
    /// Blank disks of these sizes.
    ///
    /// # Errors
    /// If there is no disk, or one without bytes.
    pub fn new(sizes: &[u64]) -> Result<Self, Error> {
        if sizes.is_empty() {
            return Err(Error("the plan has no disk".to_owned()));
        }
        if let Some(index) = sizes.iter().position(|size| *size == 0) {
            return Err(Error(format!("disk {index} has no bytes")));
        }
        let disks = sizes.iter().map(|size| Disk { size: *size, history: Vec::new() }).collect();
        Ok(Self { disks, parent: None, snapshots: BTreeMap::new() })
    }

    /// Does one step.
    ///
    /// # Errors
    /// Says why the step is impossible; nothing has changed then.
    pub fn apply(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Snapshot(name) if name.is_empty() => {
                return Err("a snapshot without a name".to_owned());
            }
            Step::Snapshot(name) if self.snapshots.contains_key(name) => {
                return Err(format!("the name {name:?} is taken by an earlier snapshot"));
            }
            Step::Snapshot(name) => {
                let snapshot = Snapshot { parent: self.parent.replace(name.clone()), disks: self.disks.clone() };
                self.snapshots.insert(name.clone(), snapshot);
            }
            Step::Revert(name) => {
                let snapshot =
                    self.snapshots.get(name).ok_or_else(|| format!("there is no snapshot {name:?} to revert to"))?;
                self.disks.clone_from(&snapshot.disks);
                self.parent = Some(name.clone());
            }
            Step::Destroy(name) => {
                let gone = self.snapshots.remove(name);
                let gone = gone.ok_or_else(|| format!("there is no snapshot {name:?} to destroy"))?;
                let parents = self.snapshots.values_mut().map(|snapshot| &mut snapshot.parent);
                for parent in parents.chain([&mut self.parent]).filter(|parent| parent.as_ref() == Some(name)) {
                    parent.clone_from(&gone.parent);
                }
            }
            Step::Disk { disk, action } => {
                self.disks.get_mut(*disk).ok_or_else(|| format!("there is no disk {disk}"))?.apply(*action)?;
            }
        }
        Ok(())
    }

    /// The disks as they are after the steps so far.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// The snapshot that the disks are based on.
    pub fn parent(&self) -> Option<&str> {
        self.parent.as_deref()
    }

    /// The snapshots' names.
    pub fn snapshots(&self) -> impl Iterator<Item = &str> {
        self.snapshots.keys().map(String::as_str)
    }

    /// The snapshot that a snapshot is based on.
    pub fn parent_of(&self, snapshot: &str) -> Option<&str> {
        self.snapshots.get(snapshot)?.parent.as_deref()
    }

    /// The disks of a snapshot.
    pub fn disks_of(&self, snapshot: &str) -> Option<&[Disk]> {
        Some(&self.snapshots.get(snapshot)?.disks)
    }
}

impl Disk {
    /// A blank disk.
    pub fn blank(size: u64) -> Self {
        Self { size, history: Vec::new() }
    }

    fn apply(&mut self, action: Action) -> Result<(), String> {
        match action {
            Action::Write { range, .. } | Action::Discard(range) | Action::Zero(range) => {
                let Extent { offset, length } = range;
                if length == 0 {
                    return Err("no bytes".to_owned());
                }
                if offset.checked_add(length).is_none_or(|end| end > self.size) {
                    return Err(format!("{length} bytes at {offset} of a disk of {} bytes", self.size));
                }
            }
            Action::Resize(size) if size < self.size => {
                return Err(format!("disks only grow, from {} bytes not to {size}", self.size));
            }
            Action::Resize(size) => self.size = size,
        }
        self.history.push(action);
        Ok(())
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Checks bytes that were read at an offset; bytes behind the disk's end must be zero.
    ///
    /// # Errors
    /// The first byte that is wrong.
    pub fn check(&self, offset: u64, found: &[u8]) -> Result<(), Mismatch> {
        let mut expected = vec![0; found.len()];
        let may_be_zero = self.render(offset, &mut expected);
        if may_be_zero.is_empty() && expected == found {
            return Ok(());
        }
        for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let place = offset + index as u64;
            let discarded = || may_be_zero.iter().any(|range| (range.offset..range.end()).contains(&place));
            if found != expected && !(*found == 0 && discarded()) {
                return Err(Mismatch { offset: place, found: *found, expected: *expected });
            }
        }
        Ok(())
    }

    /// Fills a zeroed buffer with the bytes from an offset on; returns which of them may be zero instead.
    pub fn render(&self, offset: u64, buffer: &mut [u8]) -> Vec<Extent> {
        let end = offset + buffer.len() as u64;
        let mut may_be_zero = Vec::new();
        for action in &self.history {
            let (Action::Write { range, .. } | Action::Discard(range) | Action::Zero(range)) = *action else {
                continue;
            };
            let (from, to) = (range.offset.max(offset), range.end().min(end));
            if from >= to {
                continue;
            }
            let part = &mut buffer[(from - offset) as usize..(to - offset) as usize];
            match action {
                Action::Discard(_) => {
                    may_be_zero.push(Extent { offset: from, length: to - from });
                    continue;
                }
                Action::Write { seed, .. } => fill(part, from, *seed),
                Action::Zero(_) | Action::Resize(_) => part.fill(0),
            }
            may_be_zero = cut_out(may_be_zero, from, to);
        }
        may_be_zero
    }
}

/// What is left of some extents without the bytes between two offsets.
fn cut_out(extents: Vec<Extent>, from: u64, to: u64) -> Vec<Extent> {
    let mut left = Vec::with_capacity(extents.len());
    for extent in extents {
        for (start, end) in [(extent.offset, extent.end().min(from)), (extent.offset.max(to), extent.end())] {
            if start < end {
                left.push(Extent { offset: start, length: end - start });
            }
        }
    }
    left
}

/// Fills a buffer that stands at an offset with the bytes of a seed; no byte depends on where the buffer begins.
pub fn fill(buffer: &mut [u8], offset: u64, seed: u64) {
    let mut place = offset;
    let mut rest = buffer;
    while !rest.is_empty() {
        let word = word(seed, place / 8).to_le_bytes();
        let skip = (place % 8) as usize;
        let count = rest.len().min(8 - skip);
        let (head, tail) = rest.split_at_mut(count);
        head.copy_from_slice(&word[skip..skip + count]);
        place += count as u64;
        rest = tail;
    }
}

/// Sebastiano Vigna's splitmix64 at one place of its sequence.
fn word(seed: u64, index: u64) -> u64 {
    let mut z =
        (seed ^ 0x5851_f42d_4c95_7f2d).wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(offset: u64, length: u64) -> Extent {
        Extent { offset, length }
    }

    fn disk(actions: &[Action]) -> Disk {
        let mut disk = Disk::blank(64);
        for action in actions {
            disk.apply(*action).unwrap();
        }
        disk
    }

    #[test]
    fn bytes_do_not_depend_on_how_a_read_is_cut() {
        let disk = disk(&[Action::Write { range: extent(3, 50), seed: 9 }, Action::Zero(extent(10, 5))]);
        let mut whole = vec![0; 64];
        disk.render(0, &mut whole);
        assert!(whole[..3].iter().chain(&whole[10..15]).chain(&whole[53..]).all(|byte| *byte == 0));
        for offset in 0..64 {
            let mut part = vec![0; 7.min(64 - offset)];
            disk.render(offset as u64, &mut part);
            assert_eq!(part, whole[offset..offset + part.len()]);
        }
    }

    #[test]
    fn a_discarded_byte_may_be_as_before_or_zero_until_it_is_written_again() {
        let write = |offset, length, seed| Action::Write { range: extent(offset, length), seed };
        let disk = disk(&[write(0, 32, 1), Action::Discard(extent(8, 16)), write(16, 4, 2)]);
        let mut bytes = vec![0; 64];
        let maybe = disk.render(0, &mut bytes);
        assert_eq!(maybe, [extent(8, 8), extent(20, 4)]);
        disk.check(0, &bytes).unwrap();
        bytes[8..16].fill(0);
        disk.check(0, &bytes).unwrap();
        let old = std::mem::replace(&mut bytes[17], 0);
        assert_eq!(disk.check(0, &bytes).unwrap_err(), Mismatch { offset: 17, found: 0, expected: old });
        bytes[17] = old;
        bytes[9] = 1;
        assert_eq!(disk.check(0, &bytes).unwrap_err().offset, 9);
    }

    #[test]
    fn a_revert_takes_content_size_and_parent_back() {
        let mut model = Model::new(&[64]).unwrap();
        let on_disk = |action| Step::Disk { disk: 0, action };
        for step in [
            on_disk(Action::Write { range: extent(0, 8), seed: 1 }),
            Step::Snapshot("a".into()),
            on_disk(Action::Resize(128)),
            Step::Snapshot("b".into()),
            Step::Revert("a".into()),
            Step::Snapshot("c".into()),
        ] {
            model.apply(&step).unwrap();
        }
        assert_eq!(model.disks()[0].size(), 64);
        assert_eq!(model.disks_of("b").unwrap()[0].size(), 128);
        assert_eq!(model.disks_of("c"), model.disks_of("a"));
        assert_eq!(model.parent(), Some("c"));
        assert_eq!((model.parent_of("b"), model.parent_of("c"), model.parent_of("a")), (Some("a"), Some("a"), None));
    }

    #[test]
    fn what_lies_on_a_snapshot_that_is_destroyed_lies_on_its_parent_then() {
        let mut model = Model::new(&[64]).unwrap();
        for name in ["a", "b", "c"] {
            model.apply(&Step::Snapshot(name.into())).unwrap();
        }
        model.apply(&Step::Destroy("b".into())).unwrap();
        assert_eq!((model.parent_of("c"), model.parent()), (Some("a"), Some("c")));
        for name in ["c", "a"] {
            model.apply(&Step::Destroy(name.into())).unwrap();
        }
        assert_eq!((model.parent(), model.snapshots().next()), (None, None));
        model.apply(&Step::Snapshot("a".into())).unwrap();
        assert!(model.apply(&Step::Destroy("b".into())).is_err());
    }
}
