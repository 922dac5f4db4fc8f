//! The disk under the SR of one side breaks before or in the middle of a mirror, and is mended after the migration.
//!
//! At the destination that fails the migration. At the source it may go on, since what is broken need not be what it
//! needs: a full file system is still read. Then the guest runs at the destination, with all that was acknowledged.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fake_xapi::host::Host;
use fake_xapi::sxm::{Event, Failed, Flow, Migrated};

use crate::device;
use crate::faulty::{Fault, Faulty};
use crate::place::Place;
use crate::sweep::sweep;
use crate::world::{CHAIN, FLOWS, World, binaries, daemons, kill_all, told};

/// Bytes that the smaller of the mirrors sends at least, halved.
const HALF: u64 = 400 << 10;
/// Bytes a second, so that there is a half-way.
const LINK: u64 = 4 << 20;

/// How long those who use the file system may take to go.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Side {
    Source,
    Destination,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum When {
    /// Right before the mirror is started.
    Before,
    /// Once half of the bytes are over.
    Half,
}

#[derive(Debug, Clone, Copy)]
struct Case {
    side: Side,
    flow: Flow,
    /// Whether it is in the disk's mirror, and not in the snapshot's.
    disk: bool,
    when: When,
    fault: Fault,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mirror = if self.disk { "disk" } else { "snapshot" };
        write!(f, "{:?} {} {mirror} {:?} {:?}", self.side, self.flow.name(), self.when, self.fault)
    }
}

impl Case {
    async fn run(&self, kept: &mut Option<World>) -> Result<()> {
        let place = Place::new()?;
        device::make(&place)?;
        let faulty = Arc::new(Mutex::new(Faulty::mount(place).context("a disk that can be broken")?));
        let result = self.on(&faulty, kept).await;
        // The daemons have to be gone before the file system.
        let closed = match kept.take() {
            Some(world) if result.is_ok() => world.close().await,
            _ => Ok(()),
        };
        result.and(closed)
    }

    async fn on(&self, faulty: &Arc<Mutex<Faulty>>, kept: &mut Option<World>) -> Result<()> {
        let mut stage = World::stage(&binaries()).await?;
        let path = faulty.lock().unwrap().place().mounted().join("sr");
        std::fs::create_dir(&path)?;
        match self.side {
            Side::Source => stage.move_source(&path).await?,
            Side::Destination => stage.move_destination(&path).await?,
        }
        let world = kept.insert(World::on(stage, CHAIN, self.flow).await.context("the world")?);
        let stage = &world.stage;
        let host = Arc::clone(if self.side == Side::Source { &stage.source } else { &stage.destination });
        let daemon = daemons(&stage.source, &world.leaf());
        let broken = self.arm(world, faulty);
        stage.source.wires().limit(Some(LINK));
        let result = world.migrate().await;
        world.stage.source.wires().limit(None);
        world.player.at_nothing();
        ensure!(broken.load(Ordering::SeqCst), "the disk did not break");
        faulty.lock().unwrap().mend(self.fault)?;
        let is_writable = faulty.lock().unwrap().is_writable();
        let told = self.is_told(world, &result).await?;
        if !is_writable {
            boot(&host, faulty).await.context(told.clone())?;
        }
        match result {
            Ok(_) => world.change_sides(),
            Err(failed) if self.side == Side::Source => {
                let is_up = world.stage.xapi.vm(world.vm)?.domid.is_some();
                if !is_writable || !is_up {
                    world.reboot().await.context(told.clone()).context("starting the VM again")?;
                } else if failed.restarted {
                    // Its disk was closed on a broken one.
                    world.player.crash().await;
                    world.player.go_on().await.context(told.clone())?;
                } else {
                    let now = daemons(&world.stage.source, &world.leaf());
                    ensure!(now == daemon, "the guest's daemon died, {told}");
                }
            }
            Err(_) => {}
        }
        // xapi's own clean-up had a broken disk too.
        world.clean_by_hand().await.context(told.clone())?;
        world.all_is_well().await.context(told)?;
        world.migrate_well().await.context("the same migration once more")?;
        Ok(())
    }

