//! The six states of the worked example's disk: how they are made, brought onto a VM's disk, and checked.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use bytes::Bytes;
use tempfile::TempDir;

use super::files::Pool;
use super::filesystem::{Files, Filesystem, check};
use crate::disk::RawCopy;
use crate::nbd::Client;
use crate::plan::{Extent, Machine};

/// The disk's size in bytes.
pub const DISK: u64 = 128 << 20;
/// Where the guest writes its records.
pub const GUEST_REGION: Extent = Extent { offset: FILESYSTEM, length: DISK - FILESYSTEM };
/// The snapshots, in the order in which they are taken.
pub const SNAPSHOTS: [&str; 4] = ["snap1", "snap2", "snap3", "snap4"];

/// What is done for each snapshot, as it is told.
const STEPS: [(&str, &str); 4] = [
    ("writing the first files", "taking snap1"),
    ("writing the files of snap2", "taking snap2"),
    ("writing the files of snap3", "taking snap3"),
    ("writing the files of snap4", "taking snap4"),
];

/// The file system's size in bytes.
const FILESYSTEM: u64 = 96 << 20;
/// Bytes of files at first, and the bytes that each step adds.
const AT_FIRST: u64 = 16 << 20;
const EACH_STEP: u64 = 4 << 20;

const BLOCK: usize = 4096;
const PIECE: usize = 1 << 20;

/// The states of the disk: one at each snapshot, and the last.
#[derive(Debug)]
pub struct History {
    states: BTreeMap<&'static str, Filesystem>,
    last: Filesystem,
    /// Holds the raw images.
    _directory: TempDir,
}

/// What a step does, told while it is done.
pub type Told<'a> = &'a mut dyn FnMut(&'static str);

impl History {
    /// Makes all states offline.
    ///
    /// # Errors
    /// If there are not enough real files, or e2fsprogs fails.
    pub fn make() -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("fx-demo-").tempdir()?;
        let image = |name: &str| directory.path().join(name);
        let mut pool = Pool::find(AT_FIRST + 5 * EACH_STEP)?;
        let mut step = 0;
        let mut files = |bytes| -> Result<Files> {
            step += 1;
            let share = pool.take(bytes)?.into_iter().enumerate();
            Ok(share.map(|(index, path)| (format!("step{step}-file{index}"), path)).collect())
        };
        let first = Filesystem::make(&image("snap1"), FILESYSTEM, files(AT_FIRST)?)?;
        let second = change(&first, &image("snap2"), files(EACH_STEP)?)?;
        // The revert: the third state comes from the first again.
        let third = change(&first, &image("snap3"), files(EACH_STEP)?)?;
        let fourth = change(&third, &image("snap4"), files(EACH_STEP)?)?;
        let last = change(&fourth, &image("running"), files(EACH_STEP)?)?;
        let states = SNAPSHOTS.into_iter().zip([first, second, third, fourth]).collect();
        Ok(Self { states, last, _directory: directory })
    }

    /// The file system as it is at a snapshot, or at last.
    pub fn state(&self, snapshot: Option<&str>) -> Option<&Filesystem> {
        match snapshot {
            Some(name) => self.states.get(name),
            None => Some(&self.last),
        }
    }

    /// Plays the history on a VM whose first disk is blank and [`DISK`] bytes large.
    ///
    /// # Errors
    /// The step that failed.
    pub async fn play<M: Machine>(&self, machine: &mut M, told: Told<'_>) -> Result<()> {
        let mut before: Option<&Filesystem> = None;
        for (name, (writing, taking)) in SNAPSHOTS.into_iter().zip(STEPS) {
            if name == "snap3" {
                told("reverting to snap1");
                machine.revert("snap1").await.context("cannot revert to snap1")?;
                before = self.states.get("snap1");
            }
            let state = &self.states[name];
            told(writing);
            bring(machine, before, state).await.with_context(|| format!("cannot write the files of {name}"))?;
            told(taking);
            machine.snapshot(name).await.with_context(|| format!("cannot take {name}"))?;
            before = Some(state);
        }
        told("writing the files of the running disk");
        bring(machine, before, &self.last).await.context("cannot write the last files")
    }

    /// Checks an image of a snapshot, or of the last state: the file system and every file in it.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn check(&self, snapshot: Option<&str>, image: &Path) -> Result<()> {
        let state = self.state(snapshot).with_context(|| format!("no state {snapshot:?} in the example"))?;
        let copy = RawCopy::of(image)?;
        check(copy.path(), state.files())
    }
}

