//! Block devices of this host that volumes are shown as: which there are, what they are called, and who is given one.
//!
//! ```text
//!   /dev/xapi-storage-qcow2/<volume>   a symlink, made when the volume is activated, known when it is attached
//!      │
//!      ▼
//!   /dev/loop<n>   a loop device, marked with the volume and its runtime directory
//!      │
//!      ▼
//!   <volume's runtime directory>/device   the file of the device's server (the datapath's executable), in the server's
//!                                         own mount namespace; for all others it is empty
//! ```
//!
//! When what is done to them, and in which order, is in [`crate::attachment`].

mod looped;
mod server;

use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::host::{BlockDevices, Host};
use crate::id::{Domain, VolumeKey};
pub use looped::{Cleared, Loop, Mark};
pub use server::{LOG, kill_strays, serves, start, wait};

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
            host.is_xen_control_domain() && !has_another_way && can_be_made()
        }
    })
}

/// Tells whether this machine has what a device is made of.
fn can_be_made() -> bool {
    [server::FUSE, looped::CONTROL].into_iter().all(|path| Path::new(path).exists())
}
