//! Garbage collection: what is deleted gives its space back, without anybody waiting for it.
//!
//! ```text
//!   Volume.destroy, …, SR.attach, Datapath.detach ──► is there anything to merge? ──► worker, a process of its own
//!                                                                                        │
//!             one an SR, on all hosts together: <sr>/gc ◄── finishes, sweeps, merges ────┤
//!             what it does, and why not more: <run>/gc/<sr>.json ◄───────────────────────┘
//! ```
//!
//! A worker takes [`crate::store::coalesce`]'s steps until nothing is left that can be done now, and ends. It may be killed
//! at any point, and any other one goes on. What has to wait, for a guest that has a disk open, is looked at again when
//! that disk is detached.

mod state;
mod worker;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::failures::Failure;
use crate::host::{Host, Launch, Process, ROOT_VARIABLE, service, this_program};
use crate::id::{SrUuid, TreeId};
use crate::lock::FileLock;
use crate::log::{self, LevelFilter};
use crate::store::Sr;
use crate::trace;
pub use state::{State, Undone};

/// The argument by which an executable is a worker; an SR's uuid or path follows.
pub const ENTRY: &str = "gc";

/// How the names of the executables begin that know the argument.
const EXECUTABLES: &str = "xapi-storage-qcow2-";

/// The lock of the one that is to work next: whoever cannot take it knows that somebody will look after them.
const NEXT: &str = "gc.next";

/// The lock of the one that works.
const WORKING: &str = "gc";

/// The files of both, which go with the SR.
pub(crate) const LOCKS: [&str; 2] = [NEXT, WORKING];

/// Starts a worker if a tree has something to merge. A call does not fail by that.
pub fn start_for(host: &Host, sr: &Sr, tree: TreeId) {
    if let Ok(Some(loaded)) = sr.read_tree(tree)
        && loaded.has_merges()
    {
        start(host, sr);
    }
}

/// Starts a worker, unless that is switched off or one is about to begin. A call does not fail by that.
pub fn start(host: &Host, sr: &Sr) {
    let started = host.settings().and_then(|settings| {
        if !settings.gc {
            return Ok(());
        }
        let path = sr.path.join(NEXT);
        match FileLock::try_acquire(&path)? {
            Some(lock) => drop(std::fs::remove_file(lock.path())),
            None => return Ok(()),
        }
        launch(host, sr)
    });
    if let Err(error) = started {
        tracing::warn!(error = error.chain(), "space is brought back later");
    }
}

/// Stops what works on an SR on this host, or is about to: its file system may be about to be unmounted. What it was at is
/// taken up by the next one.
///
/// # Errors
///
/// [`Error::Timeout`] when it does not end.
pub fn stop(host: &Host, sr: SrUuid) -> Result<()> {
    // What systemd has not started yet finds that nobody asks for it.
    service::forget(host, &unit(sr), Duration::ZERO)?;
    for worker in workers(host, sr)? {
        worker.kill(host, host.settings()?.qmp())?;
    }
    let directory = host.gc_dir(sr);
    match std::fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::on("removing", &directory)(error));
        }
        _ => {}
    }
    State::remove(host, sr)
}

/// Finds the processes that a call of this host has started for an SR, by their command lines: one that has just begun
/// is in no record.
fn workers(host: &Host, sr: SrUuid) -> Result<Vec<Process>> {
    let proc = Path::new("/proc");
    let entries = std::fs::read_dir(proc).map_err(Error::on("listing", proc))?;
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let is_worker = |pid: &i32| {
        let words = |name| std::fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let line = words("cmdline");
        let ends = format!("\0{ENTRY}\0{sr}\0");
        // A service that is about to become one.
        let becomes = format!("\0{}\0{}", service::ENTRY, unit(sr));
        let environment = words("environ");
        let value = |word: &'_ [u8]| Some(word.strip_prefix(ROOT_VARIABLE.as_bytes())?.strip_prefix(b"=")?.to_vec());
        let root = environment.split(|byte| *byte == 0).find_map(value);
        let root = root.as_deref().map_or(Path::new("/"), |root| Path::new(OsStr::from_bytes(root)));
        let contains = |part: &str| line.windows(part.len()).any(|window| window == part.as_bytes());
        (line.ends_with(ends.as_bytes()) || contains(&becomes)) && root == host.root()
    };
    Ok(pids.filter(is_worker).filter_map(|pid| Process::of_pid(host, pid).ok()).collect())
}

/// Gives how the units of an SR's workers begin.
fn unit(sr: SrUuid) -> String {
    format!("xapi-storage-qcow2-gc@{sr}.")
}

fn launch(host: &Host, sr: &Sr) -> Result<()> {
    let program = this_program()?;
    // Another one that uses this library, as tests do, does not know the argument.
    if !program.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with(EXECUTABLES)) {
        return Ok(());
    }
    let uuid = sr.record.uuid;
    let arguments: [OsString; 2] = [ENTRY.into(), uuid.to_string().into()];
    // One may wait for the one before it.
    let unit = format!("{}{}", unit(uuid), Uuid::new_v4().simple());
    let log = Path::new("/dev/null");
    Launch { unit: &unit, program: &program, arguments: &arguments, log, observed: true }
        .start_unwatched(host, Some(&sr.path))
}

/// Does a worker's work, for the SR whose uuid or path is given. How it ends is for the exit status, the log and
/// [`State`].
pub fn main(host: &Host, sr: &OsStr) -> ExitCode {
    log::start(host, LevelFilter::INFO);
    trace::begin(host);
    trace::name("gc");
    let uuid = sr.to_str().and_then(|text| text.parse::<SrUuid>().ok());
    let sr = uuid.map_or_else(|| Sr::open(Path::new(sr)), |uuid| Sr::attached(host, uuid));
    let span = tracing::error_span!("gc", method = "gc", sr = uuid.as_ref().map(tracing::field::display));
    let _entered = span.enter();
    if let Some(uuid) = uuid {
        trace::tag("qcow2.sr", uuid);
    }
    let done = sr.and_then(|sr| worker::run(host, &sr, uuid.is_some()));
    if let Err(error) = &done {
        trace::fail(error);
    }
    trace::end();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = error.chain(), "space is not brought back");
            let sr = uuid.map(|uuid| uuid.to_string());
            Failure { sr, ..Failure::of("gc", &error) }.keep(host);
            ExitCode::FAILURE
        }
    }
}
