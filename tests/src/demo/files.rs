//! Real files of this machine to fill a disk with, a share for each step.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

/// Where real files are looked for; programs are on every machine.
const PLACES: [&str; 4] = ["/usr/bin", "/usr/sbin", "/usr/lib", "/usr/share"];
/// Larger files would fill a share alone, smaller ones would be too many.
const SIZES: std::ops::RangeInclusive<u64> = 8 << 10..=4 << 20;
/// How many directories are looked into at most.
const DIRECTORIES: usize = 400;

/// Files that have not been handed out yet.
#[derive(Debug)]
pub struct Pool {
    files: std::vec::IntoIter<(PathBuf, u64)>,
}

impl Pool {
    /// Finds files of at least so many bytes together.
    ///
    /// # Errors
    /// If the machine has not that many.
    pub fn find(bytes: u64) -> Result<Self> {
        let mut files = Vec::new();
        let mut found = 0;
        let mut waiting: std::collections::VecDeque<PathBuf> = PLACES.iter().map(PathBuf::from).collect();
        let mut visited = 0;
        while let Some(directory) = waiting.pop_front() {
            visited += 1;
            if found >= bytes || visited > DIRECTORIES {
                break;
            }
            for path in sorted(&directory) {
                let Ok(metadata) = std::fs::symlink_metadata(&path) else { continue };
                if metadata.is_dir() {
                    waiting.push_back(path);
                } else if metadata.is_file() && SIZES.contains(&metadata.len()) && std::fs::File::open(&path).is_ok()
                {
                    found += metadata.len();
                    files.push((path, metadata.len()));
                }
            }
        }
        ensure!(found >= bytes, "only {found} bytes of real files found below {PLACES:?}, {bytes} are needed");
        Ok(Self { files: files.into_iter() })
    }

    /// Hands out files of about so many bytes, each once.
    ///
    /// # Errors
    /// If there are none left.
    pub fn take(&mut self, bytes: u64) -> Result<Vec<PathBuf>> {
        let mut share = Vec::new();
        let mut taken = 0;
        while taken < bytes {
            let Some((path, size)) = self.files.next() else { break };
            taken += size;
            share.push(path);
        }
        ensure!(!share.is_empty(), "the real files are used up");
        Ok(share)
    }
}

fn sorted(directory: &Path) -> BTreeSet<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
}
