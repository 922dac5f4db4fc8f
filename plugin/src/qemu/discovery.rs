//! Which storage daemon is used: the first one that is there and can do what is asked of it.
//!
//! ```text
//!   candidates, in order ──► found out before? ──yes──► judged ──► the first that lacks nothing
//!                                  │no                   ▲
//!                                  └──► started with a monitor on its standard input and output,
//!                                       asked for its version and its schema, ended
//! ```
//!
//! A distribution's version says little of what it has left out, so the daemon itself is asked. What was found is kept in
//! `<run>/programs.json` with what tells the file from another, so that a program is asked once, and again when it was
//! exchanged.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::program::{self, Output};
use super::schema::Schema;
use crate::error::{Error, Result};
use crate::host::{Host, end_with_this};
use crate::record::{self, Durability, Record};

/// The program's name.
const NAME: &str = "qemu-storage-daemon";

/// The oldest version that is used, major and minor: that of XenServer's package qemu-dp.
const OLDEST: (u32, u32) = (7, 0);

/// The commands that are used, each with those of its arguments that not every version has.
const COMMANDS: &[(&str, &[&str])] = &[
    ("block-commit", &["base-node", "backing-file", "auto-dismiss"]),
    ("block-dirty-bitmap-add", &["disabled", "persistent"]),
    ("block-dirty-bitmap-disable", &[]),
    ("block-dirty-bitmap-remove", &[]),
    ("block-export-add", &["id", "node-name", "writable"]),
    ("block-export-del", &["mode"]),
    ("block-job-cancel", &["force"]),
    ("block-stream", &["base-node", "auto-dismiss"]),
    ("block_resize", &["node-name"]),
    ("blockdev-add", &["node-name", "read-only", "auto-read-only", "discard", "detect-zeroes", "cache"]),
    ("blockdev-backup", &["bitmap", "bitmap-mode", "auto-dismiss"]),
    ("blockdev-del", &["node-name"]),
    ("blockdev-mirror", &["copy-mode", "auto-dismiss", "on-target-error"]),
    ("blockdev-reopen", &["options"]),
    ("blockdev-snapshot", &["node", "overlay"]),
    ("change-backing-file", &["image-node-name"]),
    ("job-cancel", &[]),
    ("job-dismiss", &[]),
    ("nbd-server-start", &["addr"]),
    ("qom-set", &["path"]),
    ("query-block-exports", &[]),
    ("query-jobs", &[]),
    ("query-named-block-nodes", &["flat"]),
    ("quit", &[]),
];

/// The block drivers that are used.
const DRIVERS: &[&str] = &["file", "nbd", "qcow2", "raw", "throttle"];

/// What a program is asked, all at once.
const QUESTIONS: &str = concat!(
    "{\"execute\": \"qmp_capabilities\"}\n",
    "{\"execute\": \"query-version\"}\n",
    "{\"execute\": \"query-qmp-schema\"}\n",
);

/// What it is told then. The end of its input says nothing to it.
const GOODBYE: &str = "{\"execute\": \"quit\"}\n";

/// The most that is read of what it prints, in bytes; a schema has a hundred thousand.
const LONGEST: u64 = 8 << 20;

/// How long what an ended program has said may take to be read.
const FAREWELL: Duration = Duration::from_secs(2);

/// A storage daemon's program that can do all that is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageDaemon {
    /// Where it is.
    pub path: PathBuf,
    /// Its version, for people.
    pub version: String,
    /// Whether the time for a client's handshake can be bounded.
    pub bounds_handshake: bool,
}

/// What was found out of programs, `<run>/programs.json`. Nothing is lost with it but the time to find out again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Findings {
    format: u64,
    programs: BTreeMap<PathBuf, Finding>,
}

/// What was found out of one program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Finding {
    /// Tells the file from another with its name.
    file: FileIdentity,
    version: String,
    bounds_handshake: bool,
    /// Why it cannot be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lacks: Option<String>,
}

/// What a file that was exchanged does not have in common with the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileIdentity {
    device: u64,
    inode: u64,
    size: u64,
    /// When its content was changed, in seconds since 1970 and nanoseconds.
    modified: (i64, i64),
    /// When the file was, owner and mode included.
    changed: (i64, i64),
}

impl Record for Findings {
    const FORMAT: u64 = 1;
}

