//! A user cancels at some share of a volume: the destination is clean, and the same migration then succeeds.

use std::time::Duration;

use fake_xapi::smapiv2::{Error, Vdi};
use fake_xapi::sxm::{Event, Flow, migrate};

use crate::world::{BRANCHES, World};

/// Bytes a second, so that a share can be met.
const LINK: u64 = 32 << 20;

/// Cancels one migration when so many percent of one volume are over.
async fn cancelled_at(world: &World, volume: &Vdi, bytes: u64, percent: u64) {
    let migration = world.migration();
    let (cancel, wires, volume) = (migration.cancel.clone(), world.stage.source.wires().clone(), volume.clone());
    let mine = wires.clone();
    world.player.at(move |event| match event {
        Event::Started { source, .. } if *source == volume && percent == 0 => cancel.ask(),
        // A guest writes more in one migration than in another: a share may never be met.
        Event::Complete { source } if *source == volume => cancel.ask(),
        Event::Started { source, .. } if *source == volume && percent < 100 => {
            let (cancel, wires, wire) = (cancel.clone(), wires.clone(), wires.all().len());
            tokio::spawn(async move {
                let over = || wires.all().get(wire).map_or(0, |wire| wire.to_destination());
                while over() < bytes * percent / 100 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                cancel.ask();
            });
        }
        _ => {}
    });
    mine.limit(Some(LINK));
    let result = migrate(&world.stage.xapi, &migration, &world.player).await;
    mine.limit(None);
    world.player.at_nothing();
    let failed = result.expect_err("nobody noticed that it was cancelled");
    assert!(matches!(failed.error, Error::Cancelled), "{failed:?}");
    if let Err(error) = world.all_is_well().await {
        panic!("{error:#}, after {failed:?}");
    }
}

fn volumes(world: &World) -> [Vdi; 3] {
    [world.snapshot("a"), world.snapshot("b"), world.leaf()]
}

async fn cancelled_everywhere(flow: Flow) {
    let mut world = World::build(BRANCHES, flow).await.unwrap();
    let before = volumes(&world);
    let undisturbed = world.migrate_well().await.unwrap();
    for (nth, volume) in before.iter().enumerate() {
        let wire = undisturbed.wires.iter().find(|wire| wire.source == volume.0).unwrap();
        for percent in [0, 1, 50, 99, 100] {
            println!("{flow:?}, volume {nth} at {percent} %");
            let volume = volumes(&world)[nth].clone();
            cancelled_at(&world, &volume, wire.to_destination(), percent).await;
            world.migrate_well().await.unwrap();
        }
    }
    world.close().await.unwrap();
}

#[tokio::test]
async fn a_cancelled_migration_leaves_nothing_and_succeeds_later_in_the_flow_leaf() {
    cancelled_everywhere(Flow::Leaf).await;
}

#[tokio::test]
async fn a_cancelled_migration_leaves_nothing_and_succeeds_later_in_the_flow_tree() {
    cancelled_everywhere(Flow::Tree).await;
}

#[tokio::test]
async fn a_cancelled_migration_leaves_nothing_and_succeeds_later_in_the_flow_base() {
    cancelled_everywhere(Flow::Base).await;
}
