//! A disk of an SMAPIv1 SR with the tapdisk that serves it: a file, a guest that writes, and perhaps a mirror.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use crate::nbd::Tapdisk;

/// tapdisk gives a mirror up when it is not greeted for so long.
const GREETING: Duration = Duration::from_secs(10);

/// What tapdisk reads and writes in.
const SECTOR: u64 = 512;

/// After so many writes the tapdisk is paused and goes on, as it is for whatever changes the disk's chain.
const PAUSE_EVERY: u64 = 40;

/// Consecutive bytes of a disk that are one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// Where they begin.
    pub offset: u64,
    /// How many they are.
    pub length: u64,
    /// What each of them is.
    pub byte: u8,
}

/// A disk.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    size: u64,
    tapdisk: Mutex<State>,
}

#[derive(Debug)]
struct State {
    file: File,
    mirror: Mirror,
}

/// The secondary of a tapdisk.
#[derive(Debug)]
enum Mirror {
    /// There is none.
    None,
    /// It has a connection, and has not been greeted on it.
    Paused(Tapdisk),
    /// Every write goes to it too.
    Running(Tapdisk),
    /// It broke, and the disk goes on without it.
    Failed(String),
}

impl Disk {
    /// Makes a disk of so many bytes, every third sixteenth of it written.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn create(path: &Path, size: u64) -> Result<Arc<Self>> {
        let length = size / 16;
        let stretch = |n: u8| Stretch { offset: u64::from(n) * length, length, byte: n + 1 };
        Self::with(path, size, &(0..16).step_by(3).map(stretch).collect::<Vec<_>>())
    }

    /// Makes a disk of so many bytes, with these stretches written, later ones over earlier ones.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn with(path: &Path, size: u64, stretches: &[Stretch]) -> Result<Arc<Self>> {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        file.set_len(size)?;
        for Stretch { offset, length, byte } in stretches {
            file.write_all_at(&vec![*byte; usize::try_from(*length)?], *offset)?;
        }
        let tapdisk = Mutex::new(State { file, mirror: Mirror::None });
        Ok(Arc::new(Self { path: path.to_owned(), size, tapdisk }))
    }

    /// Its file, for those who compare.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Writes whole sectors: to the file, and then to the mirror if there is one. A mirror that breaks is no error.
    ///
    /// # Errors
    /// The file cannot be written.
    pub async fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let mut state = self.tapdisk.lock().await;
        state.file.write_all_at(data, offset)?;
        if let Mirror::Running(mirror) = &mut state.mirror
            && let Err(error) = mirror.write(offset, data).await
        {
            state.mirror = Mirror::Failed(error.to_string());
        }
        Ok(())
    }

    /// Takes the connection of a mirror; it is used from the next time on that the tapdisk has been paused.
    pub async fn mirror_to(&self, connection: UnixStream) {
        self.tapdisk.lock().await.mirror = Mirror::Paused(Tapdisk::new(connection));
    }

    /// Pauses, makes a copy of the disk as it is if one is wanted, and goes on.
    ///
    /// # Errors
    /// The copy cannot be made. A mirror that does not come back has failed.
    pub async fn pause(&self, snapshot: Option<&Path>) -> Result<()> {
        let mut state = self.tapdisk.lock().await;
        let mirror = match std::mem::replace(&mut state.mirror, Mirror::None) {
            Mirror::Running(mut mirror) => match mirror.pause().await {
                Ok(()) => Mirror::Paused(mirror),
                Err(error) => Mirror::Failed(error.to_string()),
            },
            other => other,
        };
        if let Some(snapshot) = snapshot {
            std::fs::copy(&self.path, snapshot).context("the snapshot")?;
        }
        state.mirror = match mirror {
            Mirror::Paused(mut mirror) => match tokio::time::timeout(GREETING, mirror.negotiate()).await {
                Ok(Ok(size)) if size >= self.size => Mirror::Running(mirror),
                Ok(Ok(size)) => Mirror::Failed(format!("the mirror has only {size} bytes")),
                Ok(Err(error)) => Mirror::Failed(error.to_string()),
                Err(_) => Mirror::Failed("the mirror does not greet".to_owned()),
            },
            other => other,
        };
        Ok(())
    }

    /// Why the mirror has failed, if it has.
    pub async fn mirror_failed(&self) -> Option<String> {
        match &self.tapdisk.lock().await.mirror {
            Mirror::Failed(why) => Some(why.clone()),
            _ => None,
        }
    }

    /// Ends the mirror with a goodbye, as the deactivation of the disk does.
    pub async fn end_mirror(&self) {
        let mirror = std::mem::replace(&mut self.tapdisk.lock().await.mirror, Mirror::None);
        // One that is paused has said it, or was never greeted.
        if let Mirror::Running(mirror) = mirror {
            mirror.close().await;
        }
    }
}

/// A guest that writes to a disk.
#[derive(Debug)]
pub struct Writer {
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    task: JoinHandle<Result<()>>,
}

impl Writer {
    /// Starts it; it rests so long after each write.
    #[must_use]
    pub fn start(disk: &Arc<Disk>, seed: u64, rest: Duration) -> Self {
        let (stop, writes) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let task = tokio::spawn(write(Arc::clone(disk), seed, rest, Arc::clone(&stop), Arc::clone(&writes)));
        Self { stop, writes, task }
    }

    /// How many writes were done.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::SeqCst)
    }

    /// Waits until it has written so many times more.
    ///
    /// # Errors
    /// It does not.
    pub async fn more(&self, more: u64) -> Result<()> {
        let wanted = self.writes() + more;
        for _ in 0..3000 {
            if self.writes() >= wanted {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        ensure!(self.writes() >= wanted, "the guest is stuck after {} writes", self.writes());
        Ok(())
    }

    /// Stops it once its last write is done.
    ///
    /// # Errors
    /// A write failed.
    pub async fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::SeqCst);
        (&mut self.task).await?
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

async fn write(
    disk: Arc<Disk>,
    seed: u64,
    rest: Duration,
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
) -> Result<()> {
    let mut random = seed | 1;
    let mut draw = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let sectors = disk.size() / SECTOR;
    while !stop.load(Ordering::SeqCst) {
        let count = (1 + draw(16)).min(sectors);
        let first = draw(sectors - count + 1);
        // Zeroes too: they are data to a disk that lies on another.
        let byte = if draw(8) == 0 { 0 } else { draw(256) as u8 };
        disk.write(first * SECTOR, &vec![byte; usize::try_from(count * SECTOR)?]).await?;
        if writes.fetch_add(1, Ordering::SeqCst) % PAUSE_EVERY == PAUSE_EVERY - 1 {
            disk.pause(None).await?;
        }
        if rest.is_zero() {
            tokio::task::yield_now().await;
        } else {
            tokio::time::sleep(rest).await;
        }
    }
    Ok(())
}
