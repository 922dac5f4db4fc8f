//! Two hosts, a disk at the one without a use for its plugins, and a guest that writes to it, while a test breaks things.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fake_xapi::disk::{Inventory, RawCopy, Sr as SrFiles};
use fake_xapi::host::write_settings;
use fake_xapi::nbd::Client;
use fake_xapi::scenario::{Stage, place_with};
use fake_xapi::smapiv2::{self, Error};
use fake_xapi::sxm::v1::{Disk, Import, Migrated, Stretch, Writer};
use fake_xapi::sxm::{Event, Observer, Quiet};
use tokio::sync::Mutex;

pub const SIZE: u64 = 1 << 20;
const DBG: &str = "OpaqueRef:test";

/// How long what a plugin left running may take to end by itself.
const SETTLE: Duration = Duration::from_secs(20);
/// After each write of a guest that is not to take all time there is.
const REST: Duration = Duration::from_millis(1);
/// Writes that are enough to see that a guest goes on.
const FEW: u64 = 5;

/// Short times, so that a peer that hangs is given up soon.
const SETTINGS: &str = r#"{"handshake_seconds": 3, "peer_silence_seconds": 2,
    "drain_seconds": 3, "qmp_seconds": 5, "lock_seconds": 10}"#;

/// Bytes that must be free in memory, as what a loss of power does is not what breaks here, for worlds to be there.
const ROOM: u64 = 512 << 20;

/// A disk that was not migrated yet.
pub struct World {
    pub stage: Stage,
    pub disk: Arc<Disk>,
    pub guest: Mutex<Option<Writer>>,
    /// What the guest writes.
    pub seed: u64,
    /// How many of its writes the mirror is to carry before the copy, and after it.
    pub writes: u64,
    /// Whether it leaves other things some time.
    pub rests: bool,
    directory: tempfile::TempDir,
}

/// Has something done at every event of a migration.
pub struct At<F>(pub F);

impl<F: Fn(&Event) + Send + Sync> Observer for At<F> {
    fn event(&self, event: &Event) {
        self.0(event);
    }
}

impl World {
    /// A disk with data, under a guest that leaves other things some time.
    pub async fn build() -> Result<Self> {
        let world = Self::empty().await?;
        world.go_on().await;
        Ok(world)
    }

    /// A disk that nobody writes to.
    pub async fn empty() -> Result<Self> {
        let binaries = Path::new(env!("CARGO_BIN_EXE_fake-xapi")).parent().context("a directory")?;
        let directory = tempfile::Builder::new().prefix("fx-disk-").tempdir_in(place_with(ROOM))?;
        let stage = Stage::build(binaries, false, place_with(ROOM)).await?;
        for host in [&stage.source, &stage.destination] {
            write_settings(host.root(), SETTINGS)?;
        }
        let disk = Disk::create(&directory.path().join("disk.raw"), SIZE)?;
        Ok(Self { stage, disk, guest: Mutex::default(), seed: 7, writes: 20, rests: true, directory })
    }

    /// Puts another disk in the place of the one that there is, of which nobody knows.
    pub async fn replace_disk(&mut self, size: u64, stretches: &[Stretch]) -> Result<()> {
        *self.guest.lock().await = None;
        self.disk = Disk::with(&self.directory.path().join("disk.raw"), size, stretches)?;
        Ok(())
    }

    /// Starts a guest where none runs.
    pub async fn go_on(&self) {
        let rest = if self.rests { REST } else { Duration::ZERO };
        self.guest.lock().await.get_or_insert_with(|| Writer::start(&self.disk, self.seed, rest));
    }

