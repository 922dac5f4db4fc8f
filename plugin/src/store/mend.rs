//! What can be put right in an SR without doubt, under its locks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::changed::CHANGED_SUFFIX;
use super::examine::is_open_to_others;
use super::garbage;
use super::header::Header;
use super::locked::{LoadedTree, LockedTree, NODE_SUFFIX, file_name, node_path, record_path};
use super::rebuild::{Rebuilt, Remains, format_of_torn, rebuild, volumes_of_torn};
use super::spare;
use super::sr::{Sr, make_directory};
use super::tree::{Node, Tree};
use crate::attachment::Attachment;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::id::{NodeId, TreeId, VolumeKey};
use crate::lock::FileLock;
use crate::record::{self, Durability, Record};

/// What stands behind the name of a record that was replaced by one made anew; numbered where there are more.
pub(super) const DAMAGED: &str = ".damaged";

impl Sr {
    /// Makes the record of a tree anew that is lost or torn; `None` where it can be read. What was there is kept beside it.
    ///
    /// # Errors
    ///
    /// [`Error::DamagedRecord`] with why it cannot be done; [`Error::NewerFormat`], for what a newer version of this
    /// program wrote is not replaced.
    pub fn rebuild_tree(&self, host: &Host, id: TreeId) -> Result<Option<Rebuilt>> {
        let directory = self.tree_directory(id);
        let lock = FileLock::acquire(&directory.join("lock"), host.settings()?.lock())?;
        match self.read_tree(id) {
            Ok(_) => return Ok(None),
            Err(Error::DamagedRecord { .. }) => {}
            Err(error) => return Err(error),
        }
        let path = record_path(&directory);
        let refused = |reason: String| Error::DamagedRecord { path: path.clone(), reason };
        let remains = self.remains(host, id, &directory)?;
        let rebuilt = rebuild(&remains).map_err(|reason| refused(format!("it cannot be made anew: {reason}")))?;
        let this = host.uuid()?;
        let elsewhere =
            rebuilt.tree.volumes.values().flat_map(|volume| &volume.active).find(|claim| claim.host != this);
        if let Some(claim) = elsewhere.filter(|_| !rebuilt.is_exact) {
            return Err(refused(format!(
                "it cannot be made anew while host {} has a volume of it active: which node that writes to is not known",
                claim.host
            )));
        }
        rebuilt
            .tree
            .volumes
            .keys()
            .filter(|key| !remains.linked.contains(key))
            .try_for_each(|key| self.link(*key, id))?;
        self.sync_links()?;
        keep_aside(&path)?;
        let bytes = record::encode(&rebuilt.tree)?;
        record::replace(&path, &bytes, Durability::Durable)?;
        spare::reserve(&directory, bytes.len())?;
        spare::keep_copy(&directory, &bytes);
        drop(lock);
        Ok(Some(rebuilt))
    }

    /// Gathers what is left of a tree.
    fn remains(&self, host: &Host, id: TreeId, directory: &Path) -> Result<Remains> {
        let mut remains = Remains { copy: spare::copy(directory)?, ..Remains::default() };
        let path = record_path(directory);
        let torn = fs::read(&path).unwrap_or_default();
        if let Some(found) = format_of_torn(&torn).filter(|format| *format > Tree::FORMAT) {
            return Err(Error::NewerFormat { path, found, known: Tree::FORMAT });
        }
        remains.torn = volumes_of_torn(&torn);
        for entry in fs::read_dir(directory).map_err(Error::on("listing", directory))? {
            let name = entry.map_err(Error::on("listing", directory))?.file_name();
            let Some(name) = name.to_str() else { continue };
            let id = |suffix| name.strip_suffix(suffix).and_then(|id| id.parse::<NodeId>().ok());
            remains.pasts.extend(id(CHANGED_SUFFIX));
            let Some(node) = id(NODE_SUFFIX) else { continue };
            match node_of(&node_path(directory, node)) {
                Some(found) => drop(remains.nodes.insert(node, found)),
                None => drop(remains.unreadable.insert(node)),
            }
        }
        for key in self.linked()? {
            if matches!(self.tree_of(key), Ok(Some(tree)) if tree == id) {
                remains.linked.insert(key);
            }
        }
        remains.open = self.written_here(host, &remains)?;
        Ok(remains)
    }

