//! An SR held against itself: whether its records, its files and its symlinks agree.
//!
//! Everything is read without a lock first. What looks wrong may be an operation under way, and is looked at again under
//! the lock of its tree; only what is wrong then is a finding. Nothing is written.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata, ReadDir};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::changed::CHANGED_SUFFIX;
use super::coalesce;
use super::finding::{Finding, Severity, reason_of};
use super::header::Header;
use super::locked::{LoadedTree, NODE_SUFFIX, file_name, node_path, record_path};
use super::mend::DAMAGED;
use super::spare;
use super::sr::{NEW, OLD, Sr};
use super::tree::{Intent, Tree};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::id::{NodeId, TreeId, VolumeKey};
use crate::lock::FileLock;
use crate::record;

/// The files of a tree beside its nodes'.
const OWN_FILES: [&str; 5] = ["tree.json", "lock", "spare", "merge", "merge.stop"];

/// How long the removal of a directory may rest.
const MOMENT: Duration = Duration::from_millis(500);

/// What is found when an SR is held against itself.
#[derive(Clone, Debug, Default)]
pub struct Examination {
    /// The trees whose records can be read.
    pub trees: Vec<LoadedTree>,
    /// The trees whose records cannot.
    pub unreadable: BTreeSet<TreeId>,
    /// The trees in which a repair has something to do.
    pub mendable: BTreeSet<TreeId>,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

impl Sr {
    /// Holds the SR's records, files and symlinks against each other.
    ///
    /// # Errors
    ///
    /// When the SR's directories cannot be listed, or a lock not be asked for.
    pub fn examine(&self, host: &Host) -> Result<Examination> {
        let mut found = Examination::default();
        let ids = self.examine_trees_directory(&mut found)?;
        for id in ids {
            let (loaded, findings) = self.settled_tree(host, id)?;
            match loaded {
                Some(loaded) => found.trees.push(loaded),
                None if !findings.is_empty() => drop(found.unreadable.insert(id)),
                None => {}
            }
            found.note(id, findings);
        }
        self.examine_links(host, &mut found)?;
        Ok(found)
    }

    /// Looks at what is among the trees, and gives those there are.
    fn examine_trees_directory(&self, found: &mut Examination) -> Result<Vec<TreeId>> {
        let trees = self.trees();
        let (mut ids, mut unfinished) = (Vec::new(), Vec::new());
        for name in self.names_in(&trees)? {
            let path = trees.join(&name);
            if name.starts_with(NEW) || name.starts_with(OLD) {
                unfinished.push(path);
            } else if let Ok(id) = name.parse() {
                match fs::symlink_metadata(&path) {
                    Ok(metadata) if !metadata.is_dir() => {
                        let what = "it has the name of a tree and is not a directory";
                        found.findings.push(Finding::new(Severity::Error, &path, what, "move it out of the SR"));
                    }
                    _ => ids.push(id),
                }
            } else if !name.starts_with('.') {
                let what = "it is not a tree's directory, and no volume can be listed while it is there";
                found.findings.push(Finding::new(Severity::Error, &path, what, "move it out of the SR"));
            }
        }
        for path in abandoned(unfinished) {
            let what = "a tree that was not finished, or is gone, and that nobody works on";
            found.findings.push(Finding::repairable(Severity::Note, &path, what, "removed"));
        }
        Ok(ids)
    }

    fn names_in(&self, directory: &Path) -> Result<Vec<String>> {
        names(self.entries(directory)?, directory)
    }

    /// Examines a tree; again under its lock where something seems wrong.
    fn settled_tree(&self, host: &Host, id: TreeId) -> Result<(Option<LoadedTree>, Vec<Finding>)> {
        let (loaded, findings) = self.examine_tree(id);
        if findings.is_empty() {
            return Ok((loaded, findings));
        }
        match self.lock_to_look(host, id) {
            Ok(_lock) => Ok(self.examine_tree(id)),
            Err(Error::Timeout { .. }) => {
                let what = "its lock is held for long by a call that is at work: it was not examined";
                let busy = Finding::new(Severity::Note, &self.tree_directory(id), what, "check again later");
                Ok((loaded, vec![busy]))
            }
            Err(error) => Err(error),
        }
    }

