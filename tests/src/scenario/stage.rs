//! Two hosts, or one, each with an SR of its own, in a directory that goes with them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tempfile::TempDir;
use uuid::Uuid;

use crate::db::Xapi;
use crate::host::{Host, Leftovers, PluginSource};
use crate::script::CallLog;
use crate::smapiv2::Sr;

const DBG: &str = "OpaqueRef:stage";
/// The SR type of the volume plugin.
const KIND: &str = "qcow2";

/// Gives a place for stages: memory, where syncing costs nothing, if that many bytes are free there; else a file system.
#[must_use]
pub fn place_with(room: u64) -> &'static Path {
    let memory = Path::new("/dev/shm");
    let free = rustix::fs::statvfs(memory).map_or(0, |stat| stat.f_bavail * stat.f_frsize);
    if free >= room { memory } else { Path::new("/tmp") }
}

/// Where a migration takes place.
#[derive(Debug)]
pub struct Stage {
    /// The database.
    pub xapi: Xapi,
    /// The source host.
    pub source: Arc<Host>,
    /// The destination host, perhaps the same.
    pub destination: Arc<Host>,
    /// The SR of the source.
    pub source_sr: Sr,
    /// The SR of the destination.
    pub destination_sr: Sr,
    /// The directory of the source's SR.
    pub source_path: PathBuf,
    /// The directory of the destination's SR.
    pub destination_path: PathBuf,
    /// Every script call of both hosts.
    pub log: CallLog,
    _directory: TempDir,
    _memory: Option<TempDir>,
}

/// How a stage is laid out.
#[derive(Debug, Clone, Copy)]
pub struct Layout<'a> {
    /// The directory of the two executables, or where they are installed ([`PluginSource::at`]).
    pub binaries: &'a Path,
    /// Whether source and destination are one host.
    pub one_host: bool,
    /// Where hosts and SRs are made: a directory with a short path.
    pub place: &'a Path,
    /// A file system in memory for the hosts' /run, which is one on real hosts too; in `place` if not given.
    pub memory: Option<&'a Path>,
    /// Whether the SRs' device-config has `verify`.
    pub verify: bool,
}

impl Stage {
    /// Starts the hosts and makes and attaches their SRs, all in a new directory below `place`, whose path is to be
    /// short: the path of a socket has at most 107 bytes.
    ///
    /// # Errors
    /// If a plugin refuses.
    pub async fn build(binaries: &Path, one_host: bool, place: &Path) -> Result<Self> {
        Self::laid_out(&Layout { binaries, one_host, place, memory: None, verify: false }).await
    }

    /// Starts the hosts and makes and attaches their SRs, as [`Self::build`] does, with whatever else is wanted.
    ///
    /// # Errors
    /// If a plugin refuses.
    pub async fn laid_out(layout: &Layout<'_>) -> Result<Self> {
        let Layout { binaries, one_host, place, memory, verify } = *layout;
        let directory = tempfile::Builder::new().prefix("fx-").tempdir_in(place);
        let directory = directory.with_context(|| format!("no directory in {}", place.display()))?;
        let memory = memory.map(|memory| tempfile::Builder::new().prefix("fx-").tempdir_in(memory)).transpose()?;
        if let Some(memory) = &memory {
            for name in ["a", "b"] {
                let (run, root) = (memory.path().join(name), directory.path().join(name));
                std::fs::create_dir(&run)?;
                std::fs::create_dir(&root)?;
                std::os::unix::fs::symlink(run, root.join("run"))?;
            }
        }
        let log = CallLog::default();
        let plugins = PluginSource::at(binaries);
        let source = Host::start("a", &directory.path().join("a"), &plugins, &log).await.context("host a")?;
        let destination = if one_host {
            Arc::clone(&source)
        } else {
            Host::start("b", &directory.path().join("b"), &plugins, &log).await.context("host b")?
        };
        let (source_path, destination_path) = (directory.path().join("sr-a"), directory.path().join("sr-b"));
        let source_sr = make_sr(&source, &source_path, "source", verify).await?;
        let destination_sr = make_sr(&destination, &destination_path, "destination", verify).await?;
        Ok(Self {
            xapi: Xapi::default(),
            source,
            destination,
            source_sr,
            destination_sr,
            source_path,
            destination_path,
            log,
            _directory: directory,
            _memory: memory,
        })
    }

    /// Gives the destination an SR in another directory, which is there, in place of the one it has.
    ///
    /// # Errors
    /// If the plugin refuses.
    pub async fn move_destination(&mut self, path: &Path) -> Result<()> {
        self.destination_sr = make_sr_in(&self.destination, path, "another", false).await?;
        self.destination_path = path.to_owned();
        Ok(())
    }

    /// Gives the source an SR in another directory, as [`Self::move_destination`] does.
    ///
    /// # Errors
    /// If the plugin refuses.
    pub async fn move_source(&mut self, path: &Path) -> Result<()> {
        self.source_sr = make_sr_in(&self.source, path, "another", false).await?;
        self.source_path = path.to_owned();
        Ok(())
    }

    /// Waits until nothing of a host's plugins runs or lies about any more; what still does is added to the problems.
    pub async fn settled(&self, host: &Host, patience: Duration, problems: &mut Vec<String>) -> bool {
        self.settled_but_for(host, patience, |left| left, problems).await
    }

    /// Waits as [`Self::settled`] does, for what is still left once `but_for` has taken out what may stay.
    pub async fn settled_but_for(
        &self,
        host: &Host,
        patience: Duration,
        but_for: impl Fn(Leftovers) -> Leftovers,
        problems: &mut Vec<String>,
    ) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            let left = but_for(host.leftovers());
            if left.is_empty() {
                return true;
            }
            if Instant::now() >= deadline {
                problems.push(format!("left on host {}: {left:?}", host.name()));
                return false;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Detaches the SRs and stops the hosts.
    pub async fn close(self) {
        for (host, sr) in [(&self.source, &self.source_sr), (&self.destination, &self.destination_sr)] {
            if let Err(error) = host.sr_detach(DBG, sr).await {
                tracing::warn!(%error, %sr, "the SR stays attached");
            }
            host.close();
        }
    }
}

/// A scenario that fails in the middle leaves disks active; nothing of them outlives it.
impl Drop for Stage {
    fn drop(&mut self) {
        for host in [&self.source, &self.destination] {
            host.kill(|_| true);
        }
    }
}

async fn make_sr(host: &Host, path: &Path, name: &str, verify: bool) -> Result<Sr> {
    std::fs::create_dir(path).with_context(|| format!("cannot make {}", path.display()))?;
    make_sr_in(host, path, name, verify).await
}

async fn make_sr_in(host: &Host, path: &Path, name: &str, verify: bool) -> Result<Sr> {
    let sr = Sr(Uuid::new_v4().to_string());
    let mut config = vec![("uri".to_owned(), format!("file://{}", path.display()))];
    if verify {
        config.push(("verify".to_owned(), "true".to_owned()));
    }
    let config = host.sr_create(DBG, KIND, &sr, &config, name, "").await.context("SR.create")?;
    host.sr_attach(DBG, KIND, &sr, &config).await.context("SR.attach")?;
    Ok(sr)
}
