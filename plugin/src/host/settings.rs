//! What an administrator may set for a host.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use crate::error::{Error, Result};

/// The settings of a host, from `/etc/xapi-storage-qcow2.json`: an object whose fields are all optional.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Seconds for a mirror's connection to be taken and the NBD handshake to end. Long: xapi's proxy opens its
    /// second leg, over HTTP to the other host, only after it was connected to.
    pub handshake_seconds: u64,
    /// Seconds a mirror's peer may owe an answer before the mirror fails. The guest does not wait for it.
    pub peer_silence_seconds: u64,
    /// Seconds that Datapath.deactivate waits for a mirror to drain.
    pub drain_seconds: u64,
    /// Seconds that a storage daemon may take for one QMP command.
    pub qmp_seconds: u64,
    /// Seconds that a call waits for a lock that another call holds.
    pub lock_seconds: u64,
    /// Seconds that SR.stat waits for an SR's file system before it says that it cannot be reached.
    pub file_system_seconds: u64,
    /// Whether mirrors send only what the destination is known to lack, where that is known.
    pub difference: bool,
    /// Whether source and destination are compared after a mirror that did not send everything.
    pub verify: bool,
    /// Whether space is brought back by itself.
    pub gc: bool,
    /// Whether nodes are merged that a guest has open.
    pub gc_live: bool,
    /// MiB a second that are copied while a guest has them open.
    pub gc_live_mib: u64,
    /// Who is given block devices.
    pub block_device: BlockDevices,
    /// What block devices are made with.
    pub block_device_driver: BlockDeviceDriver,
    /// What goes to the host's log: levels, for all or for a module, between commas.
    pub log: String,
}

/// Whether guests and dom0 are given block devices of volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockDevices {
    /// In a Xen control domain, where guests need them, if it has what they are made of.
    Auto,
    /// Wherever this is. What they are made of has to be there.
    Always,
    /// Nowhere.
    Never,
}

/// What block devices are made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockDeviceDriver {
    /// The kernel's nbd driver, where there is one and it takes the device; else as [`Self::Loop`].
    Auto,
    /// The kernel's nbd driver.
    Nbd,
    /// A loop device over a file that is served by FUSE.
    Loop,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            handshake_seconds: 60,
            peer_silence_seconds: 30,
            drain_seconds: 30,
            qmp_seconds: 20,
            lock_seconds: 60,
            file_system_seconds: 10,
            difference: true,
            verify: false,
            gc: true,
            gc_live: true,
            gc_live_mib: 64,
            block_device: BlockDevices::Auto,
            block_device_driver: BlockDeviceDriver::Auto,
            log: "info".to_owned(),
        }
    }
}

impl Settings {
    /// Reads the settings from a file; one that is not there means the defaults.
    pub(super) fn read(path: &Path) -> Result<Self> {
        match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| Error::DamagedRecord { path: path.to_owned(), reason: error.to_string() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(Error::io(format!("reading {}", path.display()), error)),
        }
    }

    /// Gives [`Self::qmp_seconds`] as a duration.
    pub fn qmp(&self) -> Duration {
        Duration::from_secs(self.qmp_seconds)
    }

    /// Gives [`Self::file_system_seconds`] as a duration.
    pub fn file_system(&self) -> Duration {
        Duration::from_secs(self.file_system_seconds)
    }

    /// Gives [`Self::lock_seconds`] as a duration.
    pub fn lock(&self) -> Duration {
        Duration::from_secs(self.lock_seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_means_defaults_and_an_unknown_field_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("settings.json");
        assert_eq!(Settings::read(&path).unwrap(), Settings::default());
        fs::write(&path, r#"{"drain_seconds": 5, "difference": false, "block_device": "never"}"#).unwrap();
        let expected = Settings {
            drain_seconds: 5,
            difference: false,
            block_device: BlockDevices::Never,
            ..Settings::default()
        };
        assert_eq!(Settings::read(&path).unwrap(), expected);
        fs::write(&path, r#"{"drain_second": 5}"#).unwrap();
        assert!(Settings::read(&path).unwrap_err().to_string().contains("settings.json"));
    }
}
