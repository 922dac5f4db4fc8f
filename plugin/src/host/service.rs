//! Starting a program as a service of systemd's, in the sandbox of its template unit.
//!
//! ```text
//!   caller                                        systemd                      the service's process
//!   launch/<unit>/order.json, sr ─► systemctl restart <unit> ─► namespaces, cgroup ─► this executable, `service <unit>`
//!                                                                                      reads the order
//!   launch/<unit>/started.json ◄───────────────────────────────────────────────────── writes down who it is
//!   (systemctl returns) ◄───────────── READY=1 ◄────────────────────────────────────── becomes the program
//! ```
//!
//! A template unit takes one word, the instance; programs take more, and which QEMU there is is found at run time. So what
//! to run is in a file, and the unit's command is this executable, which becomes the program: the process id stays. A
//! unit's file, other than properties given to systemd-run, may have settings that an older systemd does not know, can be
//! changed by an administrator, and is there to be read.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::launch::{Launch, UNIT_DIRECTORIES};
use super::{Host, Process};
use crate::error::{Error, Result};
use crate::log::{self, LevelFilter};
use crate::record::{self, Durability, Record};

/// The argument by which an executable becomes the program of a service; the unit's name follows.
pub const ENTRY: &str = "service";

/// Where systemctl may be.
const SYSTEMCTL: [&str; 2] = ["/usr/bin/systemctl", "/bin/systemctl"];

/// How long what nobody waits for may take to begin. systemd gives up sooner.
const FORGOTTEN: Duration = Duration::from_secs(60);

/// The file in a launch's directory that says what to run.
const ORDER: &str = "order.json";
/// The file that says which process it is.
const STARTED: &str = "started.json";
/// The symlink to the SR that the program writes to. The units have it in BindPaths, where systemd follows it.
const SR: &str = "sr";

/// What a service's process is to become.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Order {
    format: u64,
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    log: PathBuf,
    /// Whether nobody waits for the start, so that nobody but the service clears away what it was started by.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    unwatched: bool,
}

impl Record for Order {
    const FORMAT: u64 = 1;
}

/// The process of a service.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Started {
    format: u64,
    process: Process,
}

impl Record for Started {
    const FORMAT: u64 = 1;
}

/// Tells whether a unit's name, as `<template>@<instance>`, has a template that is installed.
pub(super) fn has_template(unit: &str) -> bool {
    let Some((template, _)) = unit.split_once('@') else { return false };
    let file = format!("{template}@.service");
    UNIT_DIRECTORIES.iter().any(|directory| Path::new(directory).join(&file).is_file())
}

/// Starts a program as the service `<unit>.service`, and names its process. One of that name that still runs is
/// stopped: the caller knows of none. With `sr` the program may write to that directory.
///
/// # Errors
///
/// [`Error::Timeout`] when systemd does not answer; else the service does not start.
pub(super) fn start(host: &Host, launch: &Launch<'_>, sr: Option<&Path>) -> Result<Process> {
    let service = format!("{}.service", launch.unit);
    let directory = directory(host, &service);
    let started = prepare(host, launch, &directory, sr, false).and_then(|()| {
        systemctl(&["restart", &service], host.settings()?.qmp())?;
        let started: Started = record::read(&directory.join(STARTED))?;
        Ok(started.process)
    });
    // Who is late finds no order, and does not become anything.
    if let Err(error) = fs::remove_dir_all(&directory) {
        tracing::warn!(%error, directory = %directory.display(), "what a service was started by is left");
    }
    started
}

/// Asks for a program as the service `<unit>.service`, whose name no other has, and goes on.
///
/// # Errors
///
/// [`Error::Timeout`] when systemd does not answer.
pub(super) fn start_unwatched(host: &Host, launch: &Launch<'_>, sr: Option<&Path>) -> Result<()> {
    let service = format!("{}.service", launch.unit);
    let template = launch.unit.split_once('@').map_or(launch.unit, |(template, _)| template);
    if let Err(error) = forget(host, &format!("{template}@"), FORGOTTEN) {
        tracing::warn!(error = error.chain(), "what services were started by is left");
    }
    let directory = directory(host, &service);
    prepare(host, launch, &directory, sr, true)?;
    let asked = systemctl(&["--no-block", "restart", &service], host.settings()?.qmp());
    if asked.is_err() {
        let _ = fs::remove_dir_all(&directory);
    }
    asked
}

