//! QEMU's programs: where they are, and how a short-lived one is run.

use std::io::{self, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::host::Host;
use crate::lock::FileLock;
use crate::trace;

/// Where QEMU's programs are looked for, in this order; `$PATH` is the caller's and is not asked.
///
/// The first is for an administrator's choice, the last that of XenServer's package qemu-dp, which has all of QEMU's tools
/// there (xcp-ng-rpms/qemu-dp, `SPECS/qemu-dp.spec`: `--bindir`). The program that is called `qemu-dp` there is not one of
/// them: it starts a device model for a domain.
const DIRECTORIES: [&str; 5] = [
    "/usr/libexec/xapi-storage-qcow2",
    "/usr/local/bin",
    "/usr/bin",
    "/usr/lib64/qemu/bin",
    "/usr/lib64/qemu-dp/bin",
];

/// The most that is kept of what a program prints, in bytes.
const OUTPUT_LIMIT: u64 = 256 << 20;

/// How long a killed program may take to go.
const KILL_PATIENCE: Duration = Duration::from_secs(2);

/// Finds one of QEMU's programs that every version of it has.
///
/// # Errors
///
/// [`Error::Qemu`] when it is in none of the places where it may be.
pub fn find(name: &str) -> Result<PathBuf> {
    let mut places = candidates(&Host::from_environment(), name);
    places
        .find(|path| path.is_file())
        .ok_or_else(|| Error::Qemu { doing: format!("looking for {name}"), reason: nowhere() })
}

/// Gives the places where a program may be, in the order in which they are looked at. A host that is one of several on a
/// machine may have programs of its own.
pub(super) fn candidates(host: &Host, name: &str) -> impl Iterator<Item = PathBuf> + use<> {
    let own = (host.root() != Path::new("/")).then(|| host.root().to_owned());
    let roots = own.into_iter().chain([PathBuf::from("/")]);
    let name = name.to_owned();
    roots.flat_map(move |root| DIRECTORIES.map(|directory| root.join(directory.trim_start_matches('/')).join(&name)))
}

/// Says where a program is not.
pub(super) fn nowhere() -> String {
    format!("it is in none of {}", DIRECTORIES.join(", "))
}

/// What a program left behind.
pub(super) struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed to standard output.
    pub stdout: Vec<u8>,
    /// What it printed to standard error.
    pub stderr: Vec<u8>,
}

/// Runs a program to its end, in an environment that is the same whoever calls, and kills it when it takes longer
/// than `patience`.
///
/// # Errors
///
/// [`Error::Timeout`], or the program could not be started. What it says itself is in [`Output`].
pub(super) fn run(command: &mut Command, doing: &str, patience: Duration) -> Result<Output> {
    run_holding(command, None, doing, patience)
}

/// Runs a program as [`run`], which holds a lock as long as it lives, whatever happens to the caller: it changes what
/// the lock is for. The lock is its standard input, which it does not read.
///
/// # Errors
///
/// As [`run`].
pub(super) fn run_holding(
    command: &mut Command,
    lock: Option<&FileLock>,
    doing: &str,
    patience: Duration,
) -> Result<Output> {
    // Its name and what it is to do; the file may be one of thousands.
    let words: Vec<&str> = doing.split(' ').take_while(|word| !word.starts_with('/')).collect();
    let _timed = trace::timed("", &words.join(" "));
    let stdin = match lock {
        Some(lock) => Stdio::from(lock.share()?),
        None => Stdio::null(),
    };
    let deadline = Instant::now() + patience;
    let mut child = same_for_all(command)
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| Error::io(format!("starting {doing}"), error))?;
    let stdout = child.stdout.take().map(read_all);
    let stderr = child.stderr.take().map(read_all);
    let left = || deadline.saturating_duration_since(Instant::now());
    let stdout = receive(stdout, left());
    let stderr = receive(stderr, left());
    match (stdout, stderr, wait(&mut child, deadline)) {
        (Some(stdout), Some(stderr), Ok(Some(status))) => {
            let reading = |error| Error::io(format!("reading the output of {doing}"), error);
            Ok(Output { status, stdout: stdout.map_err(reading)?, stderr: stderr.map_err(reading)? })
        }
        (_, _, Err(error)) => Err(Error::io(format!("waiting for {doing}"), error)),
        _ => {
            end(&mut child);
            Err(Error::Timeout { doing: doing.to_owned(), seconds: patience.as_secs() })
        }
    }
}

/// Gives a program an environment that is the same whoever calls.
pub(super) fn same_for_all(command: &mut Command) -> &mut Command {
    command.current_dir("/").env_clear().env("LC_ALL", "C").env("PATH", "/usr/bin:/bin")
}

/// Kills a child. It may be stuck in the kernel, on a file system that does not answer: then it is left to its fate.
pub(super) fn end(child: &mut Child) {
    drop(child.kill());
    drop(wait(child, Instant::now() + KILL_PATIENCE));
}

/// Says why a program failed, in its own words.
pub(super) fn failure(doing: &str, output: &Output) -> Error {
    let text = String::from_utf8_lossy(&output.stderr);
    let text = text.trim();
    if text.contains("No space left on device") || text.contains("Disk quota exceeded") {
        return Error::NoSpace { doing: doing.to_owned(), source: None };
    }
    let reason = match (output.status.signal(), text.is_empty()) {
        (Some(signal), _) => format!("killed by signal {signal}: {text}"),
        (None, false) => text.to_owned(),
        (None, true) => output.status.to_string(),
    };
    Error::Qemu { doing: doing.to_owned(), reason }
}

/// Reads a pipe to its end in a thread of its own.
pub(super) fn read_all(mut pipe: impl Read + Send + 'static) -> mpsc::Receiver<io::Result<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let result = (&mut pipe).take(OUTPUT_LIMIT).read_to_end(&mut bytes).map(|_| bytes);
        drop(sender.send(result));
    });
    receiver
}

/// Takes what [`read_all`] read, if it ends in time.
fn receive(receiver: Option<mpsc::Receiver<io::Result<Vec<u8>>>>, patience: Duration) -> Option<io::Result<Vec<u8>>> {
    receiver.and_then(|receiver| receiver.recv_timeout(patience).ok())
}

/// Waits for a child that has closed its output, or was killed: it is about to end.
pub(super) fn wait(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    let mut pause = Duration::from_micros(100);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_does_not_end_is_killed() {
        let started = Instant::now();
        let result = run(Command::new("/bin/sleep").arg("600"), "sleeping", Duration::from_millis(50));
        assert!(matches!(result, Err(Error::Timeout { .. })));
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn much_output_on_both_pipes_is_read() {
        let script = "head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2";
        let output = run(Command::new("/bin/sh").args(["-c", script]), "printing", Duration::from_secs(60)).unwrap();
        assert_eq!((output.stdout.len(), output.stderr.len()), (1_000_000, 1_000_000));
    }

    #[test]
    fn a_program_that_is_nowhere_is_named() {
        assert!(find("qemu-nowhere").unwrap_err().to_string().contains("qemu-nowhere"));
    }
}
