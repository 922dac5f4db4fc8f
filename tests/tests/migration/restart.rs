//! The toolstack of the source is restarted in the middle: it cancels what was under way, and the VM goes on.

use std::sync::Arc;
use std::time::Duration;

use fake_xapi::smapiv2::Vdi;
use fake_xapi::sxm::{Event, Flow, toolstack_restart};
use tokio::sync::Notify;

use crate::world::{CHAIN, World};

/// Bytes a second, so that there is a middle.
const LINK: u64 = 4 << 20;

#[derive(Debug, Clone, Copy, PartialEq)]
enum When {
    Started,
    Halfway,
    Complete,
}

/// Leaves a migration where it is, as a process that was killed leaves it, and restarts the toolstack.
async fn restarted(world: &World, volume: &Vdi, when: When) {
    let now = Arc::new(Notify::new());
    let (told, wires, volume) = (Arc::clone(&now), world.stage.source.wires().clone(), volume.clone());
    wires.clone().limit(Some(LINK));
    world.player.at(move |event| match event {
        Event::Started { source, .. } if *source == volume => match when {
            When::Started => told.notify_one(),
            When::Complete => {}
            When::Halfway => {
                let (told, wires, wire) = (Arc::clone(&told), wires.clone(), wires.all().len());
                tokio::spawn(async move {
                    while wires.all().get(wire).is_none_or(|wire| wire.to_destination() < 400 << 10) {
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                    told.notify_one();
                });
            }
        },
        Event::Complete { source } if *source == volume && when == When::Complete => told.notify_one(),
        _ => {}
    });
    tokio::select! {
        ended = world.migrate() => panic!("the migration ended: {ended:?}"),
        () = now.notified() => {}
    }
    world.player.at_nothing();
    world.stage.source.wires().limit(None);
    toolstack_restart(&world.stage.source).await;
    // A snapshot's copy is known to nobody after a restart: xapi's state has only mirrors of live disks
    // (ocaml/xapi/storage_migrate.ml, killall), and a user finds the rest by a scan.
    world.clean_by_hand().await.unwrap();
    world.all_is_well().await.unwrap();
}

async fn restarted_everywhere(flow: Flow) {
    let mut world = World::build(CHAIN, flow).await.unwrap();
    for nth in 0..2 {
        for when in [When::Started, When::Halfway, When::Complete] {
            println!("{flow:?}, volume {nth}, {when:?}");
            let volume = [world.snapshot("a"), world.leaf()][nth].clone();
            restarted(&world, &volume, when).await;
            world.migrate_well().await.unwrap();
        }
    }
    world.close().await.unwrap();
}

#[tokio::test]
async fn a_toolstack_restart_cancels_a_migration_that_succeeds_later_in_the_flow_leaf() {
    restarted_everywhere(Flow::Leaf).await;
}

#[tokio::test]
async fn a_toolstack_restart_cancels_a_migration_that_succeeds_later_in_the_flow_tree() {
    restarted_everywhere(Flow::Tree).await;
}

#[tokio::test]
async fn a_toolstack_restart_cancels_a_migration_that_succeeds_later_in_the_flow_base() {
    restarted_everywhere(Flow::Base).await;
}
