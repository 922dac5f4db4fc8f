//! A tree that was read, and one whose lock is held.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::ops::Deref;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::allocation::Allocation;
use super::blank::{Blank, Unit};
use super::header::Header;
use super::sr::{OLD, Sr};
use super::tree::{Change, Tree, Volume};
use super::{content, garbage, plan, spare};
use crate::error::{Error, Result};
use crate::id::{ContentId, NodeId, TreeId, VolumeKey};
use crate::lock::FileLock;
use crate::qemu::{Image, img};
use crate::record::{self, Durability};

/// How the name of a node's file ends.
pub(super) const NODE_SUFFIX: &str = ".qcow2";

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
    /// [`Error::Image`] for a file that is missing or not what it should be; [`Error::DataDestroyed`].
    pub fn chain_images(&self, key: VolumeKey) -> Result<Vec<Image>> {
        self.tree
            .chain(self.tree.volume_with_data(key)?.node)
            .into_iter()
            .map(|node| self.checked_image(node))
            .collect()
    }

    /// Tells whether a node's file has neither data nor zeroes of its own.
    ///
    /// # Errors
    ///
    /// As [`Self::chain_images`]; else its tables are damaged.
    pub(super) fn has_nothing_of_its_own(&self, node: NodeId) -> Result<bool> {
        Allocation::open(&self.checked_image(node)?)?.is_empty()
    }

    /// Makes a node's header name the parent that the record names, where it names another.
    ///
    /// # Errors
    ///
    /// When the header cannot be read, or not be changed.
    pub(super) fn relink_header(&self, node: NodeId, lock: &FileLock) -> Result<()> {
        let parent = self.tree.node(node)?.parent.map(file_name);
        let path = node_path(&self.directory, node);
        if Header::read(&path)?.check_backing(parent.as_deref()).is_err() {
            img::rebase(&path, parent.as_deref().unwrap_or_default(), Some(lock))?;
        }
        Ok(())
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
    sr: Sr,
    loaded: LoadedTree,
    pub(super) lock: FileLock,
}

impl Deref for LockedTree {
    type Target = LoadedTree;

    fn deref(&self) -> &LoadedTree {
        &self.loaded
    }
}

impl LockedTree {
    /// Joins a tree with its lock; the record was read after the lock was taken.
    pub(super) fn new(sr: Sr, loaded: LoadedTree, lock: FileLock) -> Self {
        Self { sr, loaded, lock }
    }

    /// Gives the SR that the tree is in.
    pub fn sr(&self) -> &Sr {
        &self.sr
    }

    /// Replaces the record: durable when this returns.
    ///
    /// A record that does not grow can be replaced on a full file system: blocks for it were set aside when it grew.
    ///
    /// # Errors
    ///
    /// When it cannot be written; the record is then as before, or where only the last sync failed, either.
    pub fn commit(&mut self, tree: Tree) -> Result<()> {
        self.replace(tree, Durability::Durable)
    }

    /// Replaces the record as [`Self::commit`] does, for a change that a power cut may undo for a few seconds more.
    ///
    /// # Errors
    ///
    /// As [`Self::commit`].
    pub fn commit_soon(&mut self, tree: Tree) -> Result<()> {
        self.replace(tree, Durability::Whole)
    }

    fn replace(&mut self, tree: Tree, durability: Durability) -> Result<()> {
        let tree = Tree { format: tree.needed_format(), ..tree };
        tree.check().map_err(|reason| Error::Internal(format!("a change would leave a wrong tree: {reason}")))?;
        let path = record_path(&self.loaded.directory);
        let bytes = record::encode(&tree)?;
        let before = fs::metadata(&path).map_err(Error::on("reading the state of", &path))?.len();
        let grows = bytes.len() as u64 > before;
        match spare::reserve(&self.loaded.directory, bytes.len()) {
            Err(error) if grows => return Err(error),
            _ => {}
        }
        match record::replace(&path, &bytes, durability) {
            Err(Error::NoSpace { .. }) if !grows => {
                record::replace_with(&spare::path(&self.loaded.directory), &path, &bytes)?;
                self.reserve_again(bytes.len());
            }
            result => result?,
        }
        spare::keep_copy(&self.loaded.directory, &bytes);
        self.loaded.tree = tree;
        Ok(())
    }

