//! Disks that come from an SMAPIv1 SR, under a writing guest, and with everything failing that can.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, clippy::print_stdout, reason = "a test talks to people")]

#[path = "failures/small.rs"]
mod small;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fake_xapi::disk::{Inventory, RawCopy, Sr as SrFiles};
use fake_xapi::host::{WireFault, WireHarm, WireMoment};
use fake_xapi::nbd::Client;
use fake_xapi::scenario::Stage;
use fake_xapi::script::Fault;
use fake_xapi::smapiv2::{Dp, Vm, nbd_server};
use fake_xapi::sxm::v1::{Disk, Import, Receiving, Writer};
use small::Small;

const SIZE: u64 = 4 << 20;
const DBG: &str = "OpaqueRef:test";
const SETTLE: Duration = Duration::from_secs(20);

/// Two hosts and a disk at the one without a use for its plugins.
struct World {
    stage: Stage,
    disk: Arc<Disk>,
    directory: tempfile::TempDir,
}

impl World {
    async fn build() -> Result<Self> {
        let binaries = Path::new(env!("CARGO_BIN_EXE_fake-xapi")).parent().context("a directory")?;
        let directory = tempfile::Builder::new().prefix("fx-").tempdir_in("/tmp")?;
        let stage = Stage::build(binaries, false, directory.path()).await?;
        let disk = Disk::create(&directory.path().join("disk.raw"), SIZE)?;
        Ok(Self { stage, disk, directory })
    }

    async fn migrate(&self, guest: &mut Option<Writer>) -> fake_xapi::smapiv2::Result<Receiving> {
        self.import().migrate(&self.disk, guest).await
    }

    fn import(&self) -> Import<'_> {
        let Stage { source, destination, destination_sr, .. } = &self.stage;
        Import { source, destination, sr: destination_sr, place: self.directory.path() }
    }

    /// One volume is there, with the disk's bytes, and can be used; nothing else is.
    async fn arrived(&self, receiving: &Receiving) -> Result<()> {
        let Stage { destination, destination_sr, destination_path, .. } = &self.stage;
        let leaf = &receiving.leaf.vdi;
        self.nothing_runs().await?;
        let listed = destination.sr_ls(DBG, destination_sr).await?;
        let keys: Vec<&str> = listed.iter().map(|volume| volume.key.as_str()).collect();
        ensure!(keys == [leaf.0.as_str()], "SR.ls has {keys:?}, and not {leaf} alone");
        let sr = SrFiles::read(destination_path)?;
        let wrong = [sr.contradictions()?, sr.check()?].concat();
        ensure!(wrong.is_empty(), "{wrong:?}");
        let expected = std::fs::read(self.disk.path())?;
        let raw = RawCopy::of(&sr.node_of(&leaf.0)?.image)?;
        same(&expected, &std::fs::read(raw.path())?).context("by qemu-img")?;

        // A guest starts on it.
        let (dp, vm) = (Dp::from("vbd/9/xvda"), Vm::from("9"));
        let attached = destination.vdi_attach3(DBG, &dp, destination_sr, leaf, &vm, true).await?;
        destination.vdi_activate3(DBG, &dp, destination_sr, leaf, &vm).await?;
        let client = Client::connect(&nbd_server(&attached).context("an NBD server")?).await?;
        let length = u32::try_from(SIZE)?;
        same(&expected, &client.read(0, length).await?).context("by its export")?;
        client.disconnect().await;
        destination.dp_destroy(DBG, &dp).await?;
        destination.vdi_destroy(DBG, destination_sr, leaf).await?;
        self.nothing_there().await
    }

    /// The destination is as if nobody had ever migrated to it.
    async fn nothing_there(&self) -> Result<()> {
        self.nothing_runs().await?;
        let left = Inventory::of(&self.stage.destination_path)?;
        ensure!(left.is_empty(), "left on disk: {:?}", left.beyond(&Inventory::default()));
        Ok(())
    }

    async fn nothing_runs(&self) -> Result<()> {
        let mut problems = Vec::new();
        for host in [&self.stage.source, &self.stage.destination] {
            self.stage.settled(host, SETTLE, &mut problems).await;
        }
        ensure!(problems.is_empty(), "{problems:?}");
        Ok(())
    }

    /// A migration that cannot succeed leaves nothing once it was swept up after, and can be made again.
    async fn fails_and_then_goes_well(&self, guest: &mut Option<Writer>) -> Result<()> {
        if let Ok(receiving) = self.migrate(guest).await {
            bail!("it went well: {receiving:?}");
        }
        self.again(guest).await
    }

    /// What failed has left nothing once somebody has cleaned up after it.
    async fn swept(&self) -> Result<()> {
        self.import().sweep().await.context("sweeping")?;
        self.nothing_there().await.context("after the failure")
    }

    async fn again(&self, guest: &mut Option<Writer>) -> Result<()> {
        self.stage.destination.runner().faults().clear();
        self.stage.source.wires().clear();
        self.swept().await?;
        if guest.is_none() {
            *guest = Some(Writer::start(&self.disk, 99));
        }
        let receiving = self.migrate(guest).await.context("the second migration")?;
        self.arrived(&receiving).await.context("after the second migration")
    }

    fn guest(&self) -> Option<Writer> {
        Some(Writer::start(&self.disk, 7))
    }

    /// Kills processes of the destination's plugins.
    fn kill(&self, what: &str) -> usize {
        self.stage.destination.kill(|command| command.contains(what))
    }
}

