//! Starting a process that outlives the call, in a state that does not depend on the caller.
//!
//! xapi-storage-script waits until its script's pipes are closed, leaks descriptors into it, ignores SIGPIPE, preloads
//! an allocator, and is stopped with everything in its control group (xen-api
//! `ocaml/xapi-storage-script/lib.ml`, `scripts/xapi-storage-script.service`). None of this must reach a daemon.

use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Resource, Rlimit};

use super::{Host, Process, ROOT_VARIABLE, service};
use crate::error::{Error, Result};
use crate::log::LOG_VARIABLE;
use crate::trace;

/// Where systemd puts a directory when it is PID 1 (sd_booted(3)).
const SYSTEMD_RUNS: &str = "/run/systemd/system";

/// Where systemd-run may be.
const SYSTEMD_RUN: [&str; 2] = ["/usr/bin/systemd-run", "/bin/systemd-run"];

/// The slice that holds what virtual machines depend on, on hosts that have it.
const SLICE: &str = "vm.slice";

/// Where unit files may be.
pub(super) const UNIT_DIRECTORIES: [&str; 4] =
    ["/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"];

/// Descriptors that a daemon may have open: a chain takes one a layer, each client one.
const DESCRIPTORS: u64 = 65536;

/// A program to start.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// What the systemd unit is called, where there is systemd; unique among what runs. As `<template>@<instance>` it is
    /// a service where that template is installed.
    pub unit: &'a str,
    /// The program's absolute path.
    pub program: &'a Path,
    /// Its arguments.
    pub arguments: &'a [OsString],
    /// The file that takes its standard output and error, emptied first.
    pub log: &'a Path,
    /// Whether it writes spans of its own (`trace::begin`), which hang from that of the process that starts it.
    pub observed: bool,
}

impl Launch<'_> {
    /// Starts the program and names its process.
    ///
    /// It runs in `/`, in a session of its own, with a clean environment, default signals, umask 077, no descriptor
    /// but standard input (/dev/null) and the log. Where systemd is there it runs outside the caller's control group: as a
    /// service with the sandbox of its template unit, or, without one, in a scope, which it enters before the program
    /// itself begins.
    ///
    /// # Errors
    ///
    /// When the program cannot be started.
    pub fn start(&self, host: &Host) -> Result<Process> {
        self.start_for(host, None)
    }

    /// Starts a program that writes to an SR's directory, besides the runtime directory; otherwise as [`Self::start`].
    ///
    /// # Errors
    ///
    /// When the program cannot be started.
    pub fn start_for(&self, host: &Host, sr: Option<&Path>) -> Result<Process> {
        if self.is_service(host) {
            return service::start(host, self, sr);
        }
        self.start_here(host)
    }

    /// Starts a program that nobody waits for, not even for its beginning; otherwise as [`Self::start_for`]. No two of them
    /// have the same unit.
    ///
    /// # Errors
    ///
    /// When it cannot be asked for. That a service does not start then is for the journal.
    pub fn start_unwatched(&self, host: &Host, sr: Option<&Path>) -> Result<()> {
        if self.is_service(host) {
            return service::start_unwatched(host, self, sr);
        }
        self.start_here(host).map(drop)
    }

    /// Tells whether the program is to be a service.
    fn is_service(&self, host: &Host) -> bool {
        is_under_systemd(host) && service::has_template(self.unit)
    }

    /// Starts the program in a scope, or plainly.
    fn start_here(&self, host: &Host) -> Result<Process> {
        let mut options = OpenOptions::new();
        let log = options.write(true).create(true).truncate(true).mode(0o600).open(self.log);
        let log = log.map_err(Error::on("opening", self.log))?;
        let second = log.try_clone().map_err(Error::on("opening", self.log))?;
        let mut command = self.command(host);
        command.current_dir("/").stdin(Stdio::null()).stdout(log).stderr(second);
        command.env_clear().envs(self.environment(host));
        // SAFETY: the closure runs between fork and exec, where only async-signal-safe functions may be called: it
        // makes plain system calls and neither allocates nor locks.
        #[allow(unsafe_code)]
        unsafe {
            command.pre_exec(detach);
        }
        let starting = |error| Error::io(format!("starting {}", self.program.display()), error);
        let mut child = command.spawn().map_err(starting)?;
        // Before it is waited for: also a program that has ended by now can be named, and has done what it was to do.
        let process = i32::try_from(child.id()).ok().and_then(|pid| Process::of_child(host, pid).ok());
        // Nobody waits for the program's end but, in a process that lives on, this thread.
        std::thread::spawn(move || child.wait());
        process.ok_or_else(|| Error::Qemu {
            doing: format!("starting {}", self.program.display()),
            reason: "its process cannot be named".to_owned(),
        })
    }

    /// Gives the environment of what is started.
    pub(super) fn environment(&self, host: &Host) -> Vec<(&'static str, OsString)> {
        let mut variables = vec![("LC_ALL", "C".into()), ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin".into())];
        if host.root() != Path::new("/") {
            variables.push((ROOT_VARIABLE, host.root().into()));
        }
        variables.extend(std::env::var_os(LOG_VARIABLE).map(|filter| (LOG_VARIABLE, filter)));
        if self.observed {
            variables.extend(trace::environment());
        }
        variables
    }

    /// Gives the command line, through systemd-run where systemd is there and the host is the machine itself.
    fn command(&self, host: &Host) -> Command {
        let mut words = Vec::new();
        if is_under_systemd(host) {
            words = scope(&self.unit.replace('@', "-"));
        }
        words.push(self.program.as_os_str().to_owned());
        words.extend_from_slice(self.arguments);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        command
    }
}

