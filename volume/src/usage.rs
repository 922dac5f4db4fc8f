//! Who has a volume open: what a method may do with it depends on that.

use std::fs;
use std::io;

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::id::{SrUuid, VolumeKey};
use plugin::store::{LoadedTree, Mode, Sr};
use uuid::Uuid;

/// Who has a volume open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// Nobody.
    Idle,
    /// This host.
    Here(Mode),
    /// Another host, by its record in the tree.
    Elsewhere(Uuid, Mode),
}

impl Usage {
    /// Finds who has a volume open. Records of this host from an earlier boot do not count.
    pub fn of(host: &Host, tree: &LoadedTree, key: VolumeKey) -> Result<Self> {
        let active = &tree.volume(key)?.active;
        if active.is_empty() {
            return Ok(Self::Idle);
        }
        let (this, boot) = (host.uuid()?, host.boot_id()?);
        let elsewhere = active.iter().filter(|record| record.host != this).max_by_key(|record| record.mode);
        if let Some(record) = elsewhere {
            return Ok(Self::Elsewhere(record.host, record.mode));
        }
        let here = active.iter().find(|record| record.host == this && record.boot_id == boot);
        Ok(here.map_or(Self::Idle, |record| Self::Here(record.mode)))
    }

    /// Refuses what another host's guest would write through.
    pub fn refuse_writer_elsewhere(self, key: VolumeKey) -> Result<()> {
        match self {
            Self::Elsewhere(host, Mode::ReadWrite) => {
                Err(Error::ActivatedOnAnotherHost { volume: key.to_string(), host })
            }
            _ => Ok(()),
        }
    }
}

/// Makes sure that no guest has a volume that is to be destroyed.
pub fn release(host: &Host, tree: &LoadedTree, key: VolumeKey) -> Result<()> {
    match Usage::of(host, tree, key)? {
        Usage::Idle => Ok(()),
        Usage::Here(_) => Err(live(key)),
        Usage::Elsewhere(host, _) => Err(Error::ActivatedOnAnotherHost { volume: key.to_string(), host }),
    }
}

/// Refuses what needs the volume to be inactive.
pub fn live(key: VolumeKey) -> Error {
    Error::VolumeInUse { volume: key.to_string(), reason: "it is active on this host".to_owned() }
}

/// Finds a volume of an SR that has its datapath on this host.
pub fn running_volume(host: &Host, sr: SrUuid) -> Result<Option<VolumeKey>> {
    let directory = host.runtime_dir().join("volumes");
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::on("listing", &directory)(error)),
    };
    let sr = match Sr::attached(host, sr) {
        Ok(sr) => sr,
        Err(Error::SrNotAttached(_)) => return Ok(None),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let name = entry.map_err(Error::on("listing", &directory))?.file_name();
        if let Some(key) = name.to_str().and_then(|name| name.parse().ok())
            && sr.load(key).is_ok()
        {
            return Ok(Some(key));
        }
    }
    Ok(None)
}
