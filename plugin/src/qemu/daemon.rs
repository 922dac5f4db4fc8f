//! The storage daemon of one volume: started, found again, stopped.
//!
//! Everything of it is in the volume's runtime directory:
//!
//! ```text
//! qmp.sock        the monitor for calls; who uses it holds the volume's lock
//! mirror.sock     a second monitor, because one serves a single client at a time: a mirror's supervisor keeps it
//! nbd.sock        the NBD server
//! daemon.pid      QEMU's pid file, which it keeps locked: a second daemon beside it does not start
//! daemon.log      what the daemon printed
//! ```

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::qmp::Client;
use super::{StorageDaemon, graph, storage_daemon};
use crate::error::{Error, Result};
use crate::host::{Host, Launch, Process, Settings};
use crate::record;
use crate::trace;

/// How long a daemon may take to end after it was asked to, before it is asked less kindly.
const GRACE: Duration = Duration::from_secs(2);

/// How long a new daemon may take to answer its first client; it takes milliseconds.
const FIRST_ANSWER: Duration = Duration::from_secs(3);

/// The files of a daemon, without its log.
const FILES: [&str; 4] = ["qmp.sock", "mirror.sock", "nbd.sock", "daemon.pid"];

/// What the daemon prints goes here.
const LOG: &str = "daemon.log";

/// How much of the log is quoted when a daemon does not start, in bytes.
const QUOTED: usize = 1000;

/// Where a daemon's sockets are.
#[derive(Clone, Debug)]
pub struct Sockets {
    directory: PathBuf,
}