    /// Gives the node that each volume of a tree is written to by a daemon of this host.
    fn written_here(&self, host: &Host, remains: &Remains) -> Result<BTreeMap<VolumeKey, NodeId>> {
        let mut open = BTreeMap::new();
        for key in Attachment::volumes(host)? {
            let Some(seen) = Attachment::seen(host, key)?.filter(|seen| seen.uri.sr == self.record.uuid) else {
                continue;
            };
            let top = seen.open.and_then(|open| open.nodes.first().copied());
            open.extend(top.filter(|node| remains.nodes.contains_key(node)).map(|node| (key, node)));
        }
        Ok(open)
    }

    /// Puts right in a tree what leaves no doubt: finishes what was begun, makes symlinks anew, removes garbage, sets
    /// blocks aside, takes files from others, and makes headers say what the record says where no volume is active.
    ///
    /// # Errors
    ///
    /// The first step that fails; those after it are done all the same.
    pub fn mend_tree(&self, host: &Host, id: TreeId) -> Result<()> {
        let directory = self.tree_directory(id);
        let lock = match FileLock::acquire(&directory.join("lock"), host.settings()?.lock()) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => result?,
        };
        let Some(loaded) = self.read_tree(id)? else { return Ok(()) };
        let mut tree = LockedTree::new(self.clone(), loaded, lock);
        let finished = tree.finish(host);
        if tree.tree.volumes.is_empty() {
            return finished;
        }
        // No file is to be written to meanwhile.
        tree.stop_merge(host)?;
        let linked = self.mend_links(&tree);
        let swept = garbage::sweep_tree(self, &directory, &tree.tree, []);
        let closed = close_to_others(&tree);
        let rebased = mend_headers(host, &tree);
        let bytes = record::encode(&tree.tree)?;
        let reserved = spare::reserve(&directory, bytes.len());
        spare::keep_copy(&directory, &bytes);
        finished.and(linked).and(swept).and(closed).and(rebased).and(reserved)
    }

    /// Makes the symlinks of a locked tree's volumes lead to it.
    fn mend_links(&self, tree: &LockedTree) -> Result<()> {
        make_directory(&self.path.join("volumes"))?;
        let begun: BTreeSet<VolumeKey> = tree.tree.intent.iter().filter_map(|intent| intent.volume()).collect();
        for key in tree.tree.volumes.keys().filter(|key| !begun.contains(key)) {
            match self.tree_of(*key) {
                Ok(Some(found)) if found == tree.id => {}
                Ok(None) => self.link(*key, tree.id)?,
                // Where another tree has it too, which of them is right is not for this to say.
                Ok(Some(found)) => match self.read_tree(found)? {
                    Some(other) if other.tree.volumes.contains_key(key) => {}
                    _ => self.relink(*key, tree.id)?,
                },
                Err(Error::DamagedRecord { .. }) => self.relink(*key, tree.id)?,
                Err(error) => return Err(error),
            }
        }
        self.sync_links()
    }

    /// Tells whether the symlinks of a tree's volumes all lead to it.
    pub fn has_links(&self, loaded: &LoadedTree) -> bool {
        loaded.tree.volumes.keys().all(|key| matches!(self.tree_of(*key), Ok(Some(id)) if id == loaded.id))
    }

    /// Removes what is left over in the SR outside its trees: directories of trees that are gone or were never finished,
    /// and symlinks that lead to no volume.
    ///
    /// # Errors
    ///
    /// As [`Sr::sweep`].
    pub fn mend_rest(&self, host: &Host) -> Result<()> {
        let lock = self.lock_sr(host)?;
        make_directory(&self.path.join("volumes"))?;
        let mut known = BTreeSet::new();
        let mut all_known = true;
        for id in self.tree_ids()? {
            match self.read_tree(id) {
                Ok(loaded) => known.extend(loaded.iter().flat_map(|loaded| loaded.tree.referenced_volumes())),
                Err(_) => all_known = false,
            }
        }
        let volumes = self.path.join("volumes");
        for key in self.linked()?.into_iter().filter(|key| all_known && !known.contains(key)) {
            let path = volumes.join(key.to_string());
            if path.is_symlink() && matches!(self.tree_of(key), Err(Error::DamagedRecord { .. })) {
                record::remove(&path)?;
            }
        }
        self.sweep(host, &lock)?;
        Ok(())
    }
}