impl FileIdentity {
    /// Looks at a program; `None` when there is none that can be run.
    fn of(path: &Path) -> Option<Self> {
        let file = fs::metadata(path).ok().filter(|file| file.is_file() && file.mode() & 0o111 != 0)?;
        Some(Self {
            device: file.dev(),
            inode: file.ino(),
            size: file.len(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        })
    }
}

/// Chooses the program for storage daemons.
///
/// # Errors
///
/// [`Error::Qemu`] when there is none that can do what is needed, with what each lacks.
pub fn storage_daemon(host: &Host) -> Result<StorageDaemon> {
    let kept = host.runtime_dir().join("programs.json");
    // What cannot be read is found out again.
    let mut findings = record::read_if_present::<Findings>(&kept).ok().flatten().unwrap_or_default();
    let mut lacking = Vec::new();
    for path in program::candidates(host, NAME) {
        let Some(file) = FileIdentity::of(&path) else { continue };
        let known = findings.programs.get(&path).filter(|finding| finding.file == file);
        let finding = match known {
            Some(finding) => finding.clone(),
            None => match ask(&path, file, host.settings()?.qmp()) {
                Ok(finding) => {
                    findings.programs.insert(path.clone(), finding.clone());
                    keep(host, &kept, &findings);
                    finding
                }
                // It may be the machine's fault for the moment, so this is not kept.
                Err(error) => {
                    tracing::warn!(path = %path.display(), error = error.chain(), "a storage daemon cannot be asked");
                    lacking.push(format!("{}: {}", path.display(), error.chain()));
                    continue;
                }
            },
        };
        match finding.lacks {
            Some(reason) => lacking.push(format!("{}: {reason}", path.display())),
            None => {
                let Finding { version, bounds_handshake, .. } = finding;
                return Ok(StorageDaemon { path, version, bounds_handshake });
            }
        }
    }
    let reason = if lacking.is_empty() { program::nowhere() } else { lacking.join("; ") };
    Err(Error::Qemu { doing: format!("looking for {NAME}"), reason })
}

/// Gives the programs that are there and were asked what they can do, in the order in which they are looked at, each with
/// why it cannot be used. Nothing is asked anew.
pub fn known_daemons(host: &Host) -> Vec<(StorageDaemon, Option<String>)> {
    let kept = host.runtime_dir().join("programs.json");
    let findings = record::read_if_present::<Findings>(&kept).ok().flatten().unwrap_or_default();
    let known = program::candidates(host, NAME).filter_map(|path| {
        let file = FileIdentity::of(&path)?;
        let Finding { version, bounds_handshake, lacks, .. } =
            findings.programs.get(&path).filter(|finding| finding.file == file)?.clone();
        Some((StorageDaemon { path, version, bounds_handshake }, lacks))
    });
    known.collect()
}

/// Keeps what was found; without that it is found out again.
fn keep(host: &Host, path: &Path, findings: &Findings) {
    let kept = host.make_runtime_dir(&host.runtime_dir());
    if let Err(error) = kept.and_then(|()| record::write(path, findings, Durability::UntilReboot)) {
        tracing::warn!(error = error.chain(), "what was found out of QEMU is not kept");
    }
}

impl Default for Findings {
    fn default() -> Self {
        Self { format: Self::FORMAT, programs: BTreeMap::new() }
    }
}

/// Asks a program what it is and what it can do.
fn ask(path: &Path, file: FileIdentity, patience: Duration) -> Result<Finding> {
    let doing = format!("asking {} what it can do", path.display());
    let failed = |error: io::Error| Error::io(doing.clone(), error);
    let mut command = Command::new(path);
    command.args(["--chardev", "stdio,id=qmp,signal=off", "--monitor", "chardev=qmp,mode=control"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = program::same_for_all(end_with_this(&mut command)).spawn().map_err(failed)?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let deadline = Instant::now() + patience;
    let answers = stdout.map(read_answers);
    let complaint = stderr.map(program::read_all);
    let answered = stdin.map(|mut stdin| {
        // One that has ended says why.
        let _ = stdin.write_all(QUESTIONS.as_bytes());
        let answered = answers.and_then(|answers| answers.recv_timeout(patience).ok());
        // Not before: QEMU throws away what it could not print yet.
        let _ = stdin.write_all(GOODBYE.as_bytes());
        answered
    });
    let ended = program::wait(&mut child, deadline).map_err(failed)?;
    if ended.is_none() {
        program::end(&mut child);
    }
    let timeout = || Error::Timeout { doing: doing.clone(), seconds: patience.as_secs() };
    let printed = answered.flatten().ok_or_else(timeout)?.map_err(failed)?;
    understand(&printed, file).map_err(|reason| match ended {
        Some(status) if !status.success() => {
            let complaint = complaint.and_then(|complaint| complaint.recv_timeout(FAREWELL).ok()?.ok());
            program::failure(&doing, &Output { status, stdout: Vec::new(), stderr: complaint.unwrap_or_default() })
        }
        _ => Error::Qemu { doing, reason },
    })
}

/// Reads lines in a thread of its own, until all questions are answered or nothing more comes.
fn read_answers(stdout: ChildStdout) -> mpsc::Receiver<io::Result<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut lines = BufReader::new(stdout).take(LONGEST);
        let (mut printed, mut start, mut answers) = (Vec::new(), 0, 0);
        let read = loop {
            match lines.read_until(b'\n', &mut printed) {
                Ok(0) => break Ok(()),
                Ok(_) => answers += usize::from(is_answer(&printed[start..])),
                Err(error) => break Err(error),
            }
            start = printed.len();
            if answers == QUESTIONS.lines().count() {
                break Ok(());
            }
        };
        drop(sender.send(read.map(|()| printed)));
    });
    receiver
}

