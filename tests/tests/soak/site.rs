//! The hosts, and the pair of SRs of each lane.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fake_xapi::db::Xapi;
use fake_xapi::disk::Inventory;
use fake_xapi::host::{Host, PluginSource, write_settings};
use fake_xapi::scenario::place_with;
use fake_xapi::script::CallLog;
use fake_xapi::smapiv2::Sr;
use tempfile::TempDir;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::breaks::Breaks;

const DBG: &str = "OpaqueRef:soak";

/// How long what a plugin left running may take to end by itself.
const PATIENCE: Duration = Duration::from_secs(30);

/// Short times, so that a peer that hangs is given up soon, and space is brought back.
const SETTINGS: &str = r#"{"handshake_seconds": 5, "peer_silence_seconds": 4,
    "drain_seconds": 10, "qmp_seconds": 20, "lock_seconds": 30, "gc": true}"#;

/// Bytes that must be free in memory for the SRs to be there.
const ROOM: u64 = 2 << 30;

/// An SR and the host that has it.
#[derive(Debug, Clone)]
pub struct Side {
    pub host: Arc<Host>,
    pub sr: Sr,
    pub path: PathBuf,
}

/// What the lanes share.
#[derive(Debug)]
pub struct Site {
    pub xapi: Xapi,
    /// One pair a lane.
    pub sides: Vec<[Side; 2]>,
    /// What is to break.
    pub breaks: Breaks,
    pub log: CallLog,
    hosts: [Arc<Host>; 2],
    _directory: TempDir,
}

impl Site {
    /// Starts two hosts and makes an SR on each for each lane.
    pub async fn build(lanes: usize) -> Result<Arc<Self>> {
        let directory = tempfile::Builder::new().prefix("fx-").tempdir_in(place_with(ROOM))?;
        let binaries = Path::new(env!("CARGO_BIN_EXE_fake-xapi")).parent().context("no directory")?.to_owned();
        let (plugins, log) = (PluginSource::Binaries(binaries), CallLog::default());
        let mut hosts = Vec::new();
        for name in ["a", "b"] {
            let host = Host::start(name, &directory.path().join(name), &plugins, &log).await?;
            write_settings(host.root(), SETTINGS)?;
            hosts.push(host);
        }
        let hosts: [Arc<Host>; 2] = hosts.try_into().map_err(|_| anyhow::anyhow!("two hosts"))?;
        let mut sides = Vec::new();
        for lane in 0..lanes {
            let [a, b] = &hosts;
            sides.push([make(a, directory.path(), lane).await?, make(b, directory.path(), lane).await?]);
        }
        let breaks = Breaks::install(&hosts);
        Ok(Arc::new(Self { xapi: Xapi::default(), sides, breaks, log, hosts, _directory: directory }))
    }

    /// Sees that the SRs are empty, detaches them, and sees that nothing runs and nothing lies about.
    pub async fn ends_well(&self) -> Result<()> {
        for side in self.sides.iter().flatten() {
            side.is_empty().await?;
            side.host.sr_detach(DBG, &side.sr).await?;
        }
        for host in &self.hosts {
            let deadline = Instant::now() + PATIENCE;
            while !host.leftovers().is_empty() {
                ensure!(Instant::now() < deadline, "left on host {}: {:?}", host.name(), host.leftovers());
                sleep(Duration::from_millis(50)).await;
            }
            host.close();
        }
        Ok(())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for host in &self.hosts {
            host.kill(|_| true);
        }
    }
}

async fn make(host: &Arc<Host>, directory: &Path, lane: usize) -> Result<Side> {
    let path = directory.join(format!("sr-{}{lane}", host.name()));
    std::fs::create_dir(&path)?;
    let sr = Sr(Uuid::new_v4().to_string());
    let config = [("uri".to_owned(), format!("file://{}", path.display()))];
    let config = host.sr_create(DBG, "qcow2", &sr, &config, "soak", "").await.context("SR.create")?;
    host.sr_attach(DBG, "qcow2", &sr, &config).await.context("SR.attach")?;
    Ok(Side { host: Arc::clone(host), sr, path })
}

impl Side {
    /// Sees that the SR has nothing, at the latest once it was attached anew, which removes what killed calls have left.
    pub async fn is_empty(&self) -> Result<()> {
        let listed = self.host.sr_ls(DBG, &self.sr).await?;
        ensure!(listed.is_empty(), "SR.ls on host {} still has {listed:?}", self.host.name());
        self.collect().await?;
        let left = Inventory::of(&self.path)?;
        ensure!(left.is_empty(), "left in {}: {:?}", self.path.display(), left.beyond(&Inventory::default()));
        Ok(())
    }

    /// Attaches the SR once more.
    pub async fn collect(&self) -> Result<()> {
        let config = [("uri".to_owned(), format!("file://{}", self.path.display()))];
        self.host.sr_attach(DBG, "qcow2", &self.sr, &config).await.context("SR.attach of an attached SR")
    }
}
