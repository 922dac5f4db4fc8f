//! A VM's disks and the guests that write to them, moved along with the VM.

use std::sync::PoisonError;

use anyhow::{Context, Result, ensure};
use fake_xapi::db::ActiveDisk;
use fake_xapi::guest::{Durability, Guest, Ledger, Settings, verify_export};
use fake_xapi::host::Host;
use fake_xapi::nbd::{Client, Uri};
use fake_xapi::plan::Extent;
use fake_xapi::smapiv2::Vdi;
use fake_xapi::sxm::{Answer, Event, Observer};
use tokio::time::{Duration, Instant, sleep};

/// How long a guest may take to get a few records written.
const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes of a record.
const BLOCK: u64 = 4096;

type Hook = Box<dyn Fn(&Event) + Send + Sync>;

/// The guest of a disk, and where its disk is while the VM runs.
struct Disk {
    guest: Guest,
    uri: Option<Uri>,
    /// The daemon that it had there was killed.
    is_hit: bool,
}

/// All disks of a VM.
#[derive(Default)]
pub struct Disks {
    disks: tokio::sync::Mutex<Vec<Disk>>,
    hook: std::sync::Mutex<Option<Hook>>,
}

impl Disks {
    /// Blank disks whose guests write all over them.
    pub fn blank(sizes: &[u64], seed: u64) -> Result<Self> {
        let mut disks = Vec::new();
        for (index, size) in sizes.iter().enumerate() {
            let region = Extent { offset: 0, length: size / BLOCK * BLOCK };
            let settings = Settings {
                writes_per_second: Some(200),
                depth: 3,
                flush_every: 20,
                trims: true,
                ..Settings::new(region, seed ^ (index as u64 + 1) << 32)
            };
            let guest = Guest::new(settings.clone())?.succeeding(Ledger::blank(region, settings.seed))?;
            disks.push(Disk { guest, uri: None, is_hit: false });
        }
        Ok(Self { disks: tokio::sync::Mutex::new(disks), hook: std::sync::Mutex::default() })
    }

