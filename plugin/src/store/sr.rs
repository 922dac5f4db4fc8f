//! An SR: its record, where it is, and what is in it.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::StatVfsMountFlags;
use serde::{Deserialize, Serialize};

use super::locked::{self, LoadedTree, LockedTree};
use super::mend;
use super::tree::Intent;
use super::uri::{sr_path, sr_uri};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::id::{Shortened, SrUuid, TreeId, VolumeKey};
use crate::lock::FileLock;
use crate::record::{self, Durability, Record};
use crate::smapi::{Configuration, Health, SrStat};

/// The prefix of a tree's directory while it is made; the rename that takes it away is the commit.
pub(super) const NEW: &str = ".new-";
/// The prefix of a tree's directory while it is removed; the rename that adds it is the commit.
pub(super) const OLD: &str = ".old-";

/// The record of an SR, `sr.json`.
///
/// Format 1 is an object of these four fields. An SR is where this file is: a directory without it is not an empty
/// SR but none at all, such as the mount point of a file system that is not mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SrRecord {
    /// The format of the record.
    pub format: u64,
    /// The SR's uuid, chosen by xapi.
    pub uuid: SrUuid,
    /// The name for people, any text.
    pub name: String,
    /// The description for people, any text.
    pub description: String,
}

impl Record for SrRecord {
    const FORMAT: u64 = 1;
}

/// The record of an attached SR in this host's runtime directory: where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AttachedRecord {
    format: u64,
    /// The SR's path as a URI, which can hold what JSON cannot.
    uri: String,
    /// The SR's name when it was attached, for when it cannot be asked.
    #[serde(default)]
    name: String,
    /// Its description then.
    #[serde(default)]
    description: String,
    /// Whether SR.destroy has come so far that no volume is left and none can be made.
    #[serde(default)]
    destroyed: bool,
    /// Whether a mirror from here that did not send everything is compared with its source.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    verify: bool,
}

impl Record for AttachedRecord {
    const FORMAT: u64 = 1;
}

impl AttachedRecord {
    fn of(host: &Host, uuid: SrUuid) -> Result<Self> {
        record::read_if_present(&host.sr_record(uuid))?.ok_or_else(|| Error::SrNotAttached(uuid.to_string()))
    }

    fn path(&self) -> Result<PathBuf> {
        sr_path(&Configuration::from([("uri".to_owned(), self.uri.clone())]))
    }
}

/// An SR whose record was read.
#[derive(Clone, Debug)]
pub struct Sr {
    /// The SR's directory.
    pub path: PathBuf,
    /// Its record.
    pub record: SrRecord,
}

impl Sr {
    /// Makes an SR in an existing directory. Called again with the same uuid it leaves the SR as it is, with the new
    /// name and description.
    ///
    /// # Errors
    ///
    /// [`Error::SrExists`] when another SR is there, [`Error::RecordLost`] when its volumes are,
    /// [`Error::InvalidDeviceConfig`] when there is no directory.
    pub fn create(host: &Host, path: &Path, uuid: SrUuid, name: &str, description: &str) -> Result<Self> {
        if !path.is_dir() {
            let reason = format!("{} is not a directory", path.display());
            return Err(Error::InvalidDeviceConfig { key: "uri", reason });
        }
        let _lock = FileLock::acquire(&path.join("lock"), host.settings()?.lock())?;
        let record_path = path.join("sr.json");
        match record::read_if_present::<SrRecord>(&record_path)? {
            Some(record) if record.uuid != uuid => return Err(Error::SrExists(path.to_owned())),
            Some(_) => {}
            None => {
                for name in ["trees", "volumes"] {
                    let directory = path.join(name);
                    make_directory(&directory)?;
                    // Volumes without their SR's record: it was lost, and a new one must not hide that.
                    let mut entries = fs::read_dir(&directory).map_err(Error::on("listing", &directory))?;
                    if entries.next().is_some() {
                        return Err(Error::RecordLost(path.to_owned()));
                    }
                }
            }
        }
        let record =
            SrRecord { format: SrRecord::FORMAT, uuid, name: name.to_owned(), description: description.to_owned() };
        record::write(&record_path, &record, Durability::Durable)?;
        Ok(Self { path: path.to_owned(), record })
    }