    /// Takes the lock of a tree for one who only wants to see it at rest; `None` where the tree is gone, and where nothing
    /// can be written, so that nobody is at work either.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] when another holds it for too long.
    pub fn lock_to_look(&self, host: &Host, id: TreeId) -> Result<Option<FileLock>> {
        match FileLock::acquire(&self.tree_directory(id).join("lock"), host.settings()?.lock()) {
            Ok(lock) => Ok(Some(lock)),
            Err(Error::ReadOnlyFileSystem { .. } | Error::Io { .. } | Error::NoSpace { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Holds a tree's record against its files, as both are now.
    fn examine_tree(&self, id: TreeId) -> (Option<LoadedTree>, Vec<Finding>) {
        let directory = self.tree_directory(id);
        let record = record_path(&directory);
        let loaded = match self.read_tree(id) {
            Ok(loaded) => loaded,
            Err(error) => {
                let what = reason_of(&error);
                let finding = match &error {
                    Error::DamagedRecord { .. } => {
                        let repair = "made anew from its copy and from the headers of the images; what is there now is kept as tree.json.damaged";
                        Finding::repairable(Severity::Error, &record, what, repair)
                    }
                    Error::NewerFormat { .. } => {
                        Finding::new(Severity::Error, &record, what, "install the version that wrote it")
                    }
                    _ => Finding::new(
                        Severity::Error,
                        &record,
                        what,
                        "see the kernel's log for the file system's errors",
                    ),
                };
                return (None, vec![finding]);
            }
        };
        let Some(loaded) = loaded else { return (None, Vec::new()) };
        let mut findings = Vec::new();
        examine_intent(&loaded, &record, &mut findings);
        if loaded.tree.merge.is_some() && !FileLock::is_held(&directory.join(coalesce::LOCK)) {
            let what = "two nodes were being merged, and nobody works on it";
            findings.push(Finding::repairable(
                Severity::Note,
                &record,
                what,
                "left as they were, until they are merged anew",
            ));
        }
        for node in loaded.tree.nodes.keys() {
            examine_node(&loaded, *node, &mut findings);
        }
        for node in loaded.tree.history.keys() {
            if let Err(error) = loaded.read_changed(*node) {
                let remedy = "take full backups of the volumes that lie on it once, and changes are known again";
                let path = super::changed::changed_path(&directory, *node);
                findings.push(Finding::new(Severity::Warning, &path, reason_of(&error), remedy));
            }
        }
        if let Err(error) = examine_files(&loaded.tree, &directory, &mut findings) {
            findings.push(Finding::new(Severity::Error, &directory, error.chain(), "see the kernel's log"));
        }
        (Some(loaded), findings)
    }

    /// Holds the symlinks against the records.
    fn examine_links(&self, host: &Host, found: &mut Examination) -> Result<()> {
        let volumes = self.path.join("volumes");
        let names = if volumes.is_dir() {
            self.names_in(&volumes)?
        } else {
            let what = "the directory of the symlinks is not there: no volume can be found";
            found.findings.push(Finding::repairable(Severity::Error, &volumes, what, "made anew, with the symlinks"));
            Vec::new()
        };
        let mut homes: BTreeMap<VolumeKey, Vec<TreeId>> = BTreeMap::new();
        let mut moving = BTreeSet::new();
        for loaded in &found.trees {
            for key in loaded.tree.volumes.keys() {
                homes.entry(*key).or_default().push(loaded.id);
            }
            // Where these are to be found is what an operation that was begun decides.
            moving.extend(loaded.tree.intent.iter().filter_map(Intent::volume));
            moving
                .extend(loaded.tree.referenced_volumes().difference(&loaded.tree.volumes.keys().copied().collect()));
        }
        let mut findings = Vec::new();
        let (mut dangling, mut unfinished) = (Vec::new(), Vec::new());
        for name in &names {
            let path = volumes.join(name);
            let Ok(key) = name.parse::<VolumeKey>() else {
                if name.starts_with(record::TEMPORARY) {
                    unfinished.push(path);
                } else {
                    let what = "it is no volume's name";
                    findings.push(Finding::new(Severity::Note, &path, what, "remove it if nobody misses it"));
                }
                continue;
            };
            if moving.contains(&key) {
                continue;
            }
            if fs::symlink_metadata(&path).is_ok_and(|metadata| !metadata.is_symlink()) {
                let remedy = "move it out of the SR, and check again";
                findings.push(Finding::new(Severity::Error, &path, "it is a volume's name and no symlink", remedy));
                continue;
            }
            let home = homes.get(&key).and_then(|homes| homes.first());
            match (self.tree_of(key), home) {
                (Ok(Some(id)), _) if found.unreadable.contains(&id) => {}
                (Ok(Some(id)), Some(home)) if id == *home => {}
                (Ok(None), _) => {}
                (_, Some(home)) => {
                    let what = format!("the volume is in tree {home}, and its symlink leads elsewhere");
                    if self.is_misled(host, key, *home)? {
                        findings.push(Finding::repairable(Severity::Error, &path, what, "made anew"));
                    }
                }
                (Ok(Some(_)), None) => {
                    if found.unreadable.is_empty() && self.is_dangling(key).unwrap_or(true) {
                        dangling.push(key);
                    }
                }
                (Err(error), None) => {
                    findings.push(Finding::repairable(Severity::Error, &path, reason_of(&error), "removed"));
                }
            }
        }
        if !dangling.is_empty() || !unfinished.is_empty() {
            // Whoever is at work on them is done with them in a moment.
            std::thread::sleep(MOMENT);
        }
        for path in unfinished.iter().filter(|path| path.is_symlink()) {
            findings.push(Finding::repairable(Severity::Note, path, "a symlink that was not finished", "removed"));
        }
        for key in dangling.into_iter().filter(|key| self.stays_dangling(*key)) {
            let what = "a symlink that leads to no volume";
            let path = volumes.join(key.to_string());
            findings.push(Finding::repairable(Severity::Note, &path, what, "removed"));
        }
        let linked: BTreeSet<VolumeKey> = names.iter().filter_map(|name| name.parse().ok()).collect();
        for (key, trees) in &homes {
            if moving.contains(key) {
                continue;
            }
            if trees.len() > 1 {
                // One may have left the first before the second was read.
                let has = |id: &&TreeId| {
                    let now = self.read_tree(**id).ok().flatten().map(|loaded| loaded.tree);
                    now.is_some_and(|tree| tree.intent.is_none() && tree.volumes.contains_key(key))
                };
                if trees.iter().filter(has).count() < 2 {
                    continue;
                }
                let what = format!("volume {key} is in {} trees", trees.len());
                let remedy = "see which of them its symlink leads to, and take it out of the others by hand";
                findings.push(Finding::new(Severity::Error, &self.trees(), what, remedy));
            } else if !linked.contains(key) && self.is_misled(host, *key, trees[0])? {
                let path = volumes.join(key.to_string());
                let what = "the volume has no symlink: it is listed, and cannot be used";
                findings.push(Finding::repairable(Severity::Error, &path, what, "made anew"));
            }
        }
        found.findings.extend(findings);
        Ok(())
    }

    /// Tells whether a symlink that led to no volume still does, and will: whoever destroys the last volume of a tree
    /// removes the tree first, and then the symlink.
    fn stays_dangling(&self, key: VolumeKey) -> bool {
        let Ok(Some(id)) = self.tree_of(key) else { return false };
        let old = self.trees().join(format!("{OLD}{id}"));
        (!old.exists() || !abandoned(vec![old]).is_empty()) && self.is_dangling(key).unwrap_or(true)
    }

    /// Tells, under the lock of the tree that has a volume, whether the volume's symlink does not lead there.
    fn is_misled(&self, host: &Host, key: VolumeKey, home: TreeId) -> Result<bool> {
        let _lock = self.lock_to_look(host, home)?;
        let is_there = matches!(self.read_tree(home), Ok(Some(loaded)) if loaded.tree.volumes.contains_key(&key));
        Ok(is_there && !matches!(self.tree_of(key), Ok(Some(id)) if id == home))
    }
}

impl Examination {
    fn note(&mut self, id: TreeId, findings: Vec<Finding>) {
        if findings.iter().any(|finding| finding.is_repairable) {
            self.mendable.insert(id);
        }
        self.findings.extend(findings);
    }
}

/// Gives those of some directories of trees that are none yet, or no longer, on which nobody works: their locks are free,
/// and they stay as they are for a moment. Whoever makes one takes its lock a little later; whoever removes one removes
/// the lock too.
fn abandoned(directories: Vec<PathBuf>) -> Vec<PathBuf> {
    let look = |directory: &Path| {
        let entries = fs::read_dir(directory).map(Iterator::count).ok()?;
        (!FileLock::is_held(&directory.join("lock"))).then_some(entries)
    };
    let mut resting: Vec<(PathBuf, usize)> =
        directories.into_iter().filter_map(|path| look(&path).map(|entries| (path, entries))).collect();
    if !resting.is_empty() {
        std::thread::sleep(MOMENT);
        resting.retain(|(path, entries)| look(path) == Some(*entries));
    }
    resting.into_iter().map(|(path, _)| path).collect()
}

/// Finds an operation that was begun and that nobody works on.
fn examine_intent(loaded: &LoadedTree, record: &Path, findings: &mut Vec<Finding>) {
    let Some(intent) = &loaded.tree.intent else { return };
    let kind = match intent {
        Intent::Switch(_) => "a snapshot or clone of an active volume",
        Intent::Resize { .. } => "a resize",
        Intent::Compose { .. } => "a compose",
        Intent::Relink { .. } => "the end of a merge of two nodes",
    };
    let of = intent.volume().map_or_else(String::new, |volume| format!(" of volume {volume}"));
    let what = format!("{kind}{of} was begun and not ended");
    findings.push(Finding::repairable(
        Severity::Warning,
        record,
        what,
        "finished, or left to the host that has it active",
    ));
}

/// Holds a node's file against the record.
fn examine_node(loaded: &LoadedTree, node: NodeId, findings: &mut Vec<Finding>) {
    let path = node_path(&loaded.directory, node);
    let Err(error) = loaded.checked_image(node) else { return };
    if is_explained(loaded, node, &path) {
        return;
    }
    let what = reason_of(&error);
    let backing = || {
        let header = Header::read(&path).ok()?;
        let recorded = loaded.tree.node(node).ok()?;
        let parent = recorded.parent.map(file_name);
        let differs = header.check_backing(parent.as_deref()).is_err();
        (differs && header.virtual_size == recorded.virtual_size).then_some(())
    };
    findings.push(if backing().is_some() {
        Finding::repairable(
            Severity::Error,
            &path,
            what,
            "the header is made to say what the record says, once no volume on it is active",
        )
    } else {
        let remedy = "put the file back from a backup, or destroy the volumes that lie on it";
        Finding::new(Severity::Error, &path, what, remedy)
    });
}

/// Tells whether what a header says beside the record is of an operation that was begun, which is found itself: it is
/// what the record says once that is finished.
fn is_explained(loaded: &LoadedTree, node: NodeId, path: &Path) -> bool {
    let (Ok(header), Ok(recorded)) = (Header::read(path), loaded.tree.node(node)) else { return false };
    let is_grown = |size: u64| {
        let parent = recorded.parent.map(file_name);
        header.virtual_size == size && header.check_backing(parent.as_deref()).is_ok()
    };
    // The lower of two nodes that are merged is made as large as the upper one first.
    if let Some(merge) = loaded.tree.merge.filter(|merge| merge.lower == node)
        && loaded.tree.node(merge.upper).is_ok_and(|upper| is_grown(upper.virtual_size))
    {
        return true;
    }
    let Some(intent) = &loaded.tree.intent else { return false };
    match intent {
        Intent::Switch(_) => false,
        Intent::Resize { node: grown, virtual_size, .. } => *grown == node && is_grown(*virtual_size),
        // Headers follow the record.
        Intent::Compose { .. } | Intent::Relink { .. } => header.virtual_size == recorded.virtual_size,
    }
}

/// Looks at each file of a tree's directory: whether it is one of the tree's, and only its owner may read it.
fn examine_files(tree: &Tree, directory: &Path, findings: &mut Vec<Finding>) -> Result<()> {
    let nodes = tree.referenced_nodes();
    let mut record_length = 0;
    for name in names(fs::read_dir(directory).map_err(Error::on("listing", directory))?, directory)? {
        let path = directory.join(&name);
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::on("reading the state of", &path)(error)),
        };
        if name == "tree.json" {
            record_length = metadata.len();
        }
        let node = name.strip_suffix(NODE_SUFFIX).and_then(|id| id.parse::<NodeId>().ok());
        let past = name.strip_suffix(CHANGED_SUFFIX).and_then(|id| id.parse::<NodeId>().ok());
        let is_garbage = node.is_some_and(|id| !nodes.contains(&id))
            || past.is_some_and(|id| !tree.history.contains_key(&id))
            || name.starts_with(record::TEMPORARY);
        let is_own = node.is_some() || past.is_some() || OWN_FILES.contains(&name.as_str());
        if is_garbage {
            findings.push(Finding::repairable(Severity::Note, &path, "a file that no record names", "removed"));
        } else if !is_own {
            if !name.starts_with(&format!("tree.json{DAMAGED}")) {
                let remedy = "remove it if nobody misses it";
                findings.push(Finding::new(Severity::Note, &path, "it is no file of a tree", remedy));
            }
        } else if metadata.is_file() && is_open_to_others(&metadata) {
            let what = format!("its mode is {:o}: others may use it", metadata.permissions().mode() & 0o7777);
            findings.push(Finding::repairable(Severity::Warning, &path, what, "the mode is made 600"));
        } else if !metadata.is_file() && node.is_none() {
            let what = "it is not a file";
            findings.push(Finding::new(Severity::Error, &path, what, "put a file in its place"));
        }
    }
    if !spare::is_enough(directory, record_length) {
        let what = "no blocks are set aside for the record: on a full file system its volumes cannot be destroyed";
        findings.push(Finding::repairable(Severity::Note, &spare::path(directory), what, "set aside"));
    }
    Ok(())
}

/// Tells whether anybody but its owner may use a file.
pub(super) fn is_open_to_others(metadata: &Metadata) -> bool {
    metadata.permissions().mode() & 0o077 != 0
}

/// Lists a directory, sorted. A name that is not UTF-8 is given as it is shown.
fn names(entries: ReadDir, directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(Error::on("listing", directory))?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