/// Some of the files go, the new ones come, and one that stays gets another content.
fn change(from: &Filesystem, image: &Path, mut add: Files) -> Result<Filesystem> {
    let there: Vec<String> = from.files().keys().cloned().collect();
    let remove: Vec<String> = there.iter().step_by(5).cloned().collect();
    if let (Some(kept), Some((_, other))) = (there.get(1), add.first_key_value()) {
        add.insert(kept.clone(), other.clone());
    }
    from.changed(image, &remove, &add)
}

async fn bring<M: Machine>(machine: &mut M, before: Option<&Filesystem>, after: &Filesystem) -> Result<()> {
    let client = Client::connect(&machine.export(0).await?).await?;
    write_difference(&client, before.map(Filesystem::image), after.image()).await?;
    client.flush().await?;
    client.disconnect().await;
    Ok(())
}

/// Writes the blocks in which two raw images differ; without a first one, all that are not zero.
async fn write_difference(client: &Client, before: Option<&Path>, after: &Path) -> Result<()> {
    let before = before.map(File::open).transpose()?;
    let after = File::open(after)?;
    let size = after.metadata()?.len();
    let (mut old, mut new) = (vec![0; PIECE], vec![0; PIECE]);
    for offset in (0..size).step_by(PIECE) {
        let length = PIECE.min((size - offset) as usize);
        after.read_exact_at(&mut new[..length], offset)?;
        match &before {
            Some(before) => before.read_exact_at(&mut old[..length], offset)?,
            None => old[..length].fill(0),
        }
        for (range, zero) in differences(&old[..length], &new[..length]) {
            let place = offset + range.start as u64;
            if zero {
                client.write_zeroes(place, range.len() as u32).await?;
            } else {
                client.write(place, Bytes::copy_from_slice(&new[range])).await?;
            }
        }
    }
    Ok(())
}

/// Runs of blocks that differ, and whether they are zero now.
fn differences(old: &[u8], new: &[u8]) -> Vec<(std::ops::Range<usize>, bool)> {
    let mut runs: Vec<(std::ops::Range<usize>, bool)> = Vec::new();
    for (index, (before, after)) in old.chunks(BLOCK).zip(new.chunks(BLOCK)).enumerate() {
        if before == after {
            continue;
        }
        let start = index * BLOCK;
        let zero = after == &[0; BLOCK][..after.len()];
        match runs.last_mut() {
            Some((range, same)) if range.end == start && *same == zero => range.end += after.len(),
            _ => runs.push((start..start + after.len(), zero)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_blocks_are_written_together_and_zeroes_apart() {
        let old = [1; 6 * BLOCK];
        let mut new = old;
        new[BLOCK..3 * BLOCK].fill(2);
        new[3 * BLOCK..4 * BLOCK].fill(0);
        new[5 * BLOCK] = 0;
        let runs = differences(&old, &new);
        let expected = [(BLOCK..3 * BLOCK, false), (3 * BLOCK..4 * BLOCK, true), (5 * BLOCK..6 * BLOCK, false)];
        assert_eq!(runs, expected);
    }

    #[test]
    fn the_states_differ_and_the_third_comes_from_the_first() {
        let history = History::make().unwrap();
        let files = |name: Option<&str>| history.state(name).unwrap().files().keys().cloned().collect::<Vec<_>>();
        let has = |name: Option<&str>, step: &str| files(name).iter().any(|file| file.starts_with(step));
        assert!(has(Some("snap2"), "step2") && !has(Some("snap3"), "step2") && !has(None, "step2"));
        assert!(has(Some("snap3"), "step3") && has(Some("snap4"), "step3") && has(None, "step5"));
        assert!(history.state(Some("snap9")).is_none());
    }
}