    pub fn import(&self) -> Import<'_> {
        let Stage { source, destination, destination_sr, .. } = &self.stage;
        Import { writes: self.writes, ..Import::new(source, destination, destination_sr, self.directory.path()) }
    }

    pub async fn migrate(&self, import: &Import<'_>, observer: &dyn Observer) -> smapiv2::Result<Migrated> {
        import.migrate(&self.disk, &mut *self.guest.lock().await, observer).await
    }

    /// Migrates undisturbed, and sees that everything is right.
    pub async fn migrate_well(&self) -> Result<()> {
        self.stage.destination.runner().faults().clear();
        self.stage.source.wires().clear();
        self.go_on().await;
        let import = self.import();
        let migrated = self.migrate(&import, &Quiet).await?;
        self.arrived(&import, migrated).await
    }

    /// The VM runs at the destination on the disk's bytes, whatever xapi does next, and nothing else is there; then the
    /// disk is destroyed.
    pub async fn arrived(&self, import: &Import<'_>, migrated: Migrated) -> Result<()> {
        let Stage { destination, destination_sr, destination_path, .. } = &self.stage;
        let Migrated { vdi, dp, uri } = migrated;
        // Where the last calls failed, xapi takes the reception for unfinished.
        import.toolstack_restart(&self.disk).await;
        self.clean_by_hand(import, Some(&vdi)).await?;
        let listed = destination.sr_ls(DBG, destination_sr).await?;
        let keys: Vec<&str> = listed.iter().map(|volume| volume.key.as_str()).collect();
        ensure!(keys == [vdi.0.as_str()], "SR.ls has {keys:?}, and not {vdi} alone");
        let mut expected = std::fs::read(self.disk.path())?;
        let size = usize::try_from(listed[0].virtual_size)?;
        ensure!((expected.len()..expected.len() + 4096).contains(&size), "the disk has {size} bytes");
        expected.resize(size, 0);

        let client = Client::connect(&uri).await?;
        for (index, piece) in expected.chunks(1 << 20).enumerate() {
            let read = client.read((index as u64) << 20, u32::try_from(piece.len())?).await?;
            same(piece, &read).context("by its export")?;
        }
        client.disconnect().await;
        destination.dp_destroy(DBG, &dp).await?;
        self.nothing_runs().await?;
        let mut sr = SrFiles::read(destination_path)?;
        if !sr.contradictions()?.is_empty() {
            self.collect().await?;
            sr = SrFiles::read(destination_path)?;
        }
        let wrong = [sr.contradictions()?, sr.check()?].concat();
        ensure!(wrong.is_empty(), "{wrong:?}");
        let raw = RawCopy::of(&sr.node_of(&vdi.0)?.image)?;
        same(&expected, &std::fs::read(raw.path())?).context("by qemu-img")?;
        destination.vdi_destroy(DBG, destination_sr, &vdi).await?;
        self.nothing_there().await
    }

    /// A migration has failed: the guest goes on at the source, nothing is at the destination once somebody has cleaned up
    /// after it, and the same migration then succeeds.
    pub async fn failed(&self, import: &Import<'_>) -> Result<()> {
        self.left_clean(import).await.context("after the failure")?;
        self.migrate_well().await.context("the same migration once more")
    }

    pub async fn left_clean(&self, import: &Import<'_>) -> Result<()> {
        self.stage.destination.runner().faults().clear();
        self.stage.source.wires().clear();
        self.go_on().await;
        if let Some(guest) = &*self.guest.lock().await {
            guest.more(FEW).await.context("the guest at the source")?;
        }
        import.toolstack_restart(&self.disk).await;
        self.clean_by_hand(import, None).await?;
        self.nothing_there().await
    }

    /// What a user does about what xapi leaves: datapaths and volumes of nobody are destroyed.
    async fn clean_by_hand(&self, import: &Import<'_>, but: Option<&smapiv2::Vdi>) -> Result<()> {
        let destination = &self.stage.destination;
        for (dp, info) in destination.dp_list() {
            if !dp.0.starts_with("vbd/") || Some(&info.vdi) != but {
                // That an import broke is said once; and a volume that is gone by now has no datapath either.
                if destination.dp_destroy(DBG, &dp).await.is_err() {
                    let _ = destination.dp_destroy(DBG, &dp).await;
                }
            }
        }
        import.sweep(but).await.context("sweeping")
    }

    /// The destination is as if nobody had ever migrated to it.
    async fn nothing_there(&self) -> Result<()> {
        self.nothing_runs().await?;
        let path = &self.stage.destination_path;
        let files = || -> Result<Vec<_>> {
            let trees = path.join("trees");
            if !trees.exists() {
                return Ok(Vec::new());
            }
            Ok(std::fs::read_dir(trees)?.flatten().map(|entry| entry.path()).collect())
        };
        if !Inventory::of(path)?.is_empty() || !files()?.is_empty() {
            // What a script that was killed has left is nobody's until somebody collects it.
            self.collect().await?;
        }
        let left = Inventory::of(path)?;
        ensure!(left.is_empty(), "left on disk: {:?}", left.beyond(&Inventory::default()));
        let files = files()?;
        ensure!(files.is_empty(), "left on disk: {files:?}");
        Ok(())
    }

    /// A pass of garbage collection: SR.attach of an attached SR is one.
    async fn collect(&self) -> Result<()> {
        let Stage { destination, destination_sr, destination_path, .. } = &self.stage;
        let config = [("uri".to_owned(), format!("file://{}", destination_path.display()))];
        Ok(destination.sr_attach(DBG, "qcow2", destination_sr, &config).await?)
    }

    async fn nothing_runs(&self) -> Result<()> {
        let mut problems = Vec::new();
        for host in [&self.stage.source, &self.stage.destination] {
            self.stage.settled(host, SETTLE, &mut problems).await;
        }
        ensure!(problems.is_empty(), "{problems:?}");
        Ok(())
    }

    /// Kills processes of the destination's plugins.
    pub fn kill(host: &fake_xapi::host::Host, what: &str) -> usize {
        host.kill(|command| command.contains(what))
    }

    /// Takes everything down; nothing may be left.
    pub async fn close(self) -> Result<()> {
        *self.guest.lock().await = None;
        self.nothing_runs().await
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for host in [&self.stage.source, &self.stage.destination] {
            host.kill(|_| true);
            host.close();
        }
    }
}

/// A migration that cannot have succeeded.
pub fn refused(result: smapiv2::Result<Migrated>) -> Result<Error> {
    match result {
        Ok(migrated) => bail!("it went well: {migrated:?}"),
        Err(error) => Ok(error),
    }
}

fn same(expected: &[u8], found: &[u8]) -> Result<()> {
    ensure!(expected.len() == found.len(), "{} bytes, and not {}", found.len(), expected.len());
    match expected.iter().zip(found).position(|(a, b)| a != b) {
        Some(place) => bail!("byte {place} is {:#x}, and not {:#x}", found[place], expected[place]),
        None => Ok(()),
    }
}