    /// Has something done at every event of a migration.
    pub fn at(&self, hook: impl Fn(&Event) + Send + Sync + 'static) {
        *self.hook.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(hook));
    }

    /// Has nothing done any more.
    pub fn at_nothing(&self) {
        *self.hook.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The VM runs: its guests write.
    pub async fn start(&self, active: &[ActiveDisk]) -> Result<()> {
        let mut disks = self.disks.lock().await;
        for one in active {
            let disk = disks.get_mut(one.index).context("no such disk")?;
            let there = disk.uri.replace(one.uri.clone());
            // What no flush covered may be lost with the daemon, unless the disk goes on elsewhere, where all of it has to be.
            if std::mem::take(&mut disk.is_hit) && there.as_ref() == Some(&one.uri) {
                disk.guest.crash().await;
            }
            disk.guest.start(&one.uri).await.with_context(|| format!("a guest at disk {}", one.index))?;
        }
        Ok(())
    }

    /// The guests stop to write and leave.
    pub async fn suspend(&self) {
        for disk in &mut *self.disks.lock().await {
            disk.guest.suspend().await;
        }
    }

    /// The disks were deactivated while nobody wrote.
    pub async fn closed(&self) {
        for disk in &mut *self.disks.lock().await {
            disk.guest.closed();
        }
    }

    /// The daemon of one disk was killed, and what no flush covered may be lost.
    pub async fn crash(&self, index: usize) {
        if let Some(disk) = self.disks.lock().await.get_mut(index) {
            disk.guest.crash().await;
            disk.is_hit = false;
        }
    }

    /// Kills the daemon of a volume, at a moment at which no guest comes or goes. Tells whether a disk's guest, which may be
    /// suspended, had it.
    pub async fn kill_daemon(&self, host: &Host, volume: &Vdi) -> bool {
        let mut disks = self.disks.lock().await;
        if host.kill_daemon(&volume.0) == 0 {
            return false;
        }
        let has = |disk: &&mut Disk| disk.uri.as_ref().is_some_and(|uri| uri.to_string().contains(&volume.0));
        match disks.iter_mut().find(has) {
            Some(disk) => disk.is_hit = true,
            None => return false,
        }
        true
    }

    /// Whether the guest of a disk has lost its daemon, and was not started again.
    pub async fn is_hit(&self, index: usize) -> bool {
        self.disks.lock().await.get(index).is_some_and(|disk| disk.is_hit)
    }

    /// The guests go on where they were.
    pub async fn go_on(&self) -> Result<()> {
        for disk in &mut *self.disks.lock().await {
            if !disk.guest.is_started() {
                let uri = disk.uri.clone().context("the VM does not run")?;
                disk.guest.start(&uri).await?;
            }
        }
        Ok(())
    }

    /// What the guests remember.
    pub async fn ledgers(&self) -> Vec<Ledger> {
        self.disks.lock().await.iter().map(|disk| disk.guest.ledger()).collect()
    }

    /// What the guests remember before a snapshot.
    pub async fn before_snapshot(&self) -> Vec<Ledger> {
        self.disks.lock().await.iter().map(|disk| disk.guest.before_snapshot()).collect()
    }

    /// What they remember after it.
    pub async fn after_snapshot(&self) -> Vec<Ledger> {
        self.disks.lock().await.iter().map(|disk| disk.guest.after_snapshot()).collect()
    }

    /// The disks hold something else by now.
    pub async fn become_like(&self, ledgers: &[Ledger]) -> Result<()> {
        for (disk, ledger) in self.disks.lock().await.iter_mut().zip(ledgers) {
            disk.guest = disk.guest.succeeding(ledger.clone())?;
        }
        Ok(())
    }

    /// One disk has grown.
    pub async fn grow(&self, index: usize, size: u64) -> Result<()> {
        if let Some(disk) = self.disks.lock().await.get_mut(index) {
            let mut ledger = disk.guest.ledger();
            ledger.grow(size);
            disk.guest = disk.guest.succeeding(ledger)?;
        }
        Ok(())
    }

    /// How many commands were refused so far, and what was said of the first ones.
    pub async fn failures(&self) -> (u64, Vec<String>) {
        let accounts: Vec<_> = self.disks.lock().await.iter().map(|disk| disk.guest.account()).collect();
        let failed = accounts.iter().map(|account| account.failed).sum();
        (failed, accounts.into_iter().flat_map(|account| account.errors).collect())
    }

    /// Waits until each guest has so many more commands acknowledged.
    pub async fn writes(&self, commands: u64) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        for disk in &*self.disks.lock().await {
            let wanted = disk.guest.acknowledged() + commands;
            while disk.guest.acknowledged() < wanted {
                ensure!(disk.guest.is_writing(), "a guest has stopped: {:?}", disk.guest.account().errors);
                ensure!(Instant::now() < deadline, "a guest gets nothing written");
                sleep(Duration::from_millis(5)).await;
            }
        }
        Ok(())
    }

    /// Sees that each disk, whose guest is suspended, holds what it must.
    pub async fn hold(&self) -> Result<()> {
        for (index, disk) in self.disks.lock().await.iter().enumerate() {
            let client = Client::connect(disk.uri.as_ref().context("the VM does not run")?).await?;
            let ledger = disk.guest.ledger();
            let verdict = verify_export(&ledger, &client, Durability::Acknowledged).await?;
            client.disconnect().await;
            if let Some(first) = verdict.violations.first() {
                anyhow::bail!("disk {index}: {} of {} blocks are wrong, {first}", verdict.wrong, verdict.checked);
            }
        }
        Ok(())
    }
}

impl Observer for Disks {
    fn event(&self, event: &Event) {
        if let Some(hook) = &*self.hook.lock().unwrap_or_else(PoisonError::into_inner) {
            hook(event);
        }
    }

    fn suspend(&self) -> Answer<'_> {
        Box::pin(async {
            Disks::suspend(self).await;
            Ok(())
        })
    }

    fn resume(&self, disks: Vec<ActiveDisk>) -> Answer<'_> {
        Box::pin(async move { self.start(&disks).await })
    }
}

/// Sees that an export holds what a snapshot must, which is settled by that.
pub async fn settles(uri: &Uri, ledger: &mut Ledger) -> Result<()> {
    const PIECE: u64 = 256 << 10;
    let client = Client::connect(uri).await?;
    let size = client.export().size;
    ensure!(size == ledger.region().length, "{size} bytes, not {}", ledger.region().length);
    for offset in (0..size).step_by(PIECE as usize) {
        let data = client.read(offset, PIECE.min(size - offset) as u32).await?;
        for (index, block) in data.chunks(BLOCK as usize).enumerate() {
            let settled = ledger.settle(offset + index as u64 * BLOCK, block);
            settled.map_err(|violation| anyhow::anyhow!("{violation}"))?;
        }
    }
    client.disconnect().await;
    Ok(())
}
