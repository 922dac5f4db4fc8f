//! The connection of each mirror is cut or stalled: at the handshake, half-way, and when the mirror is ready.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fake_xapi::host::{WireFault, WireHarm, WireMoment};
use fake_xapi::smapiv2::Error;
use fake_xapi::sxm::{Event, Flow};

use crate::sweep::sweep;
use crate::world::{CHAIN, FLOWS, World, told};

/// The longest that a write of the guest may take. A second of silence is allowed while it waits for the peer; the rest
/// is this machine's.
const LONGEST_WRITE: f64 = 3.0;
/// Bytes of a wire that are in the middle of what has to be sent: half of what the disk has of its own. What a guest
/// writes meanwhile is sent too, more in one migration and less in another.
const HALFWAY: u64 = 384 << 10;
/// sparse_dd waits for a silent peer for ever, so a user gives up.
const GIVE_UP: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq)]
enum When {
    Handshake,
    Halfway,
    Ready,
}

#[derive(Debug, Clone, Copy)]
struct Case {
    flow: Flow,
    /// Whether it is the disk's connection, and not the snapshot's.
    disk: bool,
    when: When,
    how: WireHarm,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wire = if self.disk { "disk" } else { "snapshot" };
        write!(f, "{} {wire} {:?} {:?}", self.flow.name(), self.when, self.how)
    }
}

impl Case {
    fn order(&self, world: &World) -> Arc<AtomicBool> {
        let at = match self.when {
            When::Handshake => WireMoment::Handshake,
            When::Halfway => WireMoment::Bytes(HALFWAY),
            When::Ready => WireMoment::Told,
        };
        let (fault, disk, leaf) = (WireFault { at, how: self.how }, self.disk, world.leaf());
        let struck = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&struck);
        world.stage.source.wires().order(move |wire| {
            let is_this = (wire.source == leaf.0) == disk;
            told.fetch_or(is_this, Ordering::SeqCst);
            is_this.then_some(fault)
        });
        struck
    }

    async fn run(&self, kept: &mut Option<World>) -> Result<()> {
        // A guest of its own, whose longest write is this case's.
        let world = kept.insert(World::build(CHAIN, self.flow).await.context("the world")?);
        let struck = self.order(world);
        let (wires, leaf, when) = (world.stage.source.wires().clone(), world.leaf(), self.when);
        let migration = world.migration();
        let cancel = migration.cancel.clone();
        // Only nbdcopy in place of sparse_dd has no time-out at all.
        let for_ever = self.flow == Flow::Leaf && !self.disk && self.how == WireHarm::Stall;
        world.player.at(move |event| match event {
            Event::Complete { source } if when == When::Ready && *source == leaf => wires.tell(),
            Event::Started { source, .. } if for_ever && *source != leaf => {
                let cancel = cancel.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(GIVE_UP).await;
                    cancel.ask();
                });
            }
            _ => {}
        });
        let result = fake_xapi::sxm::migrate(&world.stage.xapi, &migration, &world.player).await;
        world.stage.source.wires().clear();
        world.player.at_nothing();
        ensure!(struck.load(Ordering::SeqCst), "there was no such wire");
        let failed = match result {
            Ok(_) => anyhow::bail!("the migration succeeded over a broken connection"),
            Err(failed) => failed,
        };
        ensure!(for_ever == matches!(failed.error, Error::Cancelled), "{failed:?}");
        if self.when == When::Ready {
            ensure!(failed.restarted, "not only the suspended VM's Datapath.deactivate told it: {failed:?}");
        }
        let told = told(&failed);
        let account = world.player.account().await;
        let longest = account.latency.max_seconds;
        ensure!(longest < LONGEST_WRITE, "a write of the guest took {longest} s, {told}");
        ensure!(account.failed == 0, "the guest's writes failed: {:?}, {told}", account.errors);
        world.all_is_well().await.context(told)?;
        world.migrate_well().await.context("the same migration once more")?;
        kept.take().unwrap().close().await
    }
}

fn cases() -> Vec<Case> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut cases = Vec::new();
    for flow in FLOWS {
        let (leaf, wires) = runtime.block_on(async {
            let mut world = World::build(CHAIN, flow).await.unwrap();
            let leaf = world.leaf();
            let migrated = world.migrate_well().await.unwrap();
            world.close().await.unwrap();
            (leaf, migrated.wires)
        });
        assert_eq!(wires.len(), 2, "{flow:?}");
        for wire in wires {
            let disk = wire.source == leaf.0;
            assert!(wire.to_destination() > 2 * HALFWAY, "{} bytes were sent", wire.to_destination());
            // A snapshot's mirror ends by itself, so that it is never just ready.
            let whens = &[When::Handshake, When::Halfway, When::Ready][..if disk { 3 } else { 2 }];
            for when in whens {
                for how in [WireHarm::Cut, WireHarm::Stall] {
                    cases.push(Case { flow, disk, when: *when, how });
                }
            }
        }
    }
    cases
}

#[test]
fn a_connection_that_is_cut_or_stalled_fails_the_migration_and_harms_nothing() {
    sweep("a_connection_that_is_cut_or_stalled", &cases(), async |case, world| case.run(world).await);
}
