//! The file beside a tree's record that has blocks set aside for it, and in its second half a copy of it.
//!
//! ```text
//!   0                          half of the length
//!   │ set aside, never read    │ the record, a newline, its checksum, a newline
//! ```
//!
//! The copy is of the last record that was put in place, and is for one purpose: to know which volume is on which node
//! when the record is lost or torn ([`super::rebuild`]). It is written after the commit and not synced, so that it costs
//! no commit anything, and may be older than the record after a power cut; whoever uses it holds it against the files.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::tree::Tree;
use crate::error::{Error, Result};
use crate::record;

/// Gives the path of the spare file in a tree's directory.
pub(super) fn path(directory: &Path) -> PathBuf {
    directory.join("spare")
}

/// Sets blocks aside for a record of a length, with room for it to grow by a few volumes before the next time.
///
/// # Errors
///
/// When the blocks are not there to be had.
pub(super) fn reserve(directory: &Path, record: usize) -> Result<()> {
    let half = (record as u64 + 1024).next_multiple_of(4096);
    record::reserve(&path(directory), 2 * half)
}

/// Keeps a copy of a record that was put in place. Where that cannot be done the older copy stays.
pub(super) fn keep_copy(directory: &Path, bytes: &[u8]) {
    if let Err(error) = try_keep_copy(&path(directory), bytes) {
        tracing::debug!(error = error.chain(), "no copy of a tree's record was kept");
    }
}

fn try_keep_copy(spare: &Path, bytes: &[u8]) -> Result<()> {
    let file = OpenOptions::new().write(true).open(spare).map_err(Error::on("opening", spare))?;
    let half = file.metadata().map_err(Error::on("reading the state of", spare))?.len() / 2;
    let copy = [bytes, format!("{:016x}\n", checksum(bytes)).as_bytes()].concat();
    if copy.len() as u64 > half {
        return Ok(());
    }
    file.write_all_at(&copy, half).map_err(Error::on("writing", spare))
}

/// Reads the copy of a tree's record, where there is one that is whole.
///
/// # Errors
///
/// [`Error::NewerFormat`] when a newer version of this program wrote it.
pub(super) fn copy(directory: &Path) -> Result<Option<Tree>> {
    let spare = path(directory);
    let Ok(bytes) = fs::read(&spare) else { return Ok(None) };
    let copy = &bytes[bytes.len() / 2..];
    let Some(length) = copy.iter().position(|byte| *byte == b'\n').map(|at| at + 1) else { return Ok(None) };
    let (record, rest) = copy.split_at(length);
    if !rest.starts_with(format!("{:016x}\n", checksum(record)).as_bytes()) {
        return Ok(None);
    }
    match record::parse::<Tree>(&spare, record) {
        Ok(tree) => Ok(Some(tree).filter(|tree| tree.check().is_ok())),
        Err(error @ Error::NewerFormat { .. }) => Err(error),
        Err(_) => Ok(None),
    }
}

/// Tells whether the file has the room that a record of a length needs.
pub(super) fn is_enough(directory: &Path, record: u64) -> bool {
    fs::symlink_metadata(path(directory)).is_ok_and(|metadata| metadata.is_file() && metadata.len() >= record)
}

/// Gives a checksum of a record, in the manner of FNV-1a and by eight bytes at a time: a copy that was half overwritten
/// is known by it.
fn checksum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let mix = |sum: u64, word: u64| (sum ^ word).wrapping_mul(0x0100_0000_01b3);
    let sum = words.iter().fold(0xcbf2_9ce4_8422_2325, |sum, word| mix(sum, u64::from_be_bytes(*word)));
    rest.iter().fold(sum, |sum, byte| mix(sum, u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::super::tree::Volume;
    use super::*;
    use crate::id::VolumeKey;

    fn tree(name: &str) -> Tree {
        Tree::of_one(VolumeKey::random(), Volume::new(name.to_owned(), String::new()), 1 << 20)
    }

    #[test]
    fn the_copy_is_of_the_last_record_and_never_of_two_halves() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(copy(dir.path()).unwrap(), None);
        for name in ["a\nb", &"long".repeat(3000), "short"] {
            let tree = tree(name);
            let bytes = record::encode(&tree).unwrap();
            reserve(dir.path(), bytes.len()).unwrap();
            keep_copy(dir.path(), &bytes);
            assert_eq!(copy(dir.path()).unwrap(), Some(tree));
        }
        let spare = path(dir.path());
        let whole = fs::read(&spare).unwrap();
        let newlines = whole.iter().enumerate().skip(whole.len() / 2).filter(|(_, byte)| **byte == b'\n');
        let end = newlines.map(|(at, _)| at + 1).nth(1).unwrap();
        for at in (whole.len() / 2..end).step_by(7) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x20;
            fs::write(&spare, damaged).unwrap();
            assert_eq!(copy(dir.path()).unwrap(), None, "{at}");
        }
    }

    #[test]
    fn a_copy_leaves_the_blocks_that_are_set_aside_alone() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = record::encode(&tree("x")).unwrap();
        reserve(dir.path(), bytes.len()).unwrap();
        keep_copy(dir.path(), &bytes);
        let spare = fs::read(path(dir.path())).unwrap();
        assert!(spare.len() == 8192 && spare[..4096].iter().all(|byte| *byte == 0));
        assert!(is_enough(dir.path(), bytes.len() as u64));
    }
}
