//! The disk under the destination's SR breaks in the middle of a mirror, and is mended after the migration has failed.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fake_xapi::host::Host;
use fake_xapi::sxm::{Event, Flow};

use crate::device;
use crate::faulty::{Fault, Faulty};
use crate::place::Place;
use crate::sweep::sweep;
use crate::world::{CHAIN, World, kill_all, told};

/// Bytes that the smaller of the mirrors sends at least, halved.
const HALF: u64 = 400 << 10;
/// Bytes a second, so that there is a half-way.
const LINK: u64 = 4 << 20;

/// How long those who use the file system may take to go.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy)]
struct Case {
    flow: Flow,
    /// Whether it is in the disk's mirror, and not in the snapshot's.
    disk: bool,
    fault: Fault,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mirror = if self.disk { "disk" } else { "snapshot" };
        write!(f, "{} {mirror} {:?}", self.flow.name(), self.fault)
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
        let world = kept.insert(World::build(CHAIN, self.flow).await.context("the world")?);
        let path = faulty.lock().unwrap().place().mounted().join("sr");
        std::fs::create_dir(&path)?;
        world.stage.move_destination(&path).await?;
        let broken = self.arm(world, faulty);
        world.stage.source.wires().limit(Some(LINK));
        let result = world.migrate().await;
        world.stage.source.wires().limit(None);
        world.player.at_nothing();
        ensure!(broken.load(Ordering::SeqCst), "the disk did not break");
        faulty.lock().unwrap().mend(self.fault)?;
        let failed = match result {
            Ok(_) => bail!("the migration succeeded on a broken disk"),
            Err(failed) => failed,
        };
        let told = told(&failed);
        let account = world.player.account().await;
        ensure!(account.failed == 0, "the guest's writes failed: {:?}, {told}", account.errors);
        if !faulty.lock().unwrap().is_writable() {
            boot(&world.stage.destination, faulty).await.context(told.clone())?;
        }
        // xapi's own clean-up had a broken disk too.
        world.clean_by_hand().await.context(told.clone())?;
        world.all_is_well().await.context(told)?;
        world.migrate_well().await.context("the same migration once more")?;
        Ok(())
    }

    /// Has the disk broken half-way; answers whether it was.
    fn arm(&self, world: &World, faulty: &Arc<Mutex<Faulty>>) -> Arc<AtomicBool> {
        let broken = Arc::new(AtomicBool::new(false));
        let (case, done, leaf, faulty) = (*self, Arc::clone(&broken), world.leaf(), Arc::clone(faulty));
        let source = Arc::clone(&world.stage.source);
        world.player.at(move |event| match event {
            Event::Started { source: from, .. } if (*from == leaf) == case.disk => {
                let (wires, wire) = (source.wires().clone(), source.wires().all().len());
                let (done, faulty) = (Arc::clone(&done), Arc::clone(&faulty));
                tokio::spawn(async move {
                    while wires.all().get(wire).is_none_or(|wire| wire.to_destination() < HALF) {
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                    done.store(faulty.lock().unwrap().break_down(case.fault).is_ok(), Ordering::SeqCst);
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

#[test]
fn a_disk_that_breaks_below_the_destination_fails_the_migration_and_harms_nothing() {
    if !device::can_be_made() {
        return;
    }
    let case = |flow, disk, fault| Case { flow, disk, fault };
    let mut cases = vec![
        case(Flow::Tree, true, Fault::Write),
        case(Flow::Base, false, Fault::Space),
        case(Flow::Leaf, true, Fault::Flush),
    ];
    if std::env::var("FAKE_XAPI_SWEEP").is_ok_and(|value| value == "all") {
        let all = [Flow::Leaf, Flow::Tree, Flow::Base].into_iter().flat_map(|flow| {
            let faults = [Fault::Write, Fault::Space, Fault::Flush].into_iter();
            faults.flat_map(move |fault| [true, false].map(|disk| case(flow, disk, fault)))
        });
        cases = all.collect();
    }
    sweep("a_disk_that_breaks_below", &cases, async |case, world| case.run(world).await);
}