    /// Makes the copy of the record durable, where there is one: files are about to change so that an older one would tell
    /// wrong things of them.
    pub(super) fn sync_copy(&self) -> Result<()> {
        let path = spare::path(&self.directory);
        match File::open(&path).and_then(|file| file.sync_all()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::on("syncing", &path)(error)),
            _ => Ok(()),
        }
    }

    /// Sets blocks aside anew, where there are any: others wait for them too.
    fn reserve_again(&self, record: usize) {
        if let Err(error) = spare::reserve(&self.directory, record) {
            tracing::warn!(error = error.chain(), "the next call may not find space for its record");
        }
    }

    /// Changes a volume's record and commits it, unless nothing changed.
    ///
    /// # Errors
    ///
    /// As [`Self::commit`].
    pub fn update(&mut self, key: VolumeKey, change: impl FnOnce(&mut Volume)) -> Result<()> {
        let mut tree = self.tree.clone();
        change(tree.volume_mut(key)?);
        if tree == self.tree { Ok(()) } else { self.commit(tree) }
    }

    /// Makes the files of a change's nodes and the symlinks of its volumes, all durable, for a commit that names
    /// them.
    ///
    /// # Errors
    ///
    /// When one cannot be made; none is left then.
    pub fn prepare(&self, change: &Change) -> Result<()> {
        let made = self.make_files(change);
        if made.is_err() {
            self.sweep(change.volumes.keys().copied());
        }
        made
    }

    /// Gives the file of a node that a change adds.
    pub(super) fn image_of(&self, change: &Change, id: NodeId) -> Result<Image> {
        let node = change.nodes.get(&id).ok_or_else(|| Error::Internal(format!("node {id} is not in the change")))?;
        Ok(Image { node: id, path: node_path(&self.directory, id), virtual_size: node.virtual_size })
    }

    fn make_files(&self, change: &Change) -> Result<()> {
        let mut files = Vec::new();
        for (id, node) in &change.nodes {
            let path = node_path(&self.directory, *id);
            let backing = node.parent.map(file_name);
            let by_sector = match node.parent {
                Some(parent) => self.is_idle_move(change, *id) && self.is_blank(parent)?,
                None => false,
            };
            let unit = if by_sector { Unit::Sector } else { Unit::Cluster };
            let blank = Blank { virtual_size: node.virtual_size, backing: backing.as_deref(), unit };
            files.push((blank.write(&path)?, path));
        }
        change.volumes.keys().try_for_each(|key| self.sr.link(*key, self.id))?;
        // Only now, when everything is there: a journal takes it in one go.
        for (file, path) in &files {
            file.sync_all().map_err(Error::on("syncing", path))?;
        }
        if !files.is_empty() {
            record::sync_directory(&self.directory)?;
        }
        if change.volumes.is_empty() { Ok(()) } else { self.sr.sync_links() }
    }

    /// Tells whether a volume that nobody has active moves to a node. xapi snapshots a fresh disk before it activates
    /// it, when data is to come under it later (docs/xapi.md); nothing else needs to wait for a look at its images.
    fn is_idle_move(&self, change: &Change, node: NodeId) -> bool {
        let moves = change.moves.iter().find(|moves| moves.overlay == node);
        moves.and_then(|moves| self.tree.volumes.get(&moves.volume)).is_some_and(|volume| volume.active.is_empty())
    }

    /// Tells whether nothing was ever written to a node and those below it. An overlay on it may be composed with other
    /// data, and then has the sectors that were written to it and no others: what it lies on now must not get into it.
    fn is_blank(&self, node: NodeId) -> Result<bool> {
        // From the root, which is the first to have been written.
        for node in self.tree.chain(node).into_iter().rev() {
            // One that is not there yet is made by the same change.
            if !self.tree.nodes.contains_key(&node) || !self.has_nothing_of_its_own(node)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Carries out a change that no daemon has to take part in.
    ///
    /// # Errors
    ///
    /// When it cannot be done; nothing of it is left then.
    pub fn apply(&mut self, change: &Change) -> Result<()> {
        self.prepare(change)?;
        let mut after = plan::applied(&self.tree, change);
        content::frozen(&mut after, change, ContentId::random());
        let committed = self.commit(after);
        if committed.is_err() {
            self.sweep(change.volumes.keys().copied());
        }
        committed
    }

    /// Takes a volume that nobody has open back to what a snapshot of this tree holds; see [`plan::reverted`].
    ///
    /// # Errors
    ///
    /// When it cannot be done; the volume is then as before.
    pub fn revert(&mut self, key: VolumeKey, snapshot: VolumeKey) -> Result<()> {
        let again = self.scratch(key).is_some();
        self.empty_scratch(key, again)?;
        let overlay = NodeId::random();
        let after = plan::reverted(&self.tree, key, snapshot, overlay)?;
        let node = after.node(overlay)?.clone();
        let made = Change { nodes: BTreeMap::from([(overlay, node)]), ..Change::default() };
        self.prepare(&made)?;
        let mut after = self.without_files(after);
        content::frozen(&mut after, &made, ContentId::random());
        let committed = self.commit(after);
        self.sweep([]);
        committed
    }

    /// Removes the data of a volume that nobody has open; what it changed stays known, and data that other volumes lie
    /// on stays with them.
    ///
    /// # Errors
    ///
    /// When it cannot be done; the volume is then as before.
    pub fn destroy_data(&mut self, key: VolumeKey) -> Result<()> {
        let mut after = plan::data_destroyed(&self.tree, key)?;
        let recorded = loop {
            let Some(node) = plan::next_past(&after) else {
                break Ok(());
            };
            if let Err(error) = self.keep_changes(&after, node) {
                break Err(error);
            }
            after = plan::only_past(&after, node)?;
        };
        let committed = recorded.and_then(|()| self.commit(after));
        self.sweep([]);
        committed
    }

    /// Takes the files out of a planned tree that it has only for what they changed; that is recorded first. A file of
    /// which it cannot be stays, for the next time.
    pub(super) fn without_files(&self, mut after: Tree) -> Tree {
        while let Some(node) = plan::next_past(&after) {
            let kept = self.keep_changes(&after, node).and_then(|()| plan::only_past(&after, node));
            match kept {
                Ok(next) => after = next,
                Err(error) => {
                    tracing::warn!(error = error.chain(), %node, "a node's file is kept for what it changed");
                    break;
                }
            }
        }
        after
    }

    /// Makes sure that what a node changed is known without its file.
    fn keep_changes(&self, after: &Tree, node: NodeId) -> Result<()> {
        if after.history.contains_key(&node) { Ok(()) } else { self.record_changes(node) }
    }

    /// Gives a volume a new empty overlay if others lie on its node, so that the volume can be written to.
    ///
    /// # Errors
    ///
    /// When it cannot be done; nothing of it is left then.
    pub fn make_writable(&mut self, key: VolumeKey) -> Result<()> {
        if !self.tree.is_frozen(self.tree.volume_with_data(key)?.node) {
            return Ok(());
        }
        let change = plan::overlay(&self.tree, key, NodeId::random(), None)?;
        self.apply(&change)
    }

    /// Removes a volume, the nodes that nothing needs any more, and with the last volume the tree.
    ///
    /// # Errors
    ///
    /// When the volume cannot be removed. Once it is gone from the record, what cannot be removed is left for later.
    pub fn destroy(mut self, key: VolumeKey) -> Result<()> {
        match plan::destroyed(&self.tree, key)? {
            Some(after) => {
                let after = self.without_files(after);
                self.commit(after)?;
                self.sweep([key]);
            }
            None => {
                self.remove_tree()?;
                garbage::unlink(&self.sr, key);
            }
        }
        Ok(())
    }

    /// Removes the whole tree; its record has no volume then.
    pub(super) fn remove_tree(&mut self) -> Result<()> {
        let trees = self.sr.trees();
        let old = trees.join(format!("{OLD}{}", self.id));
        fs::rename(&self.directory, &old).map_err(Error::on("renaming", &self.directory))?;
        self.loaded.tree.volumes.clear();
        record::sync_directory(&trees)?;
        if let Err(error) = record::remove_directory(&old) {
            tracing::warn!(%error, path = %old.display(), "the files of a removed tree are left for later");
        }
        Ok(())
    }

    /// Removes what the record on disk does not name: files of this tree, and the symlinks of the volumes given.
    ///
    /// The record is read again: after a commit that failed in its last step it may be the new one. What cannot be
    /// removed is left for later.
    pub fn sweep(&self, volumes: impl IntoIterator<Item = VolumeKey>) {
        let swept = read(&self.directory).and_then(|tree| match tree {
            Some(tree) => garbage::sweep_tree(&self.sr, &self.directory, &tree, volumes),
            None => Ok(()),
        });
        if let Err(error) = swept {
            tracing::warn!(error = error.chain(), tree = %self.id, "garbage is left for later");
        }
    }
}

/// Reads the record in a tree's directory; `None` when the directory is gone.
pub(super) fn read(directory: &Path) -> Result<Option<Tree>> {
    let path = record_path(directory);
    match record::read_if_present::<Tree>(&path)? {
        Some(tree) => match tree.check() {
            Ok(()) => Ok(Some(tree)),
            Err(reason) => Err(Error::DamagedRecord { path, reason }),
        },
        None if directory.exists() => {
            Err(Error::DamagedRecord { path, reason: "the file does not exist".to_owned() })
        }
        None => Ok(None),
    }
}

/// Writes the record of a new tree, which nobody reads yet, and gives it to be synced.
pub(super) fn write_first(directory: &Path, tree: &Tree) -> Result<File> {
    tree.check().map_err(|reason| Error::Internal(format!("a new tree is wrong: {reason}")))?;
    let bytes = record::encode(tree)?;
    spare::reserve(directory, bytes.len())?;
    spare::keep_copy(directory, &bytes);
    let path = record_path(directory);
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(&path).map_err(Error::on("creating", &path))?;
    (&file).write_all(&bytes).map_err(Error::on("writing", &path))?;
    Ok(file)
}

/// Gives the path of a tree's record.
pub(super) fn record_path(directory: &Path) -> PathBuf {
    directory.join("tree.json")
}

/// Gives the name of a node's file.
pub(super) fn file_name(node: NodeId) -> String {
    format!("{node}{NODE_SUFFIX}")
}

/// Gives the path of a node's file.
pub(super) fn node_path(directory: &Path, node: NodeId) -> PathBuf {
    directory.join(file_name(node))
}