/// Tells whether systemd runs and the host is the machine itself.
fn is_under_systemd(host: &Host) -> bool {
    host.root() == Path::new("/") && Path::new(SYSTEMD_RUNS).is_dir()
}

/// Gives the words before a command line that put it into a scope: systemd-run asks for the scope with its own
/// process in it and then becomes the program, so the process id stays.
fn scope(unit: &str) -> Vec<OsString> {
    let Some(systemd_run) = SYSTEMD_RUN.into_iter().find(|path| Path::new(path).is_file()) else {
        return Vec::new();
    };
    let mut words: Vec<OsString> = vec![systemd_run.into(), "--scope".into()];
    words.push(concat("--unit=", unit));
    if UNIT_DIRECTORIES.iter().any(|directory| Path::new(directory).join(SLICE).is_file()) {
        words.push(concat("--slice=", SLICE));
    }
    words.push("--".into());
    words
}

/// Joins an option and its value.
fn concat(option: &str, value: impl AsRef<OsStr>) -> OsString {
    let mut word = OsString::from(option);
    word.push(value);
    word
}

/// Makes a process that was just forked independent of its parent.
fn detach() -> io::Result<()> {
    rustix::process::setsid()?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    raise_descriptor_limit();
    // The standard library resets only SIGPIPE; another signal that the caller ignored would stay ignored.
    for signal in 1..libc::SIGSYS + 1 {
        // SAFETY: setting the default action runs no code of ours; for SIGKILL and SIGSTOP it fails, which is right.
        #[allow(unsafe_code)]
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
        }
    }
    close_on_exec();
    Ok(())
}

/// Raises the limit on descriptors: over the hard limit where that is allowed, else to it.
fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let wanted = |maximum| Rlimit { current: maximum, maximum };
    if limit.maximum.is_none_or(|maximum| maximum >= DESCRIPTORS)
        || rustix::process::setrlimit(Resource::Nofile, wanted(Some(DESCRIPTORS))).is_err()
    {
        // Failing that, the limit stays what it was, which may well be enough.
        let _ = rustix::process::setrlimit(
            Resource::Nofile,
            Rlimit { current: limit.maximum.map(|maximum| maximum.min(DESCRIPTORS)).or(Some(DESCRIPTORS)), ..limit },
        );
    }
}

/// Marks every descriptor but the first three to be closed when the program begins. They are not closed at once: the
/// standard library reports a failed exec through one of them.
fn close_on_exec() {
    const FIRST: libc::c_int = 3;
    // SAFETY: changes a flag of descriptors that nothing in this process uses any more but exec itself.
    #[allow(unsafe_code)]
    unsafe {
        let all = libc::c_uint::MAX;
        if libc::syscall(libc::SYS_close_range, FIRST, all, libc::CLOSE_RANGE_CLOEXEC) == 0 {
            return;
        }
        // Linux before 5.11 cannot do this in one call.
        let limit = libc::sysconf(libc::_SC_OPEN_MAX).clamp(1024, 1 << 20);
        for descriptor in FIRST..limit as libc::c_int {
            libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;

    /// Runs a shell script by way of a launch and gives what it printed.
    fn output_of(script: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::at(dir.path());
        let log = dir.path().join("log");
        let arguments = ["-c".into(), script.into()];
        let launch =
            Launch { unit: "test", program: Path::new("/bin/sh"), arguments: &arguments, log: &log, observed: false };
        let process = launch.start(&host).unwrap();
        assert!(process.wait(&host, Duration::from_secs(60)));
        fs::read_to_string(log).unwrap()
    }

    #[test]
    fn a_launched_program_has_no_descriptor_but_the_first_three() {
        // Leaked as xapi-storage-script leaks its own: without close-on-exec.
        let leaked = fs::File::open("/dev/null").unwrap();
        rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
        let output = output_of("readlink /proc/$$/fd/0; ls /proc/$$/fd");
        assert_eq!(output.split_whitespace().collect::<Vec<_>>(), ["/dev/null", "0", "1", "2"]);
    }

    #[test]
    fn a_launched_program_is_on_its_own() {
        let output = output_of("umask; pwd; cut -d' ' -f1,6 /proc/$$/stat; grep SigIgn /proc/$$/status; env");
        let lines: Vec<&str> = output.lines().collect();
        assert_eq!(&lines[..2], ["0077", "/"]);
        let (pid, session) = lines[2].split_once(' ').unwrap();
        assert_eq!(pid, session);
        let ignored = u64::from_str_radix(lines[3].split_whitespace().last().unwrap(), 16).unwrap();
        assert_eq!(ignored & 0x7fff_ffff, 0, "of the signals that are not real-time ones");
        let names: Vec<&str> = lines[4..].iter().filter_map(|line| Some(line.split_once('=')?.0)).collect();
        let known = ["LC_ALL", "PATH", "PWD", "OLDPWD", "SHLVL", "_", ROOT_VARIABLE, LOG_VARIABLE];
        assert!(names.iter().all(|name| known.contains(name)), "{names:?}");
    }

    #[test]
    fn a_program_that_ends_at_once_was_started_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let (log, host) = (dir.path().join("log"), Host::at(dir.path()));
        for _ in 0..20 {
            let launch =
                Launch { unit: "test", program: Path::new("/bin/true"), arguments: &[], log: &log, observed: false };
            assert!(launch.start(&host).unwrap().wait(&host, std::time::Duration::from_secs(20)));
        }
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let launch =
            Launch { unit: "test", program: Path::new("/nonexistent"), arguments: &[], log: &log, observed: false };
        assert!(matches!(launch.start(&Host::at(dir.path())), Err(Error::Io { .. })));
    }
}
