//! Connections, space and processes that a migration loses.

use std::fmt;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use fake_xapi::host::{WireFault, WireHarm, WireMoment};
use fake_xapi::script::Fault;
use fake_xapi::sxm::Quiet;

use crate::small::Small;
use crate::sweep::sweep;
use crate::world::{World, refused};

/// What a migration loses.
#[derive(Debug)]
pub enum Break {
    /// The copy's connection.
    Wire(WireHarm, WireMoment),
    /// A process of the destination, when the mirror has been running for a while.
    Kill(&'static str),
    /// So many bytes are free at the destination.
    Room(u64),
}

impl fmt::Display for Break {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl Break {
    pub async fn run(&self, kept: &mut Option<World>) -> Result<()> {
        if kept.is_none() {
            *kept = Some(World::build().await.context("the world")?);
        }
        let world = kept.as_mut().context("there is one")?;
        match self {
            Self::Wire(how, at) => {
                let fault = WireFault { at: *at, how: *how };
                world.stage.source.wires().order(move |_| Some(fault));
                self.fails(world).await
            }
            Self::Kill(what) => {
                let (what, host) = (*what, Arc::clone(&world.stage.destination));
                let kill = Fault::Before(Arc::new(move |_| assert!(World::kill(&host, what) > 0, "no {what}")));
                let host = &world.stage.destination;
                // When the copy's volume is attached.
                host.runner().faults().nth_of(host.name(), "Datapath.attach", 1, kill);
                self.fails(world).await
            }
            Self::Room(bytes) => {
                let small = Small::mount()?;
                let done = self.without_space(world, &small, *bytes).await;
                // The daemons have to be gone before the file system.
                drop(kept.take());
                done
            }
        }
    }

    async fn fails(&self, world: &World) -> Result<()> {
        world.go_on().await;
        let import = world.import();
        let result = world.migrate(&import, &Quiet).await;
        let error = refused(result)?;
        world.failed(&import).await.with_context(|| error.to_string())
    }

    async fn without_space(&self, world: &mut World, small: &Small, bytes: u64) -> Result<()> {
        world.stage.move_destination(&small.path()).await?;
        small.leave(bytes)?;
        world.go_on().await;
        let import = world.import();
        let error = refused(world.migrate(&import, &Quiet).await)?;
        // On a full SR too.
        world.left_clean(&import).await.with_context(|| error.to_string())?;
        small.make_room()?;
        world.migrate_well().await?;
        ensure!(small.path().exists());
        Ok(())
    }
}

#[test]
fn a_copy_whose_connection_is_cut_or_stalled_leaves_nothing_and_can_be_made_again() {
    let at = [WireMoment::Handshake, WireMoment::Bytes(64 << 10)];
    let cases: Vec<_> =
        [WireHarm::Cut, WireHarm::Stall].into_iter().flat_map(|how| at.map(|at| Break::Wire(how, at))).collect();
    sweep("a_copy_whose_connection_is_cut", &cases, async |case, world| case.run(world).await);
}

#[test]
fn a_destination_without_space_is_left_clean_and_the_migration_can_be_made_again() {
    if !Small::can_be_mounted() {
        return;
    }
    // Nothing fits; the volumes do, and not their data; half of the data does.
    let cases = [16, 500, 900].map(|kib| Break::Room(kib << 10));
    sweep("a_destination_without_space", &cases, async |case, world| case.run(world).await);
}

/// Nobody at the source sees it in time: it is the destination that must not start a guest on what has arrived.
#[test]
fn a_mirror_whose_destination_is_killed_fails_and_the_source_goes_on() {
    let cases = ["import-relay", "qemu-storage-daemon"].map(Break::Kill);
    sweep("a_mirror_whose_destination_is_killed", &cases, async |case, world| case.run(world).await);
}
