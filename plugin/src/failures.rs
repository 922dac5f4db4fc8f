//! What failed last on this host: kept for Plugin.diagnostics and for people, in files with a bound.
//!
//! A failed call adds a line to `<run>/failures`; when that has grown to 32 KiB it becomes `failures.old`. So there are
//! two files at most, and what they hold is what xapi was told: no request, no answer.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::host::Host;
use crate::mirror::now;

/// How long the file grows.
const FILE_BYTES: u64 = 32 << 10;

/// The bytes that are kept of a message.
const MESSAGE_BYTES: usize = 1000;

/// How long a failed call waits for the one that sees a long file away.
const PATIENCE: Duration = Duration::from_secs(1);

/// Something that failed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// When, in seconds since 1970.
    pub time: u64,
    /// The call, or what else it was.
    pub method: String,
    /// The SR that it was about, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sr: Option<String>,
    /// The volume that it was about, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
    /// The caller's name for its task.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub dbg: String,
    /// The error's code, as xapi gets it.
    pub code: String,
    /// What went wrong.
    pub message: String,
}

impl Failure {
    /// Makes the note of an error, now.
    pub fn of(method: impl Into<String>, error: &Error) -> Self {
        Self { method: method.into(), code: error.code().0, message: error.told(), ..Self::default() }
    }

    /// Adds it to those of the host. What cannot be written is not kept.
    pub fn keep(mut self, host: &Host) {
        self.time = now();
        if let Some((end, _)) = self.message.char_indices().find(|(index, _)| *index >= MESSAGE_BYTES) {
            self.message.truncate(end);
        }
        if let Err(error) = add(host, &self) {
            tracing::debug!(%error, "a failure is not kept");
        }
    }

    /// Gives the last ones, the newest last. What cannot be read is left out.
    pub fn last(host: &Host, count: usize) -> Vec<Self> {
        let path = path(host);
        let texts = [old(&path), path].map(|path| fs::read_to_string(path).unwrap_or_default());
        let lines = texts.iter().flat_map(|text| text.lines());
        let mut all: Vec<Self> = lines.filter_map(|line| serde_json::from_str(line).ok()).collect();
        all.split_off(all.len().saturating_sub(count))
    }
}

fn path(host: &Host) -> PathBuf {
    host.runtime_dir().join("failures")
}

fn old(path: &Path) -> PathBuf {
    path.with_extension("old")
}

/// Adds a line by one write, so that lines of several processes do not mix.
fn add(host: &Host, failure: &Failure) -> io::Result<()> {
    let path = path(host);
    let mut line = serde_json::to_vec(failure)?;
    line.push(b'\n');
    let mut file = open(&path).or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            host.make_runtime_dir(&host.runtime_dir()).map_err(io::Error::other)?;
            open(&path)
        }
        _ => Err(error),
    })?;
    file.write_all(&line)?;
    let written = file.metadata()?;
    // Of several that find it long enough one sees it away; it holds the lock until the file has another name, and the
    // others wait for that, or it would grow meanwhile.
    if written.len() >= FILE_BYTES && is_locked_soon(&file) {
        let is_current = fs::metadata(&path).is_ok_and(|there| there.ino() == written.ino());
        if is_current {
            fs::rename(&path, old(&path))?;
        }
    }
    Ok(())
}

/// Takes a file's lock, but waits no longer for it than a call may that has failed: who has it may be stopped.
fn is_locked_soon(file: &File) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while file.try_lock().is_err() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_last_failures_are_kept_in_little_space() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::at(root.path());
        assert_eq!(Failure::last(&host, 10), []);
        let error = Error::Internal("é".repeat(5000));
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (host, error) = (&host, &error);
                scope.spawn(move || (0..50).for_each(|n| Failure::of(format!("{thread}-{n}"), error).keep(host)));
            }
        });
        Failure::of("last", &error).keep(&host);
        let last = Failure::last(&host, 10);
        assert_eq!((last.len(), last[9].method.as_str()), (10, "last"));
        let files: Vec<_> = fs::read_dir(host.runtime_dir()).unwrap().map(|entry| entry.unwrap()).collect();
        assert_eq!(files.len(), 2);
        for file in files {
            let metadata = file.metadata().unwrap();
            assert!(metadata.len() < FILE_BYTES + 8 * 1500, "{}", metadata.len());
            assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        }
    }
}
