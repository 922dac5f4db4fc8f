//! A storage daemon of either side, or the mirror's supervisor, is killed before, during and after each mirror.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fake_xapi::host::Host;
use fake_xapi::smapiv2::Vdi;
use fake_xapi::sxm::{Event, Flow};

use crate::sweep::sweep;
use crate::world::{CHAIN, FLOWS, World, kill_daemon, kill_supervisors, told};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Who {
    SourceDaemon,
    DestinationDaemon,
    Supervisor,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum When {
    /// Right before Data.mirror.
    Before,
    /// Once half of the bytes are over.
    During,
    /// Once the first synchronisation is known to be complete: of a snapshot, its end; of the disk, it is ready.
    Complete,
    /// When the VM is about to be suspended.
    Switch,
}

#[derive(Debug, Clone, Copy)]
struct Case {
    flow: Flow,
    /// Whether it is the disk's mirror, and not the snapshot's.
    disk: bool,
    who: Who,
    when: When,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mirror = if self.disk { "disk" } else { "snapshot" };
        write!(f, "{} {mirror} {:?} {:?}", self.flow.name(), self.who, self.when)
    }
}

/// Bytes that the smaller of the mirrors sends at least, halved.
const HALF: u64 = 400 << 10;
/// Bytes a second, so that there is a half-way.
const LINK: u64 = 4 << 20;

impl Case {
    /// Whether the guest's own daemon is killed.
    fn hits_the_guest(&self) -> bool {
        self.disk && self.who == Who::SourceDaemon
    }

    /// Whether the migration cannot have succeeded: somebody was killed while the disk's mirror needed it.
    fn must_fail(&self) -> bool {
        match self.when {
            When::During => true,
            When::Complete | When::Switch => self.disk,
            When::Before => self.disk && self.who == Who::DestinationDaemon,
        }
    }

    async fn run(&self, kept: &mut Option<World>) -> Result<()> {
        let world = kept.insert(World::build(CHAIN, self.flow).await.context("the world")?);
        let killed = self.arm(world);
        if self.when == When::During {
            world.stage.source.wires().limit(Some(LINK));
        }
        let result = world.migrate().await;
        world.stage.source.wires().limit(None);
        world.player.at_nothing();
        ensure!(killed.load(Ordering::SeqCst), "nobody was killed");
        let told = match result {
            Ok(_) if self.must_fail() => bail!("the migration succeeded"),
            Ok(_) => {
                world.change_sides();
                if self.hits_the_guest() {
                    // Its disk's daemon was killed under it: what no flush covered may be lost, and was migrated as lost.
                    world.player.crash().await;
                    world.player.go_on().await.context("the guest goes on at the destination")?;
                }
                world.all_is_well().await.context("the migration succeeded all the same")?;
                return kept.take().unwrap().close().await;
            }
            Err(failed) => told(&failed),
        };
        if self.hits_the_guest() {
            world.reboot().await.context(told.clone()).context("starting the VM again")?;
        } else {
            let account = world.player.account().await;
            ensure!(account.failed == 0, "the guest's writes failed: {:?}, {told}", account.errors);
        }
        world.all_is_well().await.context(told)?;
        world.migrate_well().await.context("the same migration once more")?;
        kept.take().unwrap().close().await
    }

    /// Kills who is to be killed; whether there was somebody.
    fn kill(&self, source: &Host, destination: &Host, (from, to): &(Vdi, Vdi)) -> bool {
        match self.who {
            Who::SourceDaemon => kill_daemon(source, from),
            Who::DestinationDaemon => kill_daemon(destination, to),
            Who::Supervisor => kill_supervisors(source),
        }
    }

    /// Has somebody killed at the moment; answers whether it was done.
    fn arm(&self, world: &World) -> Arc<AtomicBool> {
        let killed = Arc::new(AtomicBool::new(false));
        let (case, done, leaf) = (*self, Arc::clone(&killed), world.leaf());
        let (source, destination) = (Arc::clone(&world.stage.source), Arc::clone(&world.stage.destination));
        let volumes = Mutex::new((Vdi::from(""), Vdi::from("")));
        world.player.at(move |event| match event {
            Event::Started { source: from, destination: to } if (*from == leaf) == case.disk => {
                let both = (from.clone(), to.clone());
                *volumes.lock().unwrap() = both.clone();
                if case.when == When::Before {
                    // The source's daemon may not be there yet.
                    case.kill(&source, &destination, &both);
                    done.store(true, Ordering::SeqCst);
                }
                if case.when == When::During {
                    let (source, destination, done) =
                        (Arc::clone(&source), Arc::clone(&destination), Arc::clone(&done));
                    let (wires, wire) = (source.wires().clone(), source.wires().all().len());
                    tokio::spawn(async move {
                        while wires.all().get(wire).is_none_or(|wire| wire.to_destination() < HALF) {
                            tokio::time::sleep(Duration::from_millis(2)).await;
                        }
                        done.store(case.kill(&source, &destination, &both), Ordering::SeqCst);
                    });
                }
            }
            Event::Complete { source: from } if (*from == leaf) == case.disk && case.when == When::Complete => {
                let both = volumes.lock().unwrap().clone();
                // The supervisor of a snapshot's mirror has ended by now.
                done.store(case.kill(&source, &destination, &both) || !case.disk, Ordering::SeqCst);
            }
            Event::Phase("switch") if case.when == When::Switch => {
                let both = volumes.lock().unwrap().clone();
                done.store(case.kill(&source, &destination, &both), Ordering::SeqCst);
            }
            _ => {}
        });
        killed
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for flow in FLOWS {
        for (disk, whens) in [
            (false, &[When::Before, When::During, When::Complete][..]),
            (true, &[When::Before, When::During, When::Complete, When::Switch]),
        ] {
            for when in whens {
                for who in [Who::SourceDaemon, Who::DestinationDaemon, Who::Supervisor] {
                    let supervised = flow != Flow::Leaf || disk;
                    if who == Who::Supervisor && (!supervised || *when == When::Before) {
                        continue;
                    }
                    cases.push(Case { flow, disk, who, when: *when });
                }
            }
        }
    }
    cases
}

#[test]
fn a_process_that_is_killed_fails_the_migration_and_harms_nothing() {
    sweep("a_process_that_is_killed", &cases(), async |case, world| case.run(world).await);
}