/// Takes back what services whose names begin with `prefix` were asked to be, if it is older than `age` and they have not
/// begun: then they do not become anything.
///
/// # Errors
///
/// When it cannot be looked at.
pub(crate) fn forget(host: &Host, prefix: &str, age: Duration) -> Result<()> {
    let launches = host.runtime_dir().join("launch");
    let entries = match fs::read_dir(&launches) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(Error::on("listing", &launches))?,
    };
    for entry in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix)) {
        let made = entry.metadata().and_then(|metadata| metadata.modified()).ok();
        if age.is_zero() || made.and_then(|made| made.elapsed().ok()).is_some_and(|elapsed| elapsed >= age) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

/// Gives the directory of a service's start.
fn directory(host: &Host, service: &str) -> PathBuf {
    host.runtime_dir().join("launch").join(service)
}

/// Writes down what the service is to be.
fn prepare(host: &Host, launch: &Launch<'_>, directory: &Path, sr: Option<&Path>, unwatched: bool) -> Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory).map_err(Error::on("removing", directory))?;
    }
    host.make_runtime_dir(directory)?;
    let text = |word: &OsString| {
        word.to_str().map(str::to_owned).ok_or_else(|| Error::Internal(format!("{word:?} is not UTF-8")))
    };
    let order = Order {
        format: Order::FORMAT,
        program: launch.program.to_owned(),
        arguments: launch.arguments.iter().map(text).collect::<Result<_>>()?,
        environment: launch
            .environment(host)
            .into_iter()
            .map(|(name, value)| Ok((name.to_owned(), text(&value)?)))
            .collect::<Result<_>>()?,
        log: launch.log.to_owned(),
        unwatched,
    };
    if let Some(sr) = sr {
        let link = directory.join(SR);
        symlink(sr, &link).map_err(Error::on("making", &link))?;
    }
    record::write(&directory.join(ORDER), &order, Durability::UntilReboot)
}

/// Has systemd start a service, and waits until it says that this is done: for `restart` alone, until the service's
/// process is about to become the program.
fn systemctl(words: &[&str], patience: Duration) -> Result<()> {
    let doing = || format!("starting {}", words.last().unwrap_or(&"nothing"));
    let program = SYSTEMCTL.into_iter().find(|path| Path::new(path).is_file());
    let program =
        program.ok_or_else(|| Error::Qemu { doing: doing(), reason: "there is no systemctl".to_owned() })?;
    // Not `start`, which does nothing while systemd has not noticed yet that an earlier one has ended.
    let mut child = Command::new(program)
        .arg("--no-ask-password")
        .args(words)
        .env_clear()
        .env("LC_ALL", "C")
        .env("PATH", "/usr/bin:/bin")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| Error::io(doing(), error))?;
    let deadline = Instant::now() + patience;
    let mut pause = Duration::from_millis(1);
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|error| Error::io(doing(), error))? {
            break status;
        }
        if Instant::now() >= deadline {
            drop(child.kill());
            drop(child.wait());
            return Err(Error::Timeout { doing: doing(), seconds: patience.as_secs() });
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(10));
    };
    if status.success() {
        return Ok(());
    }
    let mut said = String::new();
    // It says a few lines, which a pipe holds.
    drop(child.stderr.take().map(|mut stderr| stderr.read_to_string(&mut said)));
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    Err(Error::Qemu { doing: doing(), reason: if said.is_empty() { status.to_string() } else { said } })
}

/// Becomes the program of the service `<unit>.service`. It returns only when that fails; what went wrong is in the
/// journal, or, when the program itself cannot be run, in its log.
pub fn main(host: &Host, service: &str) -> ExitCode {
    log::start_for_people(LevelFilter::INFO);
    let Err(error) = become_program(host, service);
    tracing::error!(service, error = error.chain(), "the service does not start");
    ExitCode::FAILURE
}

fn become_program(host: &Host, service: &str) -> Result<std::convert::Infallible> {
    let directory = directory(host, service);
    let order: Order = record::read(&directory.join(ORDER))?;
    let log = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&order.log);
    let log = log.map_err(Error::on("opening", &order.log))?;
    let second = log.try_clone().map_err(Error::on("opening", &order.log))?;
    if order.unwatched {
        // What is gone by now was taken back.
        fs::remove_dir_all(&directory).map_err(Error::on("removing", &directory))?;
    } else {
        let started = Started { format: Started::FORMAT, process: Process::current(host)? };
        record::write(&directory.join(STARTED), &started, Durability::UntilReboot)?;
    }
    notify()?;
    let mut command = Command::new(&order.program);
    command.args(&order.arguments).env_clear().envs(order.environment).current_dir("/");
    // From here on standard error is the log: who is told that it starts, and sees that it has ended, reads that.
    let error = command.stdin(Stdio::null()).stdout(log).stderr(second).exec();
    Err(Error::io(format!("starting {}", order.program.display()), error))
}

/// Tells systemd that the service has started (sd_notify(3)).
fn notify() -> Result<()> {
    let telling = |error| Error::io("telling systemd that the service has started", error);
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let datagram = UnixDatagram::unbound().map_err(telling)?;
    datagram.send_to(b"READY=1", socket).map(drop).map_err(telling)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_is_taken_back_by_whom_it_was_for_and_by_its_age() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::at(root.path());
        // Where nothing was ever asked for.
        forget(&host, "a@", Duration::ZERO).unwrap();
        let launches = ["a@1.x.service", "a@1.y.service", "a@2.x.service"].map(|name| directory(&host, name));
        for launch in &launches {
            host.make_runtime_dir(launch).unwrap();
            fs::write(launch.join(ORDER), "{}").unwrap();
        }
        let left = || launches.iter().map(|launch| launch.exists()).collect::<Vec<_>>();
        forget(&host, "a@", FORGOTTEN).unwrap();
        assert_eq!(left(), [true, true, true]);
        forget(&host, "a@1.", Duration::ZERO).unwrap();
        assert_eq!(left(), [false, false, true]);
    }
}
