//! The process behind a block device: started, waited for, found again.

use std::fs::{self, File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{ENTRY, file};
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
pub fn start(host: &Host, directory: &Path, volume: VolumeKey) -> Result<Process> {
    let path = file(directory);
    // It is found by this, if it is found in no record.
    let made = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
    made.map_err(Error::on("making", &path))?;
    let program = this_program()?;
    let unit = format!("xapi-storage-qcow2-device@{volume}");
    let arguments = [ENTRY.into(), directory.into()];
    let log = directory.join(LOG);
    Launch { unit: &unit, program: &program, arguments: &arguments, log: &log, observed: false }.start(host)
}

/// Waits until a server shows its file, and opens that.
///
/// # Errors
///
/// When the server ends instead, with its last words, or is not ready in time.
pub fn wait(host: &Host, directory: &Path, server: &Process, writable: bool, patience: Duration) -> Result<File> {
    let deadline = Instant::now() + patience;
    let path = seen_by(server, &file(directory));
    loop {
        // Before the mount it is an empty file, or nothing.
        if fs::metadata(&path).is_ok_and(|metadata| metadata.len() > 0) {
            return OpenOptions::new().read(true).write(writable).open(&path).map_err(Error::on("opening", &path));
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
