//! The destination's file system runs out of space: at once, in a snapshot's mirror, in the disk's mirror.

use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use fake_xapi::sxm::Flow;

use crate::small::Small;
use crate::sweep::sweep;
use crate::world::{CHAIN, FLOWS, World, told};

const KIB: u64 = 1 << 10;

#[derive(Debug, Clone, Copy)]
struct Case {
    flow: Flow,
    /// Bytes that are free when the migration starts.
    room: u64,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} room {}", self.flow.name(), self.room)
    }
}

impl Case {
    async fn run(&self, kept: &mut Option<World>) -> Result<()> {
        let small = Small::mount().context("a small file system")?;
        let result = self.on(&small, kept).await;
        // The daemons have to be gone before the file system.
        let closed = match kept.take() {
            Some(world) if result.is_ok() => world.close().await,
            _ => Ok(()),
        };
        result.and(closed)
    }

    async fn on(&self, small: &Small, kept: &mut Option<World>) -> Result<()> {
        let world = kept.insert(World::build(CHAIN, self.flow).await.context("the world")?);
        world.stage.move_destination(&small.path()).await?;
        small.leave(self.room)?;
        let failed = match world.migrate().await {
            Ok(_) => bail!("the migration succeeded without space"),
            Err(failed) => failed,
        };
        let told = told(&failed);
        let account = world.player.account().await;
        ensure!(account.failed == 0, "the guest's writes failed: {:?}, {told}", account.errors);
        world.all_is_well().await.context(told)?;
        small.make_room()?;
        world.migrate_well().await.context("the same migration once more")?;
        Ok(())
    }
}

#[test]
fn a_destination_without_space_fails_the_migration_and_is_clean_after_it() {
    if !Small::can_be_mounted() {
        return;
    }
    // Nothing fits; a snapshot does not; the snapshot of 1 MiB does, and the disk on it does not.
    let rooms = [16 * KIB, 700 * KIB, 2200 * KIB];
    let cases: Vec<Case> = FLOWS.iter().flat_map(|flow| rooms.map(|room| Case { flow: *flow, room })).collect();
    sweep("a_destination_without_space", &cases, async |case, world| case.run(world).await);
}
