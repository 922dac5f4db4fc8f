//! All files below a directory, as they are at a moment.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What is read of a file that is not an image.
const WHOLE: u64 = 64 << 10;

/// What a file is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum File {
    Directory(u32),
    Link(PathBuf),
    Small(u32, Vec<u8>),
    Large(u32, u64, i64, i64),
    Other(u32),
}

/// Files by their paths.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Picture(BTreeMap<PathBuf, File>);

impl Picture {
    /// Takes a picture, without the files of these names: what any call may leave.
    pub fn of(directory: &Path, without: &[&str]) -> Self {
        let mut picture = Self::default();
        picture.add(directory, without);
        picture
    }

    fn add(&mut self, directory: &Path, without: &[&str]) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            let Ok(metadata) = entry.metadata() else { continue };
            if without.iter().any(|without| name == *without) {
                continue;
            }
            self.0.insert(path.clone(), file(&path, &metadata));
            if metadata.is_dir() {
                self.add(&path, without);
            }
        }
    }

    /// Says what is not as it was in another picture.
    pub fn differs_from(&self, before: &Self) -> Option<String> {
        let new = self.0.keys().find(|path| !before.0.contains_key(*path));
        let gone = before.0.keys().find(|path| !self.0.contains_key(*path));
        let other = self.0.iter().find(|(path, file)| before.0.get(*path).is_some_and(|old| old != *file));
        let told = |what: &str, path: &PathBuf| format!("{} {what}", path.display());
        new.map(|path| told("has appeared", path))
            .or_else(|| gone.map(|path| told("is gone", path)))
            .or_else(|| other.map(|(path, _)| told("was changed", path)))
    }
}

fn file(path: &Path, metadata: &Metadata) -> File {
    let mode = metadata.mode();
    match metadata.file_type() {
        kind if kind.is_dir() => File::Directory(mode),
        kind if kind.is_symlink() => File::Link(fs::read_link(path).unwrap_or_default()),
        kind if !kind.is_file() => File::Other(mode),
        _ if metadata.len() <= WHOLE => File::Small(mode, fs::read(path).unwrap_or_default()),
        _ => File::Large(mode, metadata.len(), metadata.mtime(), metadata.mtime_nsec()),
    }
}
