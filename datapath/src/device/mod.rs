//! The block device of a volume: a process that shows the volume's export as one file, which a loop device lies on.
//!
//! ```text
//!   /dev/xapi-storage-qcow2/<volume> ─► /dev/loop<n> ──file──► FUSE ──► this process ──► nbd.sock ──► storage daemon
//! ```
//!
//! The storage daemon could show such a file itself (`block-export-add`, type fuse), but up to 10.1 it spoils what is
//! written while another request comes in (docs/qemu.md), and it answers nobody else while it writes. This process is
//! one more NBD client of the daemon, and passes requests on as they come, any number at a time.
//!
//! The file is mounted in a mount namespace of the process alone, and goes with it: a process that is killed leaves no
//! mount. Who makes the loop device, and takes it away, is [`plugin::attachment`]; it reaches the file by way of
//! `/proc/<pid>/root`. The process must not open it itself: one that waits for its own answer cannot be killed.
//!
//! Where the kernel has a driver for nbd, that is given the connection, and the process only looks after it:
//!
//! ```text
//!   /dev/xapi-storage-qcow2/<volume> ─► /dev/nbd<n> ─► nbd.sock ─► storage daemon
//! ```
//!
//! When the daemon dies, the process ends, and whoever has the device open is told of an error at once. It never
//! connects again: a new daemon may lack what the last one had not flushed.

mod keep;
mod protocol;
mod serve;

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use plugin::device::{self, Driver};
use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::id::VolumeKey;
use plugin::nbd;
use plugin::qemu::daemon::Sockets;
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};
use tokio::net::UnixStream;

use crate::detached;

/// Serves the device of the volume whose runtime directory is given, with what it is made. The exit status is for people.
pub fn main(host: &Host, mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let directory = arguments.next().unwrap_or_default().to_string_lossy().into_owned();
    let is_nbd = arguments.next().is_some_and(|word| word == Driver::Nbd.word());
    let driver = if is_nbd { Driver::Nbd } else { Driver::Loop };
    let key = directory.rsplit('/').next().unwrap_or_default().to_owned();
    detached::run(host, "device", &key, async |key| run(host, Path::new(&directory), key, driver).await)
}

async fn run(host: &Host, directory: &Path, key: VolumeKey, driver: Driver) -> Result<()> {
    let patience = Duration::from_secs(host.settings()?.handshake_seconds);
    let socket = Sockets::of(directory).nbd();
    let chosen = async {
        let mut stream = UnixStream::connect(&socket).await.map_err(Error::on("connecting to", &socket))?;
        let export = nbd::choose(&mut stream, &key.to_string()).await?;
        let stream = stream.into_std().map_err(|error| Error::io("taking the connection", error))?;
        Ok((stream, export))
    };
    let timed_out = || Error::Timeout { doing: "choosing the export".to_owned(), seconds: patience.as_secs() };
    let (stream, export) = tokio::time::timeout(patience, chosen).await.map_err(|_| timed_out())??;
    stream.set_nonblocking(false).map_err(|error| Error::io("taking the connection", error))?;
    if driver == Driver::Nbd {
        return keep::keep(directory, stream, export);
    }
    let fuse = mount(&device::file(directory))?;
    // It has all it needs. The threads that serve come from this one.
    let none = CapabilitySet::empty();
    let nothing = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, nothing)
        .map_err(|error| Error::io("giving up capabilities", error.into()))?;
    serve::serve(fuse, stream, export)
}

/// Mounts a file whose content is what this process says, where only this process and its children see it.
fn mount(file: &Path) -> Result<File> {
    let path = Path::new("/dev/fuse");
    let fuse = OpenOptions::new().read(true).write(true).open(path).map_err(Error::on("opening", path))?;
    // SAFETY: only the view of mounts becomes this process's own. No descriptor goes, which is what could be unsafe.
    #[allow(unsafe_code)]
    let unshared = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) };
    let failed = |doing: &str, error: rustix::io::Errno| Error::io(doing, error.into());
    unshared.map_err(|error| failed("taking a mount namespace", error))?;
    // What is mounted here stays here; what others unmount is unmounted here too, and not kept busy.
    rustix::mount::mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(|error| failed("keeping mounts to itself", error))?;
    // A regular file for root alone, as everything of it that the kernel asks for.
    let options = format!("fd={},rootmode=100600,user_id=0,group_id=0\0", fuse.as_raw_fd());
    let options = std::ffi::CStr::from_bytes_with_nul(options.as_bytes()).ok();
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount(device::SUBJECT, file, "fuse", flags, options).map_err(Error::on("mounting", file))?;
    Ok(fuse)
}
