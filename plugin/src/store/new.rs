//! A tree that is being made: invisible until the rename that commits it.

use std::fs;
use std::io;
use std::path::PathBuf;

use super::garbage;
use super::locked::{self, LoadedTree, node_path};
use super::sr::{NEW, OLD, Sr, make_directory};
use super::tree::Tree;
use crate::error::{Error, Result};
use crate::id::{TreeId, VolumeKey};
use crate::lock::FileLock;
use crate::qemu::img;
use crate::record;

/// A tree's directory `trees/.new-<tree>`, with its lock held; removed again unless it is committed.
#[derive(Debug)]
pub struct NewTree<'sr> {
    sr: &'sr Sr,
    id: TreeId,
    /// Where the directory is now, while it is there.
    directory: Option<PathBuf>,
    /// The symlinks that were made.
    linked: Vec<VolumeKey>,
    lock: FileLock,
}

impl<'sr> NewTree<'sr> {
    /// Makes the directory of a tree with a new id.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn begin(sr: &'sr Sr) -> Result<Self> {
        loop {
            let id = TreeId::random();
            let directory = sr.trees().join(format!("{NEW}{id}"));
            make_directory(&directory).map_err(|error| sr.or_gone(error))?;
            match FileLock::try_acquire(&directory.join("lock")) {
                Ok(Some(lock)) => {
                    return Ok(Self { sr, id, directory: Some(directory), linked: Vec::new(), lock });
                }
                // Whoever removes garbage came between the two steps: it takes the directory.
                Ok(None) => {}
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    drop(fs::remove_dir_all(&directory));
                    return Err(error);
                }
            }
        }
    }

    /// Makes the file of the tree's one node and puts the tree in place, durably: from here on its volume exists.
    ///
    /// # Errors
    ///
    /// When a step fails; nothing is left of it then.
    pub fn commit(mut self, tree: Tree) -> Result<LoadedTree> {
        let Some(made) = self.directory.clone() else {
            return Err(Error::Internal("a tree was committed twice".to_owned()));
        };
        for (id, node) in &tree.nodes {
            img::create(&node_path(&made, *id), node.virtual_size, Some(&self.lock))?;
        }
        locked::write_first(&made, &tree)?;
        for key in tree.volumes.keys() {
            self.linked.push(*key);
            self.sr.link(*key, self.id)?;
        }
        let directory = self.sr.tree_directory(self.id);
        fs::rename(&made, &directory).map_err(Error::on("renaming", &made))?;
        self.directory = Some(directory.clone());
        record::sync_directory(&self.sr.trees())?;
        // It is committed: nothing is to be undone.
        self.directory = None;
        Ok(LoadedTree { id: self.id, directory, tree })
    }
}

impl Drop for NewTree<'_> {
    fn drop(&mut self) {
        let Some(directory) = self.directory.take() else {
            return;
        };
        // A tree that was put in place, but perhaps not durably, is taken away by a rename like any other.
        let old = self.sr.trees().join(format!("{OLD}{}", self.id));
        let removed = fs::rename(&directory, &old).and_then(|()| fs::remove_dir_all(&old));
        if let Err(error) = removed {
            tracing::warn!(%error, tree = %self.id, "a tree that was not finished could not be removed");
        }
        for key in self.linked.drain(..) {
            garbage::unlink(self.sr, key);
        }
    }
}