fn same(expected: &[u8], found: &[u8]) -> Result<()> {
    ensure!(expected.len() == found.len(), "{} bytes, and not {}", found.len(), expected.len());
    match expected.iter().zip(found).position(|(a, b)| a != b) {
        Some(place) => bail!("byte {place} is {:#x}, and not {:#x}", found[place], expected[place]),
        None => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_arrives_with_every_byte_that_its_guest_wrote() {
    let world = World::build().await.unwrap();
    let receiving = world.migrate(&mut world.guest()).await.unwrap();
    world.arrived(&receiving).await.unwrap();
    world.stage.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_nobody_writes_to_arrives() {
    let world = World::build().await.unwrap();
    let receiving = world.migrate(&mut None).await.unwrap();
    world.arrived(&receiving).await.unwrap();
    world.stage.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_fails_leaves_nothing_and_the_migration_can_be_made_again() {
    for (method, number) in [
        ("Volume.create", 0),
        ("Volume.create", 1),
        ("Volume.snapshot", 0),
        ("Datapath.attach", 0),
        ("Datapath.activate", 0),
        ("Datapath.import_activate", 0),
        ("Datapath.attach", 1),
        ("Datapath.activate", 1),
        ("Datapath.deactivate", 1),
        ("Volume.compose", 0),
    ] {
        // What was done and is not known to have been done matters where there is something to undo.
        let after = matches!(method, "Volume.snapshot" | "Datapath.import_activate" | "Volume.compose");
        for fault in [Fault::FailInstead].into_iter().chain(after.then_some(Fault::FailAfter)) {
            let world = World::build().await.unwrap();
            let host = &world.stage.destination;
            host.runner().faults().nth_of(host.name(), method, number, fault.clone());
            let done = world.fails_and_then_goes_well(&mut world.guest()).await;
            done.with_context(|| format!("{method} {number} {fault:?}")).unwrap();
            world.stage.close().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_is_made_twice_does_no_harm() {
    for method in ["Datapath.import_activate", "Datapath.deactivate", "Datapath.detach", "Volume.compose"] {
        for fault in [Fault::TwiceInARow, Fault::TwiceAtOnce] {
            let world = World::build().await.unwrap();
            let host = &world.stage.destination;
            host.runner().faults().nth_of(host.name(), method, 0, fault.clone());
            let receiving = world.migrate(&mut world.guest()).await;
            let receiving = receiving.with_context(|| format!("{method} {fault:?}")).unwrap();
            host.runner().faults().clear();
            world.arrived(&receiving).await.with_context(|| format!("{method} {fault:?}")).unwrap();
            world.stage.close().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_whose_connection_is_cut_or_stalled_leaves_nothing_and_can_be_made_again() {
    for how in [WireHarm::Cut, WireHarm::Stall] {
        for at in [WireMoment::Handshake, WireMoment::Bytes(256 << 10)] {
            let world = World::build().await.unwrap();
            let fault = WireFault { at, how };
            world.stage.source.wires().order(move |_| Some(fault));
            let done = world.fails_and_then_goes_well(&mut world.guest()).await;
            done.with_context(|| format!("{how:?} {at:?}")).unwrap();
            world.stage.close().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_without_space_is_left_clean_and_the_migration_can_be_made_again() {
    if !Small::can_be_mounted() {
        return;
    }
    // Nothing fits; the volumes do, and not their data; half of the data does.
    for room in [16 << 10, 1200 << 10, 3 << 20] {
        let small = Small::mount().unwrap();
        let mut world = World::build().await.unwrap();
        world.stage.move_destination(&small.path()).await.unwrap();
        small.leave(room).unwrap();
        let mut guest = world.guest();
        let failed = world.migrate(&mut guest).await;
        assert!(failed.is_err(), "it went well with {room} bytes");
        world.swept().await.unwrap();
        small.make_room().unwrap();
        world.again(&mut guest).await.with_context(|| format!("{room} bytes")).unwrap();
        world.stage.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_whose_destination_is_killed_fails_and_the_source_goes_on() {
    for what in ["import-relay", "qemu-storage-daemon"] {
        let world = Arc::new(World::build().await.unwrap());
        let mut guest = world.guest();
        let killing = Arc::clone(&world);
        let host = &world.stage.destination;
        // When the copy's volume is attached the mirror has been running for a while.
        let kill = Fault::Before(Arc::new(move |_| assert!(killing.kill(what) > 0, "no {what} to kill")));
        host.runner().faults().nth_of(host.name(), "Datapath.attach", 1, kill);
        world.fails_and_then_goes_well(&mut guest).await.context(what).unwrap();
    }
}