impl Sockets {
    /// Takes the runtime directory of a volume.
    pub fn of(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// The monitor for calls, which hold the volume's lock.
    pub fn qmp(&self) -> PathBuf {
        self.directory.join("qmp.sock")
    }

    /// The monitor for a mirror's supervisor.
    pub fn mirror(&self) -> PathBuf {
        self.directory.join("mirror.sock")
    }

    /// The NBD server.
    pub fn nbd(&self) -> PathBuf {
        self.directory.join("nbd.sock")
    }
}

/// Starts a daemon with an NBD server and nothing open, and waits until it answers.
///
/// What a daemon that has ended left in the directory is replaced; one that still runs there, though no record tells
/// of it, is killed first. Where it is confined it may write to the SR's directory. The caller holds the volume's lock.
///
/// # Errors
///
/// When the program is not there, ends at once or does not answer in time. No process is left then.
pub async fn spawn(host: &Host, directory: &Path, unit: &str, sr: Option<&Path>) -> Result<Process> {
    let settings = host.settings()?;
    kill_strays(host, directory, settings.qmp())?;
    let program = storage_daemon(host)?;
    let arguments = arguments(directory)?;
    let log = directory.join(LOG);
    let _timed = trace::timed("qemu-storage-daemon", "start");
    let deadline = Instant::now() + settings.qmp();
    loop {
        remove_files(directory)?;
        let process = Launch { unit, program: &program.path, arguments: &arguments, log: &log, observed: false }
            .start_for(host, sr)?;
        let (error, is_deaf) = match make_ready(host, &process, directory, &program, &settings, deadline).await {
            Ok(()) => return Ok(process),
            Err(Startup::Deaf(error)) => (error, true),
            Err(Startup::Failed(error)) => (error, false),
        };
        if let Err(undo) = process.kill(host, settings.qmp()) {
            return Err(error.undone(Err(undo)));
        }
        if !is_deaf || Instant::now() >= deadline {
            return Err(error);
        }
        tracing::warn!(error = error.chain(), "a new storage daemon does not answer: starting another");
    }
}

/// Kills daemons that run in a directory, by who holds the volume's lock and has no record of any.
///
/// # Errors
///
/// [`Error::Timeout`] when one does not end.
pub fn kill_strays(host: &Host, directory: &Path, patience: Duration) -> Result<()> {
    // Without a log none was ever started there.
    let strays = if directory.join(LOG).exists() { running_in(host, directory)? } else { Vec::new() };
    for stray in strays {
        tracing::warn!(pid = stray.pid, "killing a storage daemon that no record tells of");
        stray.kill(host, patience)?;
    }
    Ok(())
}

/// Tells whether a process is the daemon of a volume, and runs.
pub fn is_running(host: &Host, directory: &Path, process: &Process) -> bool {
    process.is_alive(host) && is_in(process.pid, directory)
}

/// Stops a daemon, by force if need be, and removes its sockets. What it has open should be closed before.
///
/// # Errors
///
/// [`Error::Timeout`] when the process does not end even when killed: it hangs in the kernel, and may still write.
pub async fn stop(host: &Host, directory: &Path, process: &Process) -> Result<()> {
    let settings = host.settings()?;
    if is_running(host, directory, process) {
        match quit(directory).await {
            Ok(()) if process.wait(host, GRACE) => {}
            quitted => {
                if let Err(error) = quitted {
                    tracing::warn!(error = error.chain(), "the storage daemon does not take the command to quit");
                }
                process.signal(host, Signal::TERM);
                if !process.wait(host, GRACE) {
                    tracing::error!(pid = process.pid, "killing the storage daemon");
                    process.kill(host, settings.qmp())?;
                }
            }
        }
    }
    remove_files(directory)
}

/// Asks the daemon to end.
async fn quit(directory: &Path) -> Result<()> {
    let client = Client::connect_at_once(&Sockets::of(directory).qmp(), GRACE).await?;
    client.execute("quit", ()).await.map(drop)
}

/// Why a daemon that was started cannot be used.
enum Startup {
    /// Its monitor does not answer, which another one's may.
    Deaf(Error),
    /// It cannot start, or refuses.
    Failed(Error),
}

impl From<Error> for Startup {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Waits until the daemon answers, and starts its NBD server.
///
/// Nobody connects before the pid file says that the daemon has set itself up: QEMU moves a monitor's socket from the
/// main thread to the monitors' own, and a client that comes in just then is accepted and never answered, or greeted
/// twice (seen with 10.0, once in some hundred starts on a busy machine). The move may end a little after the file is
/// there, so that a first connection which is not answered soon, or greeted again, is given up with its daemon.
async fn make_ready(
    host: &Host,
    process: &Process,
    directory: &Path,
    program: &StorageDaemon,
    settings: &Settings,
    deadline: Instant,
) -> Result<(), Startup> {
    let sockets = Sockets::of(directory);
    while !directory.join("daemon.pid").exists() {
        if !process.is_alive(host) {
            return Err(ended(directory).into());
        }
        if Instant::now() >= deadline {
            let doing = "starting the storage daemon".to_owned();
            return Err(Error::Timeout { doing, seconds: settings.qmp_seconds }.into());
        }
        sleep(Duration::from_millis(1)).await;
    }
    let client = match Client::connect(&sockets.qmp(), FIRST_ANSWER.min(settings.qmp())).await {
        Ok(client) => client,
        Err(_) if !process.is_alive(host) => return Err(ended(directory).into()),
        Err(error) => return Err(Startup::Deaf(error)),
    };
    let address = json!({"type": "unix", "data": {"path": text(&sockets.nbd())?}});
    let plain = json!({"addr": address});
    let mut wanted = plain.clone();
    // QEMU before 9.2 has no such bound.
    if program.bounds_handshake {
        wanted["handshake-max-seconds"] = settings.handshake_seconds.into();
    }
    let start = |arguments| client.execute_within(settings.qmp(), "nbd-server-start", arguments);
    match start(wanted).await {
        // What a script starts may have been exchanged since it was asked.
        Err(Error::Qmp { class, .. }) if class == "GenericError" && program.bounds_handshake => {
            drop(start(plain).await?);
        }
        // It has greeted again, and wants to be asked for its use again.
        Err(error @ (Error::Qmp { .. } | Error::Qemu { .. })) if process.is_alive(host) => {
            return Err(Startup::Deaf(error));
        }
        result => drop(result?),
    }
    Ok(())
}

/// Makes the error for a daemon that ended instead of answering, with its last words.
fn ended(directory: &Path) -> Error {
    let log = fs::read(directory.join(LOG)).unwrap_or_default();
    let text = String::from_utf8_lossy(&log[log.len().saturating_sub(QUOTED)..]).trim().to_owned();
    // On a full file system it can neither write its files nor say so.
    if text.is_empty() && rustix::fs::statvfs(directory).is_ok_and(|space| space.f_bavail == 0) {
        return Error::NoSpace {
            doing: format!("starting the storage daemon in {}", directory.display()),
            source: None,
        };
    }
    let reason = if text.is_empty() { "it ended at once".to_owned() } else { text };
    Error::Qemu { doing: "starting the storage daemon".to_owned(), reason }
}

/// Gives the daemon's command line. The NBD server is started by QMP, where its parameters can be negotiated.
fn arguments(directory: &Path) -> Result<Vec<OsString>> {
    let sockets = Sockets::of(directory);
    let mut arguments: Vec<OsString> = Vec::new();
    for (id, path) in [("qmp", sockets.qmp()), ("mirror", sockets.mirror())] {
        arguments.push("--chardev".into());
        arguments.push(chardev(id, &path)?);
        arguments.push("--monitor".into());
        arguments.push(format!("chardev={id},mode=control").into());
    }
    arguments.push("--object".into());
    arguments.push(format!("throttle-group,id={}", graph::PACE).into());
    arguments.push("--pidfile".into());
    arguments.push(directory.join("daemon.pid").into());
    Ok(arguments)
}

/// Gives a socket's option; in QEMU's options a comma in a value is doubled.
pub(super) fn chardev(id: &str, path: &Path) -> Result<OsString> {
    let path = text(path)?.replace(',', ",,");
    Ok(format!("socket,id={id},path={path},server=on,wait=off").into())
}

/// Gives a path as text, which QMP and QEMU's options need.
fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| Error::Internal(format!("the path {} is not UTF-8", path.display())))
}

/// Finds the daemons that run in a directory, recorded or not.
///
/// # Errors
///
/// When the processes cannot be listed.
pub fn running_in(host: &Host, directory: &Path) -> Result<Vec<Process>> {
    let proc = Path::new("/proc");
    let entries = fs::read_dir(proc).map_err(Error::on("listing", proc))?;
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    Ok(pids.filter(|pid| is_in(*pid, directory)).filter_map(|pid| Process::of_pid(host, pid).ok()).collect())
}

/// Tells whether a process is a daemon whose monitor is in a directory, by its command line.
fn is_in(pid: i32, directory: &Path) -> bool {
    let Ok(monitor) = chardev("qmp", &Sockets::of(directory).qmp()) else { return false };
    let command_line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    command_line.split(|byte| *byte == 0).any(|word| OsStr::from_bytes(word) == monitor)
}

/// Removes the files of a daemon that has ended.
///
/// # Errors
///
/// When one cannot be removed.
pub fn remove_files(directory: &Path) -> Result<()> {
    FILES.iter().try_for_each(|name| record::remove(&directory.join(name)))
}

/// Removes the log of a daemon that has ended: no daemon runs in the directory then, recorded or not.
///
/// # Errors
///
/// When it cannot be removed.
pub fn remove_log(directory: &Path) -> Result<()> {
    record::remove(&directory.join(LOG))
}
