//! Devices of the kernel's nbd driver: connected, found again by the socket that they hold, ended.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::netlink::Driver;
use crate::error::{Error, Result};
use crate::nbd::Export;
use crate::record::{self, Durability, Record};

/// There as long as the driver is.
const MODULE: &str = "/sys/module/nbd";

/// Where modprobe may be.
const MODPROBE: [&str; 2] = ["/sbin/modprobe", "/usr/sbin/modprobe"];

/// The numbers that are taken. xapi's nbd_client_manager looks for a free device below 1,000, and only among those that
/// there are from the beginning: with these neither waits for the other, nor is short of devices for the other's.
const NUMBERS: std::ops::Range<u32> = 1000..9000;

/// The device that a volume is shown as, in `device.json` of its runtime directory. It is written before the
/// device is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connection {
    /// The format of the record.
    format: u64,
    /// The device's number, or one that is tried.
    pub number: u32,
    /// The inode of the socket that the driver is given. No other socket of this boot has it, so that as long as there is
    /// such a socket, and nobody but the driver can have it, the device is this one.
    socket: u64,
    /// Whether it is connected.
    pub ready: bool,
}

impl Record for Connection {
    const FORMAT: u64 = 1;
}

/// Gives the path of a device.
pub(super) fn path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/nbd{number}"))
}

/// Gives the file with the connection of a volume.
pub(super) fn record(directory: &Path) -> PathBuf {
    directory.join("device.json")
}

/// Gives the socket on which a device's keeper is asked to end it; see [`ask_to_end`].
pub(super) fn control(directory: &Path) -> PathBuf {
    directory.join("device.sock")
}

/// Loads the driver where it is a module, and tells whether it is there.
pub(super) fn load() -> bool {
    let is_there = || Path::new(MODULE).exists();
    if is_there() {
        return true;
    }
    let Some(modprobe) = MODPROBE.into_iter().find(|path| Path::new(path).exists()) else { return false };
    // As many devices as xapi's nbd_client_manager asks for, which finds the driver loaded then.
    let mut command = Command::new(modprobe);
    command.args(["-q", "nbd", "nbds_max=24"]).env_clear();
    let loaded = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    loaded.is_ok_and(|status| status.success()) && is_there()
}

/// Reads what is recorded of a volume's device.
///
/// # Errors
///
/// When the record cannot be read.
pub fn connection(directory: &Path) -> Result<Option<Connection>> {
    record::read_if_present(&record(directory))
}

/// Listens for those who ask that a device is ended, in place of who did so before.
///
/// # Errors
///
/// When the socket cannot be made.
pub fn listen(directory: &Path) -> Result<UnixListener> {
    let path = control(directory);
    record::remove(&path)?;
    UnixListener::bind(&path).map_err(Error::on("listening at", &path))
}

/// Asks the keeper of a volume's device to end it. Asked again, it cuts the connection first, for which nobody has to
/// answer.
///
/// # Errors
///
/// When there is no keeper.
pub(super) fn ask_to_end(directory: &Path) -> Result<()> {
    let path = control(directory);
    UnixStream::connect(&path).map(drop).map_err(Error::on("connecting to", &path))
}

/// Makes a device that shows an export, of which `socket` is a connection in the transmission phase.
///
/// # Errors
///
/// When the driver is not there, or refuses.
pub fn connect(directory: &Path, socket: &UnixStream, export: Export) -> Result<Connection> {
    let driver = Driver::find().map_err(failed("looking for the kernel's nbd driver"))?;
    let status = rustix::fs::fstat(socket).map_err(|error| failed("looking at a socket")(error.into()))?;
    let _others = wait_for_others()?;
    for number in NUMBERS {
        // There only while it is connected.
        if Path::new(&format!("/sys/block/nbd{number}/pid")).exists() {
            continue;
        }
        let mut connection = Connection { format: Connection::FORMAT, number, socket: status.st_ino, ready: false };
        record::write(&record(directory), &connection, Durability::UntilReboot)?;
        match driver.connect(number, socket.as_fd(), export) {
            Ok(()) => {
                connection.ready = true;
                record::write(&record(directory), &connection, Durability::UntilReboot)?;
                return Ok(connection);
            }
            // Somebody else's, or open still.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EEXIST)) => {}
            Err(error) => return Err(Error::on("connecting", &path(number))(error)),
        }
    }
    Err(Error::Internal("every nbd device is taken".to_owned()))
}

/// Ends the device of a keeper that runs: nobody else ends it.
///
/// # Errors
///
/// When the kernel refuses.
pub fn disconnect(connection: Connection) -> Result<()> {
    let ended = Driver::find().and_then(|driver| driver.disconnect(connection.number));
    ended.map_err(Error::on("disconnecting", &path(connection.number)))
}

/// Ends a device whose keeper is dead, if it is still this volume's.
///
/// # Errors
///
/// When the kernel refuses.
pub(super) fn disconnect_left(connection: Connection) -> Result<()> {
    let _others = wait_for_others()?;
    if connection.is_held()? { disconnect(connection) } else { Ok(()) }
}

impl Connection {
    /// Tells whether the socket is there: with its keeper dead, whether the driver has it.
    ///
    /// # Errors
    ///
    /// When the kernel's list cannot be read.
    pub fn is_held(self) -> Result<bool> {
        let path = Path::new("/proc/net/unix");
        let table = fs::read_to_string(path).map_err(Error::on("reading", path))?;
        // Num RefCount Protocol Flags Type St Inode Path
        let inodes = table.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().nth(6)?.parse().ok());
        Ok(inodes.into_iter().any(|inode: u64| inode == self.socket))
    }

    /// Tells whether somebody has the device open, or mounted. Not all can be seen: the kernel's own users cannot.
    pub fn is_open(self) -> bool {
        let path = path(self.number);
        let exclusive = OFlags::EXCL.bits().cast_signed();
        let claimed = OpenOptions::new().read(true).custom_flags(exclusive).open(&path);
        if claimed.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY)) {
            return true;
        }
        let Ok(device) = fs::metadata(&path).map(|metadata| metadata.rdev()) else { return false };
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let mut open = processes.flat_map(|process| fs::read_dir(process.path().join("fd")).into_iter().flatten());
        open.any(|descriptor| {
            let opened = descriptor.and_then(|descriptor| fs::metadata(descriptor.path()));
            opened.is_ok_and(|opened| opened.file_type().is_block_device() && opened.rdev() == device)
        })
    }
}

/// Waits until no other keeper takes a number, and no call gives one back. The kernel's own directory is the lock: hosts
/// that live on one machine have it in common.
fn wait_for_others() -> Result<File> {
    let path = Path::new(MODULE);
    let lock = File::open(path).and_then(|file| file.lock().map(|()| file));
    lock.map_err(Error::on("locking", path))
}

/// Makes an error of what failed.
fn failed(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |error| Error::io(doing, error)
}