/// Reads what a node's header says of it; `None` when it cannot be trusted.
fn node_of(path: &Path) -> Option<Node> {
    let header = Header::read(path).ok()?;
    let parent = match header.backing {
        None => None,
        Some(name) => Some(std::str::from_utf8(&name).ok()?.strip_suffix(NODE_SUFFIX)?.parse().ok()?),
    };
    Some(Node::new(parent, header.virtual_size))
}

/// Keeps what is at a record's path under another name as well, so that there is a record at every moment.
pub(super) fn keep_aside(path: &Path) -> Result<()> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    let aside = free_name(path)?;
    if metadata.is_file() {
        fs::hard_link(path, &aside).or_else(|_| fs::copy(path, &aside).map(drop)).map_err(Error::on("keeping", path))
    } else {
        fs::rename(path, &aside).map_err(Error::on("keeping", path))
    }
}

/// Finds a name for what a record is replaced by.
fn free_name(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let numbers = std::iter::once(String::new()).chain((2..1000).map(|number| format!(".{number}")));
    let mut names = numbers.map(|number| path.with_file_name(format!("{name}{DAMAGED}{number}")));
    let free = names.find(|path| fs::symlink_metadata(path).is_err());
    free.ok_or_else(|| Error::Internal(format!("no name is free to keep {} under", path.display())))
}

/// Takes the files of a tree from everybody but their owner.
fn close_to_others(tree: &LoadedTree) -> Result<()> {
    let nodes = tree.tree.nodes.keys().map(|node| file_name(*node));
    let pasts = tree.tree.history.keys().map(|node| format!("{node}{CHANGED_SUFFIX}"));
    for name in ["tree.json", "lock", "spare"].map(str::to_owned).into_iter().chain(nodes).chain(pasts) {
        let path = tree.directory.join(name);
        let is_open = fs::symlink_metadata(&path).is_ok_and(|found| found.is_file() && is_open_to_others(&found));
        if is_open {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(Error::on("closing", &path))?;
        }
    }
    Ok(())
}

/// Makes the headers of nodes name the parent that the record names. A node through which a volume is open, here or
/// anywhere by its claim, is left alone.
fn mend_headers(host: &Host, tree: &LockedTree) -> Result<()> {
    // One that could not be finished, and may be about headers.
    if tree.tree.intent.is_some() {
        return Ok(());
    }
    let mut open = BTreeSet::new();
    for (key, volume) in &tree.tree.volumes {
        let scratch = tree.tree.scratch.get(key).and_then(|scratch| scratch.node);
        if !volume.active.is_empty() || Attachment::seen(host, *key)?.is_some_and(|seen| seen.open.is_some()) {
            open.extend([volume.node].into_iter().chain(scratch).flat_map(|node| tree.tree.chain(node)));
        }
    }
    for (id, node) in tree.tree.nodes.iter().filter(|(id, _)| !open.contains(id)) {
        let header = Header::read(&node_path(&tree.directory, *id));
        if header.is_ok_and(|header| header.virtual_size == node.virtual_size) {
            tree.relink_header(*id, &tree.lock)?;
        }
    }
    Ok(())
}
