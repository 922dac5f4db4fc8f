//! Block devices of this host that volumes are shown as: which there are, what they are called, and who is given one.
//!
//! ```text
//!   /dev/xapi-storage-qcow2/<volume>   a symlink, made when the volume is activated, known when it is attached
//!      │                          │
//!      ▼                          ▼
//!   /dev/nbd<n>                 /dev/loop<n>   a loop device, marked with the volume and its runtime directory
//!   of the kernel's nbd           │
//!   driver, which speaks to       ▼
//!   the storage daemon          <volume's runtime directory>/device   the file of the device's server, in the server's own
//!                                                                     mount namespace; for all others it is empty
//! ```
//!
//! Either has a process, the datapath's executable, which is called its server: of the loop device it passes the kernel's
//! requests on, of the nbd device it only looks after the connection. The file `device` is there as long as there may be
//! either.
//!
//! When what is done to them, and in which order, is in [`crate::attachment`].

pub mod kernel;
mod looped;
mod netlink;
mod server;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::host::{BlockDeviceDriver, BlockDevices, Host, Settings};
use crate::id::{Domain, VolumeKey};
pub use kernel::Connection;
pub use looped::{Cleared, Loop, Mark};
pub use server::{LOG, kill_strays, release, remove_rest, serves, start, wait_for_connection, wait_for_file};

/// The argument by which the datapath's executable is a device's server; the volume's runtime directory follows.
pub const ENTRY: &str = "device-server";

/// What the server's mount is called.
pub const SUBJECT: &str = "xapi-storage-qcow2";

/// Gives the path by which a volume's device is known. xapi cuts off `/dev/` where it plugs a disk into dom0 (xen-api
/// `ocaml/xapi/xapi_vbd.ml`), so it is there.
pub fn path(host: &Host, volume: VolumeKey) -> PathBuf {
    host.root().join("dev/xapi-storage-qcow2").join(volume.to_string())
}

/// Gives the file that a device's server shows, which is there as long as there may be a server.
pub fn file(directory: &Path) -> PathBuf {
    directory.join("device")
}

const WRITE_BACK: libc::Ioctl = 0x1261; // BLKFLSBUF

/// What a device is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// The kernel's nbd driver.
    Nbd,
    /// A loop device over a file that a process of ours serves by FUSE.
    Loop,
}

impl Driver {
    /// The argument, after that of the directory, by which the server knows.
    pub fn word(self) -> &'static str {
        match self {
            Self::Nbd => "nbd",
            Self::Loop => "loop",
        }
    }

    /// Gives what devices are made with on this host, the first choice first.
    pub fn choices(settings: &Settings) -> &'static [Self] {
        match settings.block_device_driver {
            BlockDeviceDriver::Nbd => {
                // Without it the server says what is missing.
                kernel::load();
                &[Self::Nbd]
            }
            BlockDeviceDriver::Loop => &[Self::Loop],
            BlockDeviceDriver::Auto if kernel::load() => &[Self::Nbd, Self::Loop],
            BlockDeviceDriver::Auto => &[Self::Loop],
        }
    }
}

/// A device that a volume is shown as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// A loop device.
    Loop(Loop),
    /// An nbd device.
    Nbd(Connection),
}

impl Shown {
    /// Gives the device's path.
    pub fn path(self) -> PathBuf {
        match self {
            Self::Loop(device) => device.path(),
            Self::Nbd(connection) => kernel::path(connection.number),
        }
    }

    /// Passes what the kernel holds back of the device's data on to what is below.
    ///
    /// # Errors
    ///
    /// When the kernel refuses. That a write failed is told to whoever wrote.
    pub fn write_back(self) -> Result<()> {
        let path = self.path();
        let device = OpenOptions::new().read(true).open(&path).map_err(Error::on("opening", &path))?;
        // SAFETY: BLKFLSBUF takes no argument.
        #[allow(unsafe_code)]
        let done = unsafe { libc::ioctl(device.as_raw_fd(), WRITE_BACK, 0) };
        if done == 0 { Ok(()) } else { Err(Error::on("writing back", &path)(io::Error::last_os_error())) }
    }
}

/// xapi's own way from an NBD export to a block device of dom0.
const NBD_CLIENT_MANAGER: &str = "opt/xensource/libexec/nbd_client_manager.py";

/// Tells whether a domain is given a block device. A migration's domains have no use for one: they are there for an NBD
/// connection.
///
/// Left to itself, that is a guest in a Xen control domain, whose disk is else nobody's. What dom0 plugs into itself xapi
/// connects by NBD on its own, where it can, and then reads only what there is of a disk that it exports (xen-api
/// `ocaml/xapi/stream_vdi.ml`), which it does not of another device.
///
/// # Errors
///
/// When the settings cannot be read.
pub fn is_for(host: &Host, domain: &Domain) -> Result<bool> {
    if domain.is_migration() {
        return Ok(false);
    }
    Ok(match host.settings()?.block_device {
        BlockDevices::Never => false,
        BlockDevices::Always => true,
        BlockDevices::Auto => {
            let has_another_way = domain.is_control_domain() && host.root().join(NBD_CLIENT_MANAGER).exists();
            host.is_xen_control_domain() && !has_another_way && can_be_made(&host.settings()?)
        }
    })
}

/// Tells whether this machine has what a device is made of.
fn can_be_made(settings: &Settings) -> bool {
    Driver::choices(settings).iter().any(|driver| match driver {
        Driver::Nbd => kernel::load(),
        Driver::Loop => [server::FUSE, looped::CONTROL].into_iter().all(|path| Path::new(path).exists()),
    })
}
