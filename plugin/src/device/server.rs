//! The process behind a block device: started, waited for, found again.

use std::fs::{self, File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Connection, Driver, ENTRY, Shown, file, kernel};
use crate::error::{Error, Result};
use crate::host::{Host, Launch, Process, this_program};
use crate::id::VolumeKey;

/// What a FUSE server speaks to.
pub(super) const FUSE: &str = "/dev/fuse";

/// What a server prints goes here.
pub const LOG: &str = "device.log";

/// How often it is looked whether a new server is ready.
const LOOK: Duration = Duration::from_millis(1);

/// Starts the server of a volume whose export is there. The caller holds the volume's lock, and knows of none that runs.
///
/// # Errors
///
/// When it cannot be started.
pub fn start(host: &Host, directory: &Path, volume: VolumeKey, driver: Driver) -> Result<Process> {
    let path = file(directory);
    // It is found by this, if it is found in no record.
    let made = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
    made.map_err(Error::on("making", &path))?;
    let program = this_program()?;
    let unit = format!("xapi-storage-qcow2-device@{volume}");
    let arguments = [ENTRY.into(), directory.into(), driver.word().into()];
    let log = directory.join(LOG);
    Launch { unit: &unit, program: &program, arguments: &arguments, log: &log, observed: false }.start(host)
}

/// Waits until a server shows its file, and opens that.
///
/// # Errors
///
/// When the server ends instead, with its last words, or is not ready in time.
pub fn wait_for_file(
    host: &Host,
    directory: &Path,
    server: &Process,
    writable: bool,
    patience: Duration,
) -> Result<File> {
    let path = seen_by(server, &file(directory));
    wait(host, directory, server, patience, || {
        // Before the mount it is an empty file, or nothing.
        if !fs::metadata(&path).is_ok_and(|metadata| metadata.len() > 0) {
            return Ok(None);
        }
        let opened = OpenOptions::new().read(true).write(writable).open(&path);
        opened.map(Some).map_err(Error::on("opening", &path))
    })
}

/// Waits until a server has the kernel's driver connected.
///
/// # Errors
///
/// As [`wait_for_file`].
pub fn wait_for_connection(
    host: &Host,
    directory: &Path,
    server: &Process,
    patience: Duration,
) -> Result<Connection> {
    wait(host, directory, server, patience, || {
        let connection = kernel::connection(directory)?.filter(|connection| connection.ready);
        Ok(connection.filter(|connection| Shown::Nbd(*connection).path().exists()))
    })
}

/// Waits until a server is ready.
fn wait<T>(
    host: &Host,
    directory: &Path,
    server: &Process,
    patience: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(ready) = look()? {
            return Ok(ready);
        }
        if !server.is_alive(host) {
            let said = fs::read_to_string(directory.join(LOG)).unwrap_or_default();
            let reason = said.lines().next_back().unwrap_or("it ended without a word").to_owned();
            return Err(Error::Qemu { doing: "making a block device".to_owned(), reason });
        }
        if Instant::now() >= deadline {
            let doing = "waiting for the server of a block device".to_owned();
            return Err(Error::Timeout { doing, seconds: patience.as_secs() });
        }
        std::thread::sleep(LOOK);
    }
}

/// Ends a server, so that whoever waits for its device has an answer, although it or the daemon hangs. An nbd device's
/// cuts the connection; where it cannot, the daemon is killed, at the other end.
///
/// # Errors
///
/// [`Error::Timeout`] when a process does not end.
pub fn release(
    host: &Host,
    directory: &Path,
    server: Option<&Process>,
    daemon: Option<&Process>,
    patience: Duration,
) -> Result<()> {
    let is_connected = kernel::connection(directory)?.is_some();
    if let Some(server) = server {
        let asked = (0..2).all(|_| kernel::ask_to_end(directory).is_ok());
        if is_connected && asked && server.wait(host, patience) {
            return Ok(());
        }
        // What the kernel has is cut off below, and by who has killed it.
        server.signal(host, rustix::process::Signal::KILL);
    }
    if let Some(daemon) = daemon.filter(|_| is_connected) {
        tracing::error!(pid = daemon.pid, "killing a storage daemon that a block device waits for");
        daemon.kill(host, patience)?;
    }
    match server {
        Some(server) => server.kill(host, patience),
        None => Ok(()),
    }
}

/// Ends the server of a volume, if there is one, and removes what it leaves: an nbd device that is connected, and files.
/// The loop device is cleared already.
///
/// # Errors
///
/// [`Error::Timeout`] when a process does not end; when the kernel refuses.
pub fn remove_rest(host: &Host, directory: &Path, server: Option<&Process>, patience: Duration) -> Result<()> {
    if let Some(server) = server {
        let is_ready = kernel::connection(directory)?.is_some_and(|connection| connection.ready);
        // First by a goodbye, which a daemon that hangs may not take.
        let has_ended = || kernel::ask_to_end(directory).is_ok() && server.wait(host, patience);
        if !(is_ready && (has_ended() || has_ended())) {
            server.kill(host, patience)?;
        }
    }
    if let Some(connection) = kernel::connection(directory)? {
        kernel::disconnect_left(connection)?;
        if connection.is_held()? {
            let device = Shown::Nbd(connection).path();
            tracing::warn!(device = %device.display(), "a block device is taken from under who has it open");
        }
    }
    for path in [directory.join(LOG), kernel::control(directory), kernel::record(directory), file(directory)] {
        crate::record::remove(&path)?;
    }
    Ok(())
}

/// Gives a path as a process sees it.
fn seen_by(process: &Process, path: &Path) -> PathBuf {
    let root = PathBuf::from(format!("/proc/{}/root", process.pid));
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// Tells whether a process is the server of a volume, and runs.
pub fn serves(host: &Host, directory: &Path, process: &Process) -> bool {
    process.is_alive(host) && is_in(process.pid, directory)
}

/// Kills servers that run for a volume though no record tells of them.
///
/// # Errors
///
/// [`Error::Timeout`] when one does not end.
pub fn kill_strays(host: &Host, directory: &Path, patience: Duration) -> Result<()> {
    let proc = Path::new("/proc");
    let entries = fs::read_dir(proc).map_err(Error::on("listing", proc))?;
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    for pid in pids.filter(|pid| is_in(*pid, directory)) {
        if let Ok(process) = Process::of_pid(host, pid) {
            tracing::warn!(pid, "killing the server of a block device that no record tells of");
            process.kill(host, patience)?;
        }
    }
    Ok(())
}

/// Tells whether a process is the server of a volume, by its command line.
fn is_in(pid: i32, directory: &Path) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words = line.split(|byte| *byte == 0).skip_while(|word| *word != ENTRY.as_bytes());
    words.nth(1) == Some(directory.as_os_str().as_bytes())
}