    /// Judges what xapi and the guest were told of the fault, and puts it into words.
    async fn is_told(&self, world: &World, result: &Result<Migrated, Box<Failed>>) -> Result<String> {
        let told = match result {
            Ok(_) => "after a migration that succeeded".to_owned(),
            Err(failed) => told(failed),
        };
        let account = world.player.account().await;
        match self.side {
            Side::Destination if result.is_ok() => bail!("the migration succeeded on a broken disk"),
            Side::Destination => {
                ensure!(account.failed == 0, "the guest's writes failed: {:?}, {told}", account.errors);
            }
            Side::Source => {
                let is_refused = [Fault::Write, Fault::Space].contains(&self.fault);
                ensure!(!is_refused || account.failed > 0, "the guest was told of nothing, {told}");
                let is_needed = self.fault == Fault::Read && self.when == When::Before;
                ensure!(!is_needed || result.is_err(), "what could not be read was migrated");
            }
        }
        Ok(told)
    }

    /// Has the disk broken when it is time; answers whether it was.
    fn arm(&self, world: &World, faulty: &Arc<Mutex<Faulty>>) -> Arc<AtomicBool> {
        let broken = Arc::new(AtomicBool::new(false));
        let (case, done, leaf, faulty) = (*self, Arc::clone(&broken), world.leaf(), Arc::clone(faulty));
        let source = Arc::clone(&world.stage.source);
        world.player.at(move |event| match event {
            Event::Started { source: from, .. } if (*from == leaf) == case.disk => {
                let (wires, wire) = (source.wires().clone(), source.wires().all().len());
                let (done, faulty) = (Arc::clone(&done), Arc::clone(&faulty));
                let strike = move || {
                    done.store(faulty.lock().unwrap().break_down(case.fault).is_ok(), Ordering::SeqCst);
                };
                if case.when == When::Before {
                    strike();
                    return;
                }
                tokio::spawn(async move {
                    while wires.all().get(wire).is_none_or(|wire| wire.to_destination() < HALF) {
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                    strike();
                });
            }
            _ => {}
        });
        broken
    }
}

/// Ends whatever uses the file system, whose journal has given up, and mounts it again.
async fn boot(host: &Host, faulty: &Mutex<Faulty>) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        kill_all(host);
        let mounted = faulty.lock().unwrap().mount_again();
        if mounted.is_ok() || Instant::now() > until {
            return mounted;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Tells whether every case is to be tried.
fn is_sweep() -> bool {
    std::env::var("FAKE_XAPI_SWEEP").is_ok_and(|value| value == "all")
}

#[test]
fn a_disk_that_breaks_below_the_destination_fails_the_migration_and_harms_nothing() {
    if !device::can_be_made() {
        return;
    }
    let case = |flow, disk, fault| Case { side: Side::Destination, flow, disk, when: When::Half, fault };
    let mut cases = vec![
        case(Flow::Tree, true, Fault::Write),
        case(Flow::Base, false, Fault::Space),
        case(Flow::Leaf, true, Fault::Flush),
    ];
    if is_sweep() {
        let all = FLOWS.into_iter().flat_map(|flow| {
            let faults = [Fault::Write, Fault::Space, Fault::Flush].into_iter();
            faults.flat_map(move |fault| [true, false].map(|disk| case(flow, disk, fault)))
        });
        cases = all.collect();
    }
    sweep("a_disk_that_breaks_below_the_destination", &cases, async |case, world| case.run(world).await);
}

#[test]
fn a_disk_that_breaks_below_the_source_loses_nothing_whether_the_migration_fails_or_not() {
    if !device::can_be_made() {
        return;
    }
    let case = |flow, disk, when, fault| Case { side: Side::Source, flow, disk, when, fault };
    let mut cases = vec![
        case(Flow::Leaf, true, When::Before, Fault::Read),
        case(Flow::Tree, true, When::Half, Fault::Write),
        case(Flow::Base, false, When::Half, Fault::Full),
    ];
    if is_sweep() {
        let all = FLOWS.into_iter().flat_map(|flow| {
            let mirrors = [(true, When::Before), (true, When::Half), (false, When::Before), (false, When::Half)];
            mirrors.into_iter().flat_map(move |(disk, when)| Fault::ALL.map(|fault| case(flow, disk, when, fault)))
        });
        cases = all.collect();
    }
    sweep("a_disk_that_breaks_below_the_source", &cases, async |case, world| case.run(world).await);
}
