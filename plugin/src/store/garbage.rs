//! What nothing names any more: found and removed, whoever was killed before removing it.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::changed::CHANGED_SUFFIX;
use super::coalesce;
use super::locked::{LockedTree, NODE_SUFFIX, read};
use super::sr::{NEW, OLD, Sr};
use super::tree::Tree;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::id::{NodeId, TreeId, VolumeKey};
use crate::lock::FileLock;
use crate::record;

impl Sr {
    /// Finishes what killed calls began, and removes the garbage of the whole SR: files that no record names,
    /// directories of trees that were never finished or are gone, symlinks of volumes that do not exist.
    ///
    /// The caller holds the SR's lock. A tree that is locked is left alone: whoever holds its lock removes its own
    /// garbage. What cannot be removed is logged and left. Tells whether a tree has nodes that could be merged.
    ///
    /// # Errors
    ///
    /// When the SR's directories cannot be listed.
    pub fn sweep(&self, host: &Host, _lock: &FileLock) -> Result<bool> {
        self.sweep_records()?;
        let trees = self.trees();
        let mut has_merges = false;
        for entry in self.entries(&trees)? {
            let name = entry.map_err(Error::on("listing", &trees))?.file_name();
            let Some(name) = name.to_str() else {
                continue;
            };
            let directory = trees.join(name);
            let swept = if name.starts_with(NEW) || name.starts_with(OLD) {
                remove_abandoned(&directory).map(|()| false)
            } else if let Ok(id) = name.parse() {
                self.sweep_unlocked(host, id)
            } else {
                Ok(false)
            };
            match swept {
                Ok(found) => has_merges |= found,
                Err(error) => {
                    tracing::warn!(error = error.chain(), path = %directory.display(), "garbage is left for later");
                }
            }
        }
        self.sweep_links().map(|()| has_merges)
    }

    /// Removes records of the SR itself that were not finished.
    fn sweep_records(&self) -> Result<()> {
        for entry in self.entries(&self.path)? {
            let entry = entry.map_err(Error::on("listing", &self.path))?;
            if entry.file_name().as_bytes().starts_with(record::TEMPORARY.as_bytes()) {
                fs::remove_file(entry.path()).map_err(Error::on("removing", entry.path()))?;
            }
        }
        Ok(())
    }

    /// Finishes what was begun in a tree and removes its garbage, unless it is locked or gone. Tells whether it has nodes
    /// that could be merged.
    fn sweep_unlocked(&self, host: &Host, id: TreeId) -> Result<bool> {
        let directory = self.tree_directory(id);
        let Some(lock) = try_lock(&directory)? else {
            return Ok(false);
        };
        let Some(loaded) = self.read_tree(id)? else {
            return Ok(false);
        };
        let mut tree = LockedTree::new(self.clone(), loaded, lock);
        tree.finish(host)?;
        // Its last volume may have been on its way to another tree.
        if tree.tree.volumes.is_empty() {
            return Ok(false);
        }
        sweep_tree(self, &directory, &tree.tree, []).map(|()| tree.has_merges())
    }

    /// Removes symlinks that lead to no volume.
    fn sweep_links(&self) -> Result<()> {
        let volumes = self.path.join("volumes");
        for entry in self.entries(&volumes)? {
            let name = entry.map_err(Error::on("listing", &volumes))?.file_name();
            if name.as_bytes().starts_with(record::TEMPORARY.as_bytes()) {
                drop(fs::remove_file(volumes.join(&name)));
            }
            let Some(key) = name.to_str().and_then(|name| name.parse::<VolumeKey>().ok()) else {
                continue;
            };
            match self.is_dangling(key) {
                Ok(true) => unlink(self, key),
                Ok(false) => {}
                Err(error) => tracing::warn!(error = error.chain(), volume = %key, "a symlink is left"),
            }
        }
        Ok(())
    }

    /// Tells whether a symlink leads to no volume and none is being made for it.
    pub(super) fn is_dangling(&self, key: VolumeKey) -> Result<bool> {
        let Some(id) = self.tree_of(key)? else {
            return Ok(false);
        };
        // A new tree is looked for under its first name first: the rename goes from there to the other.
        if self.trees().join(format!("{NEW}{id}")).exists() {
            return Ok(false);
        }
        let directory = self.tree_directory(id);
        if !directory.exists() {
            return Ok(true);
        }
        let Some(_lock) = try_lock(&directory)? else {
            return Ok(false);
        };
        Ok(read(&directory)?.is_some_and(|tree| !tree.referenced_volumes().contains(&key)))
    }
}

/// Removes what a locked tree's record does not name: node files and unfinished records in its directory, and the
/// symlinks of the volumes given.
pub(super) fn sweep_tree(
    sr: &Sr,
    directory: &Path,
    tree: &Tree,
    volumes: impl IntoIterator<Item = VolumeKey>,
) -> Result<()> {
    let nodes = tree.referenced_nodes();
    for entry in fs::read_dir(directory).map_err(Error::on("listing", directory))? {
        let name = entry.map_err(Error::on("listing", directory))?.file_name();
        let Some(name) = name.to_str() else {
            continue;
        };
        let node = name.strip_suffix(NODE_SUFFIX).and_then(|id| id.parse::<NodeId>().ok());
        let past = name.strip_suffix(CHANGED_SUFFIX).and_then(|id| id.parse::<NodeId>().ok());
        if node.is_some_and(|id| !nodes.contains(&id))
            || past.is_some_and(|id| !tree.history.contains_key(&id))
            || name.starts_with(record::TEMPORARY)
            // A marker is taken out only once nobody copies any more.
            || (tree.merge.is_none() && coalesce::FILES.contains(&name))
        {
            record::remove(&directory.join(name))?;
        }
    }
    let referenced = tree.referenced_volumes();
    volumes.into_iter().filter(|key| !referenced.contains(key)).for_each(|key| unlink(sr, key));
    Ok(())
}

/// Removes a volume's symlink; one that cannot be removed is left for later.
pub(super) fn unlink(sr: &Sr, key: VolumeKey) {
    if let Err(error) = sr.unlink(key) {
        tracing::warn!(error = error.chain(), volume = %key, "a symlink is left for later");
    }
}

/// Removes the directory of a tree that is not one, or no longer, unless somebody is at work in it.
fn remove_abandoned(directory: &Path) -> Result<()> {
    let Some(lock) = try_lock(directory)? else {
        return Ok(());
    };
    for entry in fs::read_dir(directory).map_err(Error::on("listing", directory))? {
        let path = entry.map_err(Error::on("listing", directory))?.path();
        if path != lock.path() {
            fs::remove_file(&path).map_err(Error::on("removing", &path))?;
        }
    }
    // The lock goes last. Who took a new one in the directory meanwhile keeps the directory by that.
    fs::remove_file(lock.path()).map_err(Error::on("removing", lock.path()))?;
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        result => result.map_err(Error::on("removing", directory)),
    }
}

/// Takes the lock in a tree's directory, unless somebody holds it or the directory is gone.
fn try_lock(directory: &Path) -> Result<Option<FileLock>> {
    match FileLock::try_acquire(&directory.join("lock")) {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result,
    }
}