    /// Opens the SR in a directory.
    ///
    /// # Errors
    ///
    /// [`Error::SrUnavailable`] when none is there; the record's own errors when it cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        match Self::find(path)? {
            Some(sr) => Ok(sr),
            None => Err(Error::SrUnavailable {
                path: path.join("sr.json"),
                reason: "the file does not exist: there is no SR, or its file system is not mounted".to_owned(),
            }),
        }
    }

    /// Looks for an SR in a directory.
    ///
    /// # Errors
    ///
    /// The record's, when it is there and cannot be read.
    pub fn find(path: &Path) -> Result<Option<Self>> {
        let record = record::read_if_present(&path.join("sr.json"))?;
        Ok(record.map(|record| Self { path: path.to_owned(), record }))
    }

    /// Opens an SR that is attached on this host.
    ///
    /// # Errors
    ///
    /// [`Error::SrNotAttached`]; [`Error::SrUnavailable`] when it is no longer where it was attached.
    pub fn attached(host: &Host, uuid: SrUuid) -> Result<Self> {
        let attached = AttachedRecord::of(host, uuid)?;
        let path = attached.path()?;
        if attached.destroyed && !path.join("sr.json").exists() {
            return Err(Error::SrNotAttached(uuid.to_string()));
        }
        let sr = Self::open(&path)?;
        if sr.record.uuid != uuid {
            return Err(Error::SrUnavailable {
                path: sr.path.join("sr.json"),
                reason: format!("it is of SR {}, not of {uuid}", sr.record.uuid),
            });
        }
        Ok(sr)
    }

    /// Gives the name and description that an SR was attached with.
    ///
    /// # Errors
    ///
    /// [`Error::SrNotAttached`].
    pub(crate) fn attached_names(host: &Host, uuid: SrUuid) -> Result<(String, String)> {
        let attached = AttachedRecord::of(host, uuid)?;
        Ok((attached.name, attached.description))
    }

    /// Gives where an SR is that is attached on this host.
    ///
    /// # Errors
    ///
    /// [`Error::SrNotAttached`].
    pub fn attached_path(host: &Host, uuid: SrUuid) -> Result<PathBuf> {
        AttachedRecord::of(host, uuid)?.path()
    }

    /// Gives the record that the SR in a directory had when this host attached it; `None` where it did not, or attached
    /// several there, and where no tree is in the directory: that may be a file system that is not mounted.
    ///
    /// # Errors
    ///
    /// When this host's records cannot be read.
    pub fn remembered(host: &Host, path: &Path) -> Result<Option<SrRecord>> {
        let has_trees = fs::read_dir(path.join("trees")).is_ok_and(|mut entries| entries.next().is_some());
        let mut records = Vec::new();
        for uuid in Self::all_attached(host)? {
            let Ok(attached) = AttachedRecord::of(host, uuid) else { continue };
            if !attached.destroyed && is_same(&attached.path()?, path) {
                let AttachedRecord { name, description, .. } = attached;
                records.push(SrRecord { format: SrRecord::FORMAT, uuid, name, description });
            }
        }
        Ok(if let ([record], true) = (&records[..], has_trees) { Some(record.clone()) } else { None })
    }

    /// Makes the record of an SR anew that is lost or torn, as this host remembers it; what is there is kept beside it.
    ///
    /// # Errors
    ///
    /// As [`Self::open`] where it is not remembered.
    pub fn restore(host: &Host, path: &Path) -> Result<Self> {
        let record = match Self::open(path) {
            Ok(sr) => return Ok(sr),
            Err(error @ (Error::DamagedRecord { .. } | Error::SrUnavailable { .. })) => {
                Self::remembered(host, path)?.ok_or(error)?
            }
            Err(error) => return Err(error),
        };
        let _lock = FileLock::acquire(&path.join("lock"), host.settings()?.lock())?;
        let record_path = path.join("sr.json");
        mend::keep_aside(&record_path)?;
        record::write(&record_path, &record, Durability::Durable)?;
        Self::open(path)
    }

    /// Whether an attached SR was destroyed by a call that has not forgotten it yet, and may never do so.
    ///
    /// # Errors
    ///
    /// [`Error::SrNotAttached`].
    pub fn was_destroyed(host: &Host, uuid: SrUuid) -> Result<bool> {
        let attached = AttachedRecord::of(host, uuid)?;
        Ok(attached.destroyed && !attached.path()?.join("sr.json").exists())
    }

    /// Tells whether an attached SR's device-config asks for mirrors from it to be compared with their source.
    pub fn verifies(host: &Host, uuid: SrUuid) -> bool {
        AttachedRecord::of(host, uuid).is_ok_and(|attached| attached.verify)
    }

    /// Records that the SR is attached on this host, wherever it was before.
    ///
    /// # Errors
    ///
    /// When the record cannot be written.
    pub fn attach(&self, host: &Host) -> Result<()> {
        self.attach_with(host, &Configuration::new())
    }

    /// Records that the SR is attached on this host, as its device-config wants it.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidDeviceConfig`]; [`Error::NewerFormat`] where a newer version has attached it; else as [`Self::attach`].
    pub fn attach_with(&self, host: &Host, configuration: &Configuration) -> Result<()> {
        let verify = match configuration.get("verify").map(String::as_str) {
            Some("true") => true,
            Some("false") | None => false,
            Some(other) => {
                let reason = format!("{:?}; give true or false", Shortened(other));
                return Err(Error::InvalidDeviceConfig { key: "verify", reason });
            }
        };
        let path = host.sr_record(self.record.uuid);
        if let Some(directory) = path.parent() {
            host.make_runtime_dir(directory)?;
        }
        // One that is torn is made anew; what a newer version wrote is not to be lost.
        if let Err(error @ Error::NewerFormat { .. }) = record::read_if_present::<AttachedRecord>(&path) {
            return Err(error);
        }
        let SrRecord { name, description, .. } = self.record.clone();
        let uri = sr_uri(&self.path);
        let record =
            AttachedRecord { format: AttachedRecord::FORMAT, uri, name, description, destroyed: false, verify };
        record::write(&path, &record, Durability::UntilReboot)
    }

    /// Forgets that an SR is attached on this host, if it is.
    ///
    /// # Errors
    ///
    /// When the record cannot be removed.
    pub fn detach(host: &Host, uuid: SrUuid) -> Result<()> {
        record::remove(&host.sr_record(uuid))
    }

    /// Lists the SRs that are attached on this host.
    ///
    /// # Errors
    ///
    /// When the runtime directory cannot be read.
    pub fn all_attached(host: &Host) -> Result<Vec<SrUuid>> {
        let directory = host.runtime_dir().join("srs");
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::on("listing", &directory)(error)),
        };
        let mut uuids = Vec::new();
        for entry in entries {
            let name = entry.map_err(Error::on("listing", &directory))?.file_name();
            let uuid = name.to_str().and_then(|name| name.strip_suffix(".json"));
            uuids.extend(uuid.and_then(|text| text.parse::<SrUuid>().ok()));
        }
        uuids.sort();
        Ok(uuids)
    }

    /// Describes the SR and the space on its file system.
    ///
    /// # Errors
    ///
    /// When the file system does not answer.
    pub fn describe(&self) -> Result<SrStat> {
        let space = rustix::fs::statvfs(&self.path).map_err(Error::on("reading the file system of", &self.path))?;
        let uuid = self.record.uuid.to_string();
        // xapi scans only a healthy SR, and one that cannot be written to can still be listed.
        let remark =
            if space.f_flag.contains(StatVfsMountFlags::RDONLY) { "the file system is read-only" } else { "" };
        Ok(SrStat {
            sr: uuid.clone(),
            name: self.record.name.clone(),
            uuid,
            description: self.record.description.clone(),
            free_space: space.f_bavail.saturating_mul(space.f_frsize),
            total_space: space.f_blocks.saturating_mul(space.f_frsize),
            datasources: Vec::new(),
            clustered: false,
            health: Health::Healthy(remark.to_owned()),
        })
    }

    /// Sees that the SR's directories are there: without them it lists nothing and takes no volume.
    ///
    /// # Errors
    ///
    /// [`Error::SrUnavailable`] that names the one that is not.
    pub(super) fn has_directories(&self) -> Result<()> {
        match [self.trees(), self.path.join("volumes")].iter().find(|directory| !directory.is_dir()) {
            Some(missing) => Err(self.unavailable(missing)),
            None => Ok(()),
        }
    }

    /// Removes the SR from its directory, which stays. Called again it removes what was left.
    ///
    /// # Errors
    ///
    /// [`Error::SrNotEmpty`] when there are volumes, or one is being made; the SR is then as it was.
    pub fn destroy(&self, host: &Host) -> Result<()> {
        let lock = self.lock_sr(host)?;
        let trees = self.trees();
        if trees.exists() {
            self.sweep(host, &lock)?;
            // From here on no volume can be made.
            match fs::remove_dir(&trees) {
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                    return Err(Error::SrNotEmpty(self.record.uuid.to_string()));
                }
                result => result.map_err(Error::on("removing", &trees))?,
            }
        }
        let volumes = self.path.join("volumes");
        match fs::remove_dir_all(&volumes) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::on("removing", &volumes)(error));
            }
            _ => {}
        }
        // Without its record an SR looks like one that is not mounted; who calls again has to know better.
        let attached = host.sr_record(self.record.uuid);
        if let Some(record) = record::read_if_present::<AttachedRecord>(&attached)? {
            record::write(&attached, &AttachedRecord { destroyed: true, ..record }, Durability::UntilReboot)?;
        }
        let worker = crate::gc::LOCKS.map(|name| self.path.join(name));
        for path in worker.iter().chain([&self.path.join("sr.json")]).map(PathBuf::as_path).chain([lock.path()]) {
            match fs::remove_file(path) {
                // Another call that destroys it came first, and this one waited for its lock.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result.map_err(Error::on("removing", path))?,
            }
        }
        record::sync_directory(&self.path)
    }

    /// Changes the SR's name and description under its lock.
    ///
    /// # Errors
    ///
    /// When the record cannot be replaced.
    pub fn update(&mut self, host: &Host, change: impl FnOnce(&mut SrRecord)) -> Result<()> {
        let _lock = self.lock_sr(host)?;
        let path = self.path.join("sr.json");
        let mut record = record::read(&path)?;
        change(&mut record);
        record::write(&path, &record, Durability::Durable)?;
        self.record = record;
        Ok(())
    }

    /// Takes the SR's own lock.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] when another holds it for too long.
    pub fn lock_sr(&self, host: &Host) -> Result<FileLock> {
        FileLock::acquire(&self.path.join("lock"), host.settings()?.lock())
    }

    /// Reads the tree that holds a volume, without a lock.
    ///
    /// # Errors
    ///
    /// [`Error::VolumeDoesNotExist`]; an error that names the file where the tree's record cannot be read.
    pub fn load(&self, key: VolumeKey) -> Result<LoadedTree> {
        let missing = || Error::VolumeDoesNotExist(key.to_string());
        loop {
            let id = self.tree_of(key)?.ok_or_else(missing)?;
            match self.read_tree(id)?.filter(|loaded| loaded.tree.volumes.contains_key(&key)) {
                Some(loaded) => return Ok(loaded),
                // It may have moved to another tree meanwhile.
                None if self.tree_of(key)? == Some(id) => return Err(missing()),
                None => {}
            }
        }
    }

    /// Locks the tree that holds a volume, reads it, and finishes what a killed call began in it. Nobody merges nodes that
    /// the volume reads then, nor begins to while the lock is held.
    ///
    /// The caller holds no attachment, and is in no asynchronous code: finishing may need the daemon.
    ///
    /// # Errors
    ///
    /// As [`Self::load`]; [`Error::Timeout`] when another holds the lock for too long;
    /// [`Error::ActivatedOnAnotherHost`] when only that host can finish what was begun on the volume.
    pub fn lock(&self, host: &Host, key: VolumeKey) -> Result<LockedTree> {
        let patience = host.settings()?.lock();
        let missing = || Error::VolumeDoesNotExist(key.to_string());
        loop {
            let id = self.tree_of(key)?.ok_or_else(missing)?;
            let directory = self.tree_directory(id);
            let lock = match FileLock::acquire(&directory.join("lock"), patience) {
                Ok(lock) => lock,
                // The tree went away; the symlink says whether the volume did.
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    if self.tree_of(key)? == Some(id) && !directory.exists() {
                        return Err(missing());
                    }
                    continue;
                }
                Err(error) => return Err(error),
            };
            if self.tree_of(key)? != Some(id) {
                continue;
            }
            let loaded = self.read_tree(id)?.ok_or_else(missing)?;
            let mut locked = LockedTree::new(self.clone(), loaded, lock);
            locked.finish(host)?;
            // What was begun may have been to take it to another tree.
            if !locked.tree.volumes.contains_key(&key) && self.tree_of(key)? != Some(id) {
                continue;
            }
            if locked.tree.intent.as_ref().and_then(Intent::volume) == Some(key) {
                locked.refuse_second_intent()?;
            }
            locked.tree.volume(key)?;
            locked.settle(host, key)?;
            return Ok(locked);
        }
    }

    /// Lists the trees there are, in no order; those that are being made or removed are left out.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read, or holds what is not a tree.
    pub fn tree_ids(&self) -> Result<Vec<TreeId>> {
        let directory = self.trees();
        let mut ids = Vec::new();
        for entry in self.entries(&directory)? {
            let name = entry.map_err(Error::on("listing", &directory))?.file_name();
            let text = name.to_string_lossy();
            if text.starts_with('.') {
                continue;
            }
            let id = text.parse().map_err(|_| Error::DamagedRecord {
                path: directory.join(&name),
                reason: "it is not a tree's directory".to_owned(),
            })?;
            ids.push(id);
        }
        ids.sort();
        ids.dedup();
        Ok(ids)
    }

    /// Reads a tree without a lock; `None` when it is gone.
    ///
    /// # Errors
    ///
    /// When its record cannot be read, or its directory has none.
    pub fn read_tree(&self, id: TreeId) -> Result<Option<LoadedTree>> {
        let directory = self.tree_directory(id);
        let Some(tree) = locked::read(&directory)? else {
            return Ok(None);
        };
        Ok(Some(LoadedTree { id, directory, tree }))
    }

    /// Opens one of the SR's directories.
    pub(super) fn entries(&self, directory: &Path) -> Result<fs::ReadDir> {
        fs::read_dir(directory).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => self.unavailable(directory),
            _ => Error::on("listing", directory)(error),
        })
    }

    /// Finds which tree a volume's symlink names.
    pub(super) fn tree_of(&self, key: VolumeKey) -> Result<Option<TreeId>> {
        let link = self.volume_link(key);
        let target = match fs::read_link(&link) {
            Ok(target) => target,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // A file system that was unmounted has no volumes either: that must not pass for their absence.
                let volumes = self.path.join("volumes");
                return if volumes.is_dir() { Ok(None) } else { Err(self.unavailable(&volumes)) };
            }
            Err(error) => return Err(Error::on("reading symlink", &link)(error)),
        };
        let id = target.to_str().and_then(|text| text.strip_prefix("../trees/")).and_then(|text| text.parse().ok());
        id.map(Some)
            .ok_or_else(|| Error::DamagedRecord { path: link, reason: "it does not point to a tree".to_owned() })
    }

    /// Makes the symlink by which a volume is found; [`Self::sync_links`] makes it durable.
    pub(super) fn link(&self, key: VolumeKey, id: TreeId) -> Result<()> {
        let link = self.volume_link(key);
        match std::os::unix::fs::symlink(format!("../trees/{id}"), &link) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && self.tree_of(key)? == Some(id) => {}
            result => result.map_err(Error::on("making symlink", &link))?,
        }
        Ok(())
    }

    /// Makes the volumes' symlinks durable.
    pub(super) fn sync_links(&self) -> Result<()> {
        record::sync_directory(&self.path.join("volumes"))
    }

    /// Makes a volume's symlink lead to another tree, durably, from one moment to the next.
    pub(super) fn relink(&self, key: VolumeKey, id: TreeId) -> Result<()> {
        let volumes = self.path.join("volumes");
        let made = volumes.join(format!("{}{key}", record::TEMPORARY));
        let link = self.volume_link(key);
        loop {
            match fs::remove_file(&made) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::on("removing", &made)(error));
                }
                _ => {}
            }
            std::os::unix::fs::symlink(format!("../trees/{id}"), &made)
                .map_err(Error::on("making symlink", &made))?;
            match fs::rename(&made, &link) {
                // Whoever removes garbage took it for that.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => {
                    result.map_err(Error::on("renaming", &made))?;
                    return record::sync_directory(&volumes);
                }
            }
        }
    }

    /// Lists the volumes that have symlinks, in no order; not all of them need to exist.
    pub(super) fn linked(&self) -> Result<Vec<VolumeKey>> {
        let volumes = self.path.join("volumes");
        let mut keys = Vec::new();
        for entry in self.entries(&volumes)? {
            let name = entry.map_err(Error::on("listing", &volumes))?.file_name();
            keys.extend(name.to_str().and_then(|name| name.parse::<VolumeKey>().ok()));
        }
        Ok(keys)
    }

    /// Removes a volume's symlink, if it is there.
    pub(super) fn unlink(&self, key: VolumeKey) -> Result<()> {
        record::remove(&self.volume_link(key))
    }

    /// Gives the directory of all trees.
    pub(super) fn trees(&self) -> PathBuf {
        self.path.join("trees")
    }

    /// Gives a tree's directory.
    pub(super) fn tree_directory(&self, id: TreeId) -> PathBuf {
        self.trees().join(id.to_string())
    }

    fn volume_link(&self, key: VolumeKey) -> PathBuf {
        self.path.join("volumes").join(key.to_string())
    }

    /// Turns a failure in a directory of the SR into that of the SR where the SR itself is gone.
    pub(super) fn or_gone(&self, error: Error) -> Error {
        match &error {
            Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => self.unavailable(&self.trees()),
            _ => error,
        }
    }

    fn unavailable(&self, missing: &Path) -> Error {
        Error::SrUnavailable { path: missing.to_owned(), reason: "the directory does not exist".to_owned() }
    }
}

/// Tells whether two paths lead to one directory.
pub fn is_same(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    real(one) == real(other)
}

/// Whether the file system that holds a directory is mounted read-only.
///
/// # Errors
///
/// When it does not answer.
pub fn is_read_only(path: &Path) -> Result<bool> {
    let space = rustix::fs::statvfs(path).map_err(Error::on("reading the file system of", path))?;
    Ok(space.f_flag.contains(StatVfsMountFlags::RDONLY))
}

/// Makes a directory that only its owner may read, unless it is there.
pub(super) fn make_directory(path: &Path) -> Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result.map_err(Error::on("making directory", path)),
    }
}