/// Tells a command's answer from the greeting, and from events.
fn is_answer(line: &[u8]) -> bool {
    serde_json::from_slice::<Line<IgnoredAny>>(line).is_ok()
}

/// One line of what the program answers.
#[derive(Deserialize)]
struct Line<T> {
    #[serde(rename = "return")]
    returned: T,
}

/// What `query-version` returns.
#[derive(Deserialize)]
struct Version {
    qemu: Triple,
    #[serde(default)]
    package: String,
}

#[derive(Deserialize)]
struct Triple {
    major: u32,
    minor: u32,
    micro: u32,
}

/// Makes a finding of all that a program has printed, or says why there is none.
pub(crate) fn understand(printed: &[u8], file: FileIdentity) -> Result<Finding, String> {
    let text = std::str::from_utf8(printed).map_err(|_| "its answer is not UTF-8".to_owned())?;
    let unclear = |error: serde_json::Error| format!("its answer cannot be read: {error}");
    let mut answers = text.lines().filter(|line| is_answer(line.as_bytes())).skip(1);
    let (Some(version), Some(schema)) = (answers.next(), answers.next()) else {
        return Err("it did not answer".to_owned());
    };
    let version: Line<Version> = serde_json::from_str(version).map_err(unclear)?;
    let schema: Line<Schema> = serde_json::from_str(schema).map_err(unclear)?;
    let schema = schema.returned;
    let Version { qemu: Triple { major, minor, micro }, package } = version.returned;
    let lacks = if (major, minor) < OLDEST {
        Some(format!("QEMU {major}.{minor} is older than {}.{}", OLDEST.0, OLDEST.1))
    } else {
        what_lacks(&schema).map(|what| format!("QEMU {major}.{minor} without {what}"))
    };
    let package = if package.is_empty() { package } else { format!(" ({package})") };
    let version = format!("{major}.{minor}.{micro}{package}");
    let bounds_handshake = schema.takes("nbd-server-start", "handshake-max-seconds");
    Ok(Finding { file, version, bounds_handshake, lacks })
}

/// Names the first thing that is needed and not there.
fn what_lacks(schema: &Schema) -> Option<String> {
    for (command, arguments) in COMMANDS {
        if !schema.has(command) {
            return Some(format!("the command {command}"));
        }
        if let Some(argument) = arguments.iter().find(|argument| !schema.takes(command, argument)) {
            return Some(format!("{command}'s argument {argument}"));
        }
    }
    let driver = DRIVERS.iter().find(|driver| !schema.knows("blockdev-add", driver));
    let driver = driver.map(|driver| format!("the block driver {driver}"));
    let lacks_throttling = !schema.knows("object-add", "throttle-group");
    driver.or_else(|| lacks_throttling.then(|| "the object throttle-group".to_owned()))
}

#[cfg(test)]
mod tests;
