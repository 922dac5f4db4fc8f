//! This host: who it is, where it keeps its runtime state, and how it is set up.

mod launch;
mod process;
mod program;
pub mod service;
mod settings;

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::id::{MirrorKey, SrUuid, VolumeKey};
pub use launch::Launch;
pub use process::Process;
pub(crate) use process::end_with_this;
pub use program::this_program;
pub use settings::{BlockDeviceDriver, BlockDevices, Settings};

/// The variable that puts a directory before every absolute path of the host but those of SRs, so that several
/// hosts can live on one machine.
pub const ROOT_VARIABLE: &str = "XAPI_STORAGE_QCOW2_ROOT";

/// This host.
///
/// ```text
/// /etc/xensource-inventory         INSTALLATION_UUID: the host's uuid
/// /etc/xapi-storage-qcow2.json     settings, all optional
/// /dev/xapi-storage-qcow2/<volume>  a symlink to the volume's block device
/// /run/xapi-storage-qcow2/
///     programs.json                what was found out of QEMU's programs
///     srs/<sr uuid>.json           an attached SR: where it is
///     volumes/<volume uuid>/       a volume with a datapath: its daemon, sockets and state
///     mirrors/<mirror key>/        a mirror: its supervisor and state
///     launch/<unit>/               a service that is being started: what it is to run
///     gc/<sr uuid>.json            what the last one that brought space back did
///     failures                     what failed last
/// ```
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
}

impl Host {
    /// Takes the host from the environment: the machine itself, or what [`ROOT_VARIABLE`] names.
    pub fn from_environment() -> Self {
        Self::at(std::env::var_os(ROOT_VARIABLE).unwrap_or_else(|| "/".into()))
    }

    /// Takes the host whose files are below `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Gives the directory below which this host's files are.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Reads the host's uuid: XenServer's from the inventory or, on a machine that has none, the machine id's.
    ///
    /// # Errors
    ///
    /// When neither file can be read, or the inventory has no usable `INSTALLATION_UUID`.
    pub fn uuid(&self) -> Result<Uuid> {
        let inventory = self.root.join("etc/xensource-inventory");
        match fs::read_to_string(&inventory) {
            Ok(text) => {
                let value = text.lines().find_map(|line| line.trim().strip_prefix("INSTALLATION_UUID="));
                value.and_then(|value| Uuid::try_parse(value.trim_matches(['\'', '"'])).ok()).ok_or_else(|| {
                    Error::DamagedRecord { path: inventory, reason: "no INSTALLATION_UUID in it".to_owned() }
                })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let path = Path::new("/etc/machine-id");
                let text = fs::read_to_string(path).map_err(Error::on("reading", path))?;
                Uuid::try_parse(text.trim()).map_err(|_| Error::DamagedRecord {
                    path: path.to_owned(),
                    reason: "not a machine id".to_owned(),
                })
            }
            Err(error) => Err(Error::io(format!("reading {}", inventory.display()), error)),
        }
    }

    /// Reads the id of this boot, by which records of an earlier boot are told.
    ///
    /// # Errors
    ///
    /// When the kernel's file cannot be read.
    pub fn boot_id(&self) -> Result<Uuid> {
        let below = self.root.join("proc/sys/kernel/random/boot_id");
        let path = if below.exists() { below } else { PathBuf::from("/proc/sys/kernel/random/boot_id") };
        let text = fs::read_to_string(&path).map_err(Error::on("reading", &path))?;
        Uuid::try_parse(text.trim()).map_err(|_| Error::DamagedRecord { path, reason: "not a boot id".to_owned() })
    }

    /// Tells whether this is Xen's control domain, dom0, whose blkback gives guests their disks.
    pub fn is_xen_control_domain(&self) -> bool {
        let capabilities = fs::read_to_string(self.root.join("proc/xen/capabilities"));
        capabilities.is_ok_and(|capabilities| capabilities.contains("control_d"))
    }

    /// Reads the settings; a file that is not there means the defaults.
    ///
    /// # Errors
    ///
    /// When the file is there and cannot be understood.
    pub fn settings(&self) -> Result<Settings> {
        Settings::read(&self.root.join("etc/xapi-storage-qcow2.json"))
    }

    /// Gives an absolute path that is not an SR's, such as xapi gives, as it is on this host.
    pub fn below_root(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Gives the directory of all runtime state.
    pub fn runtime_dir(&self) -> PathBuf {
        self.root.join("run/xapi-storage-qcow2")
    }

    /// Gives the file that says where an attached SR is.
    pub fn sr_record(&self, sr: SrUuid) -> PathBuf {
        self.runtime_dir().join(format!("srs/{sr}.json"))
    }

    /// Gives the runtime directory of a volume.
    pub fn volume_dir(&self, volume: VolumeKey) -> PathBuf {
        self.runtime_dir().join(format!("volumes/{volume}"))
    }

    /// Gives the directory in which a worker makes sockets; with the extension `json` it is the worker's record.
    pub fn gc_dir(&self, sr: SrUuid) -> PathBuf {
        self.runtime_dir().join(format!("gc/{sr}"))
    }

    /// Gives the runtime directory of a mirror.
    pub fn mirror_dir(&self, mirror: MirrorKey) -> PathBuf {
        self.runtime_dir().join(format!("mirrors/{mirror}"))
    }

    /// Makes a directory below the runtime directory with its parents, each readable by its owner alone.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn make_runtime_dir(&self, path: &Path) -> Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(Error::on("making directory", path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_uuid_comes_from_the_inventory() {
        let root = tempfile::tempdir().unwrap();
        let uuid = Uuid::new_v4();
        fs::create_dir(root.path().join("etc")).unwrap();
        let inventory = root.path().join("etc/xensource-inventory");
        fs::write(&inventory, format!("PRODUCT='x'\nINSTALLATION_UUID='{uuid}'\n")).unwrap();
        assert_eq!(Host::at(root.path()).uuid().unwrap(), uuid);
        fs::write(&inventory, "INSTALLATION_UUID=''\n").unwrap();
        let error = Host::at(root.path()).uuid().unwrap_err();
        assert!(error.to_string().contains("xensource-inventory"), "{error}");
    }

    #[test]
    fn a_host_below_a_root_can_have_a_boot_id_of_its_own() {
        let root = tempfile::tempdir().unwrap();
        let real = Host::at(root.path()).boot_id().unwrap();
        let dir = root.path().join("proc/sys/kernel/random");
        fs::create_dir_all(&dir).unwrap();
        let boot = Uuid::new_v4();
        fs::write(dir.join("boot_id"), format!("{boot}\n")).unwrap();
        assert_eq!(Host::at(root.path()).boot_id().unwrap(), boot);
        assert_ne!(boot, real);
    }
}
