//! A tree that is being made: invisible until the rename that commits it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::image::Image;
use super::locked::{LoadedTree, node_path, record_path};
use super::sr::{NEW, OLD, Sr, make_directory};
use super::tree::Tree;
use crate::error::{Error, Result};
use crate::id::{NodeId, TreeId};
use crate::lock::FileLock;
use crate::record::{self, Durability};

/// A tree's directory `trees/.new-<tree>`, with its lock held; removed again unless it is committed.
#[derive(Debug)]
pub struct NewTree<'sr> {
    sr: &'sr Sr,
    id: TreeId,
    /// Where the directory is now, while it is there.
    directory: Option<PathBuf>,
    /// The symlinks that were made.
    tree: Option<Tree>,
    _lock: FileLock,
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
                Ok(Some(lock)) => return Ok(Self { sr, id, directory: Some(directory), tree: None, _lock: lock }),
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

    /// Gives the file of a node that is to be made.
    pub fn image(&self, node: NodeId, virtual_size: u64) -> Image {
        let directory = self.directory.as_deref().unwrap_or(Path::new(""));
        Image { node, path: node_path(directory, node), virtual_size }
    }

    /// Puts the tree in place, durably: from here on its volumes exist. Its nodes' files are on disk already.
    ///
    /// # Errors
    ///
    /// When a step fails; nothing is left of it then.
    pub fn commit(mut self, tree: Tree) -> Result<LoadedTree> {
        tree.check().map_err(|reason| Error::Internal(format!("a new tree is wrong: {reason}")))?;
        let Some(made) = self.directory.clone() else {
            return Err(Error::Internal("a tree was committed twice".to_owned()));
        };
        record::write(&record_path(&made), &tree, Durability::Durable)?;
        for key in tree.volumes.keys() {
            self.tree = Some(tree.clone());
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
        for key in self.tree.iter().flat_map(|tree| tree.volumes.keys()) {
            if let Err(error) = self.sr.unlink(*key) {
                tracing::warn!(error = error.chain(), volume = %key, "a symlink could not be removed");
            }
        }
    }
}
