//! A tree that was read, and one whose lock is held.

use std::ops::Deref;
use std::path::{Path, PathBuf};

use super::header::Header;
use super::image::Image;
use super::sr::checked;
use super::tree::{Tree, Volume};
use crate::error::{Error, Result};
use crate::id::{NodeId, TreeId, VolumeKey};
use crate::lock::FileLock;
use crate::record::{self, Durability};

/// A tree as it was when its record was read.
#[derive(Clone, Debug)]
pub struct LoadedTree {
    /// The tree.
    pub id: TreeId,
    /// Its directory.
    pub directory: PathBuf,
    /// Its record.
    pub tree: Tree,
}

impl LoadedTree {
    /// Finds a volume.
    ///
    /// # Errors
    ///
    /// [`Error::VolumeDoesNotExist`].
    pub fn volume(&self, key: VolumeKey) -> Result<&Volume> {
        self.tree.volume(key)
    }

    /// Gives a node's file, unread.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] for a node of another tree.
    pub fn image(&self, node: NodeId) -> Result<Image> {
        let virtual_size = self.tree.node(node)?.virtual_size;
        Ok(Image { node, path: node_path(&self.directory, node), virtual_size })
    }

    /// Gives the files that a guest of a volume reads, the volume's own first and the root's last, each with its
    /// header checked: acceptable, and with the size and the backing string that the record gives it.
    ///
    /// # Errors
    ///
    /// [`Error::Image`] for a file that is missing or not what it should be.
    pub fn chain_images(&self, key: VolumeKey) -> Result<Vec<Image>> {
        self.tree.chain(self.volume(key)?.node).into_iter().map(|node| self.checked_image(node)).collect()
    }

    /// Gives a node's file with its header checked.
    ///
    /// # Errors
    ///
    /// As [`Self::chain_images`].
    pub fn checked_image(&self, node: NodeId) -> Result<Image> {
        let image = self.image(node)?;
        let refused = |reason: String| Error::Image { path: image.path.clone(), reason };
        let header = Header::read(&image.path)?;
        let parent = self.tree.node(node)?.parent.map(file_name);
        header.check_backing(parent.as_deref()).map_err(refused)?;
        if header.virtual_size != image.virtual_size {
            return Err(refused(format!(
                "its header has the size {}, the tree's record {}",
                header.virtual_size, image.virtual_size
            )));
        }
        Ok(image)
    }
}

/// A tree whose lock is held: its record stays what it is but for [`Self::commit`].
#[derive(Debug)]
pub struct LockedTree {
    loaded: LoadedTree,
    _lock: FileLock,
}

impl Deref for LockedTree {
    type Target = LoadedTree;

    fn deref(&self) -> &LoadedTree {
        &self.loaded
    }
}

impl LockedTree {
    /// Joins a tree with its lock; the record was read after the lock was taken.
    pub(super) fn new(loaded: LoadedTree, lock: FileLock) -> Self {
        Self { loaded, _lock: lock }
    }

    /// Replaces the record: durable when this returns.
    ///
    /// # Errors
    ///
    /// When it cannot be written; the record is then as before, or where only the last sync failed, either.
    pub fn commit(&mut self, tree: Tree) -> Result<()> {
        tree.check().map_err(|reason| Error::Internal(format!("a change would leave a wrong tree: {reason}")))?;
        record::write(&record_path(&self.loaded.directory), &tree, Durability::Durable)?;
        self.loaded.tree = tree;
        Ok(())
    }
}

/// Reads the record in a tree's directory; `None` when the directory is gone.
pub(super) fn read(directory: &Path) -> Result<Option<Tree>> {
    let path = record_path(directory);
    match record::read_if_present(&path)? {
        Some(tree) => checked(&path, tree).map(Some),
        None if directory.exists() => {
            Err(Error::DamagedRecord { path, reason: "the file does not exist".to_owned() })
        }
        None => Ok(None),
    }
}

/// Gives the path of a tree's record.
pub(super) fn record_path(directory: &Path) -> PathBuf {
    directory.join("tree.json")
}

/// Gives the name of a node's file.
pub(super) fn file_name(node: NodeId) -> String {
    format!("{node}.qcow2")
}

/// Gives the path of a node's file.
pub(super) fn node_path(directory: &Path, node: NodeId) -> PathBuf {
    directory.join(file_name(node))
}
