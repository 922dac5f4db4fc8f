//! A tree that is being made: invisible until the rename that commits it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::blank::{Blank, Unit};
use super::garbage;
use super::locked::{self, LoadedTree, file_name, node_path};
use super::sr::{NEW, OLD, Sr, make_directory};
use super::tree::Tree;
use crate::error::{Error, Result};
use crate::id::{NodeId, TreeId, VolumeKey};
use crate::lock::FileLock;
use crate::qemu::{Image, img};
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
    pub fn commit(self, tree: Tree) -> Result<LoadedTree> {
        self.commit_filled(tree, |_, _| Ok(()))
    }

    /// Puts the tree in place as [`Self::commit`] does; `fill` fills the blank file of its one node first, durably.
    ///
    /// # Errors
    ///
    /// When a step fails; nothing is left of it then.
    pub fn commit_filled(self, tree: Tree, fill: impl Fn(&Path, &FileLock) -> Result<()>) -> Result<LoadedTree> {
        let made = self.directory()?;
        let mut files = Vec::new();
        for (id, node) in &tree.nodes {
            let path = node_path(&made, *id);
            let blank = Blank { virtual_size: node.virtual_size, backing: None, unit: Unit::Cluster };
            files.push(blank.write(&path)?);
            fill(&path, &self.lock)?;
        }
        self.put_in_place(made, tree, &files)
    }

    /// Puts a tree in place whose one volume is a copy of a chain, given with the new nodes in its order; the new files
    /// share the blocks of the old ones. False, and nothing is left, where the file system cannot do that.
    ///
    /// The caller sees to it that nobody writes to the chain.
    ///
    /// # Errors
    ///
    /// When a step fails; nothing is left of it then.
    pub fn commit_shared(self, tree: Tree, images: &[Image], nodes: &[NodeId]) -> Result<bool> {
        let made = self.directory()?;
        for (image, id) in images.iter().zip(nodes) {
            if !share(&image.path, &node_path(&made, *id))? {
                return Ok(false);
            }
        }
        for (id, node) in &tree.nodes {
            if let Some(parent) = node.parent {
                img::rebase(&node_path(&made, *id), &file_name(parent), Some(&self.lock))?;
            }
        }
        self.put_in_place(made, tree, &[]).map(|_| true)
    }

    fn directory(&self) -> Result<PathBuf> {
        self.directory.clone().ok_or_else(|| Error::Internal("a tree was committed twice".to_owned()))
    }

    /// Writes the record, and renames the directory once that, its files and all names in it are durable.
    fn put_in_place(mut self, made: PathBuf, tree: Tree, files: &[File]) -> Result<LoadedTree> {
        let record = locked::write_first(&made, &tree)?;
        for key in tree.volumes.keys() {
            self.linked.push(*key);
            self.sr.link(*key, self.id)?;
        }
        // Only now, when everything is there: a journal takes it in one go.
        for file in files.iter().chain([&record]) {
            file.sync_all().map_err(Error::on("syncing what is in", &made))?;
        }
        record::sync_directory(&made)?;
        self.sr.sync_links()?;
        let directory = self.sr.tree_directory(self.id);
        fs::rename(&made, &directory).map_err(Error::on("renaming", &made))?;
        self.directory = Some(directory.clone());
        record::sync_directory(&self.sr.trees())?;
        // It is committed: nothing is to be undone.
        self.directory = None;
        Ok(LoadedTree { id: self.id, directory, tree })
    }
}

/// Makes a file that shares all blocks of another, durably; false where the file system cannot.
fn share(from: &Path, to: &Path) -> Result<bool> {
    let source = File::open(from).map_err(Error::on("opening", from))?;
    let mut options = OpenOptions::new();
    let target = options.write(true).create_new(true).mode(0o600).open(to).map_err(Error::on("creating", to))?;
    match rustix::fs::ioctl_ficlone(&target, &source) {
        // Another file system, one without the call, and one that cannot share these blocks.
        Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL | Errno::NOSYS) => Ok(false),
        Err(error) => Err(Error::on("sharing the blocks of", from)(error)),
        Ok(()) => target.sync_all().map(|()| true).map_err(Error::on("syncing", to)),
    }
}

impl Drop for NewTree<'_> {
    fn drop(&mut self) {
        let Some(directory) = self.directory.take() else {
            return;
        };
        // A tree that was put in place, but perhaps not durably, is taken away by a rename like any other.
        let old = self.sr.trees().join(format!("{OLD}{}", self.id));
        let removed = fs::rename(&directory, &old).and_then(|()| record::remove_directory(&old));
        if let Err(error) = removed {
            tracing::warn!(%error, tree = %self.id, "a tree that was not finished could not be removed");
        }
        for key in self.linked.drain(..) {
            garbage::unlink(self.sr, key);
        }
    }
}
