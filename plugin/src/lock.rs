//! Advisory locks on files, waited for with a bound, safe against the file's removal.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::trace;

/// An exclusive lock on a file, held until it is dropped or its process ends.
///
/// The lock is the kernel's `flock`, which NFSv4 and CephFS carry between hosts. The file may be removed by who
/// holds the lock: one that was waiting for it finds that its file is no longer the one at the path, and starts over.
#[derive(Debug)]
pub struct FileLock {
    file: File,
    path: PathBuf,
}

impl FileLock {
    /// Takes the lock at `path`, making the file where its directory exists, and waits for it up to `patience`.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] when another holds it for longer; else the file cannot be opened, with
    /// [`io::ErrorKind::NotFound`] as the cause when the directory does not exist.
    pub fn acquire(path: &Path, patience: Duration) -> Result<Self> {
        let deadline = Instant::now() + patience;
        loop {
            let file = open(path)?;
            let file = wait(file, path, deadline.saturating_duration_since(Instant::now()), patience)?;
            let lock = Self { file, path: path.to_owned() };
            if lock.is_current()? {
                return Ok(lock);
            }
        }
    }

    /// Takes the lock at `path` if nobody holds it.
    ///
    /// # Errors
    ///
    /// As [`Self::acquire`], but `None` instead of waiting.
    pub fn try_acquire(path: &Path) -> Result<Option<Self>> {
        loop {
            let file = open(path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(Error::on("locking", path)(error)),
            }
            let lock = Self { file, path: path.to_owned() };
            if lock.is_current()? {
                return Ok(Some(lock));
            }
        }
    }

    /// Tells whether somebody holds the lock at `path`, without making a file there. For a moment it is held to find out.
    pub fn is_held(path: &Path) -> bool {
        let file = OpenOptions::new().read(true).open(path);
        file.is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    /// Gives the file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the lock to another process as well, as one of its descriptors: it is held until both have let go.
    ///
    /// # Errors
    ///
    /// When there is no descriptor left.
    pub fn share(&self) -> Result<OwnedFd> {
        self.file.try_clone().map(OwnedFd::from).map_err(Error::on("sharing lock", &self.path))
    }

    /// Tells whether the file locked is still the one at the path.
    fn is_current(&self) -> Result<bool> {
        let locked = self.file.metadata().map_err(Error::on("reading the state of", &self.path))?;
        match fs::metadata(&self.path) {
            Ok(current) => Ok(current.ino() == locked.ino() && current.dev() == locked.dev()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Error::on("reading the state of", &self.path)(error)),
        }
    }
}

/// Opens the lock's file for locking; NFS wants it writable for an exclusive lock.
fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(Error::on("opening lock", path))
}

/// Waits for the lock in a thread of its own, which a process at its end does not wait for.
fn wait(file: File, path: &Path, left: Duration, patience: Duration) -> Result<File> {
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(error)) => return Err(Error::on("locking", path)(error)),
    }
    let _timed = trace::timed("lock", &path.file_name().unwrap_or_default().to_string_lossy());
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let result = file.lock().map(|()| file);
        // When the wait was given up, the file comes back here and is closed, and with it the lock.
        drop(sender.send(result));
    });
    match receiver.recv_timeout(left) {
        Ok(result) => result.map_err(Error::on("locking", path)),
        Err(_) => {
            Err(Error::Timeout { doing: format!("waiting for lock {}", path.display()), seconds: patience.as_secs() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_waited_for_with_a_bound() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = FileLock::acquire(&path, Duration::ZERO).unwrap();
        assert!(FileLock::try_acquire(&path).unwrap().is_none());
        assert!(matches!(FileLock::acquire(&path, Duration::from_millis(20)), Err(Error::Timeout { .. })));
        let waiting = {
            let path = path.clone();
            std::thread::spawn(move || FileLock::acquire(&path, Duration::from_secs(60)).map(drop))
        };
        drop(held);
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn whoever_waited_for_a_removed_file_locks_the_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = FileLock::acquire(&path, Duration::ZERO).unwrap();
        let waiting = {
            let path = path.clone();
            std::thread::spawn(move || FileLock::acquire(&path, Duration::from_secs(60)))
        };
        fs::remove_file(&path).unwrap();
        drop(held);
        let lock = waiting.join().unwrap().unwrap();
        assert!(lock.is_current().unwrap());
        assert!(FileLock::try_acquire(&path).unwrap().is_none());
    }

    #[test]
    fn a_lock_in_a_directory_that_is_gone_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let error = FileLock::acquire(&dir.path().join("gone/lock"), Duration::ZERO).unwrap_err();
        assert!(matches!(error, Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound));
    }
}
