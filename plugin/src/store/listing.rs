//! Volumes as xapi sees them, read without locks while others change them.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use super::changed::changed_path;
use super::locked::{LoadedTree, node_path};
use super::sr::Sr;
use super::tree::Intent;
use crate::error::{Error, Result};
use crate::id::{TreeId, VolumeKey, VolumeUri};
use crate::smapi::{VolumeRecord, VolumeType};

/// How often a tree is read again when a file that its record names is gone: its volumes are being destroyed.
const ATTEMPTS: u32 = 100;

/// How many threads read trees at once.
const THREADS: usize = 4;

/// How many trees are worth a thread.
const TREES_A_THREAD: usize = 64;

impl Sr {
    /// Lists all volumes.
    ///
    /// A tree that appears or disappears meanwhile is listed or not; each tree is as it was at one moment. A volume
    /// that moves from one tree to another meanwhile is listed once.
    ///
    /// # Errors
    ///
    /// When any tree cannot be read: a list that lacks a volume would have xapi forget it.
    pub fn volumes(&self) -> Result<Vec<VolumeRecord>> {
        let mut records = of_each(&self.tree_ids()?, |id| self.tree_volumes(id))?;
        records.sort_unstable_by_key(|record| record.key);
        let mut doubtful: BTreeSet<VolumeKey> =
            records.windows(2).filter(|pair| pair[0].key == pair[1].key).map(|pair| pair[0].key).collect();
        records.dedup_by_key(|record| record.key);
        let place = |records: &[VolumeRecord], key| records.binary_search_by_key(&key, |record| record.key);
        doubtful.extend(self.linked()?.into_iter().filter(|key| place(&records, *key).is_err()));
        for key in doubtful {
            match (self.stat(key), place(&records, key)) {
                (Ok(record), Ok(at)) => records[at] = record,
                (Ok(record), Err(at)) => records.insert(at, record),
                (Err(Error::VolumeDoesNotExist(_)), Ok(at)) => drop(records.remove(at)),
                (Err(Error::VolumeDoesNotExist(_)), Err(_)) => {}
                (Err(error), _) => return Err(error),
            }
        }
        Ok(records)
    }

    /// Sees that the record of every tree can be read; an SR without the directory of its trees has none.
    ///
    /// # Errors
    ///
    /// The first record's that cannot be read.
    pub fn has_readable_trees(&self) -> Result<()> {
        if !self.trees().is_dir() {
            return Ok(());
        }
        of_each(&self.tree_ids()?, |id| self.read_tree(id).map(|_| Vec::<()>::new())).map(drop)
    }
}

/// Gathers what each tree has, in no order. Several threads read, as most of the time goes into waiting for a file
/// system, and on a network nearly all.
fn of_each<T: Send>(ids: &[TreeId], read: impl Fn(TreeId) -> Result<Vec<T>> + Sync) -> Result<Vec<T>> {
    let list = |ids: &[TreeId]| {
        let mut records = Vec::with_capacity(ids.len());
        for id in ids {
            records.extend(read(*id)?);
        }
        Ok(records)
    };
    if ids.len() < 2 * TREES_A_THREAD {
        return list(ids);
    }
    let part = ids.len().div_ceil(THREADS).max(TREES_A_THREAD);
    std::thread::scope(|scope| {
        let threads: Vec<_> = ids.chunks(part).map(|part| scope.spawn(|| list(part))).collect();
        let mut records = Vec::with_capacity(ids.len());
        for thread in threads {
            records.extend(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(records)
    })
}

impl Sr {
    /// Describes one volume.
    ///
    /// # Errors
    ///
    /// [`Error::VolumeDoesNotExist`], or its tree cannot be read.
    pub fn stat(&self, key: VolumeKey) -> Result<VolumeRecord> {
        settled(|| describe(self, &self.load(key)?, key))
    }

    /// Lists the volumes of one tree; none when it is gone.
    fn tree_volumes(&self, id: TreeId) -> Result<Vec<VolumeRecord>> {
        settled(|| {
            let mut records = Vec::new();
            let Some(loaded) = self.read_tree(id)? else {
                return Ok(Some(records));
            };
            // One that is on its way to another tree, and has arrived there, is no longer of this one.
            let gone = match loaded.tree.intent {
                Some(Intent::Compose { volume, .. }) if self.tree_of(volume)? != Some(id) => Some(volume),
                _ => None,
            };
            for key in loaded.tree.volumes.keys().filter(|key| Some(**key) != gone) {
                match describe(self, &loaded, *key)? {
                    Some(record) => records.push(record),
                    None => return Ok(None),
                }
            }
            Ok(Some(records))
        })
    }
}

/// Repeats what gives `None` while a file of the record it went by is missing.
fn settled<T>(mut read: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    for _ in 0..ATTEMPTS {
        if let Some(value) = read()? {
            return Ok(value);
        }
    }
    Err(Error::Internal("a tree changed too often to be read".to_owned()))
}

/// Describes a volume, or gives `None` when its tree has changed since it was read.
fn describe(sr: &Sr, loaded: &LoadedTree, key: VolumeKey) -> Result<Option<VolumeRecord>> {
    let volume = loaded.volume(key)?;
    let path = match loaded.tree.nodes.contains_key(&volume.node) {
        true => node_path(&loaded.directory, volume.node),
        false => changed_path(&loaded.directory, volume.node),
    };
    let metadata = match fs::symlink_metadata(&path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let still_named = sr.read_tree(loaded.id)?.is_some_and(|now| now.tree == loaded.tree);
            // Read after the record: a file goes after the commit that drops it.
            return if still_named && !path.exists() {
                Err(Error::Image { path, reason: "the file does not exist".to_owned() })
            } else {
                Ok(None)
            };
        }
        Err(error) => return Err(Error::on("reading the state of", &path)(error)),
    };
    Ok(Some(VolumeRecord {
        key,
        uuid: key,
        name: volume.name.clone(),
        description: volume.description.clone(),
        read_write: volume.read_write,
        sharable: volume.sharable,
        virtual_size: loaded.tree.virtual_size(volume.node)?,
        // A file's blocks are counted in 512 bytes, whatever the file system's are.
        physical_utilisation: metadata.blocks() * 512,
        uri: vec![VolumeUri { sr: sr.record.uuid, volume: key }.to_string()],
        keys: volume.keys.clone(),
        volume_type: if volume.data_destroyed { VolumeType::CbtMetadata } else { VolumeType::Data },
        cbt_enabled: volume.cbt_enabled,
    }))
}
