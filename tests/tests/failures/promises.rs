//! What a datapath must never say: that a mirror succeeded whose destination was lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fake_xapi::smapiv2::Vm;
use fake_xapi::sxm::Event;

use crate::world::{CHAIN, FLOWS, World, kill_daemon};

#[tokio::test]
async fn a_mirror_whose_peer_died_after_it_was_complete_makes_deactivate_fail() {
    for flow in FLOWS {
        let mut world = World::build(CHAIN, flow).await.unwrap();
        let (destination, leaf) = (Arc::clone(&world.stage.destination), world.leaf());
        let receivers = Arc::new(std::sync::Mutex::new(None));
        world.player.at(move |event| match event {
            Event::Started { source, destination } if *source == leaf => {
                *receivers.lock().unwrap() = Some(destination.clone());
            }
            Event::Complete { source } if *source == leaf => {
                assert!(kill_daemon(&destination, receivers.lock().unwrap().as_ref().unwrap()));
            }
            _ => {}
        });
        let mark = world.stage.log.len();
        let failed = world.migrate().await.unwrap_err();
        world.player.at_nothing();
        assert_eq!(failed.phase, "switch", "{failed:?}");
        let source = world.stage.source.name();
        let calls = world.stage.log.since(mark);
        let refused = |call: &&fake_xapi::script::CallRecord| {
            call.host == source && call.method == "Datapath.deactivate" && matches!(call.answer, Some(Err(_)))
        };
        assert!(calls.iter().any(|call| refused(&call)), "no deactivate failed: {failed:?}");
        assert!(failed.restarted);
        world.all_is_well().await.unwrap();
        world.migrate_well().await.unwrap();
        world.close().await.unwrap();
    }
}

/// The link is slow enough for the daemon to be there again long before the mirror would be complete.
#[tokio::test]
async fn a_destination_daemon_that_was_killed_and_started_again_never_ends_in_success() {
    for flow in FLOWS {
        let mut world = World::build(CHAIN, flow).await.unwrap();
        let (destination, leaf) = (Arc::clone(&world.stage.destination), world.leaf());
        let (sr, wires) = (world.stage.destination_sr.clone(), world.stage.source.wires().clone());
        let started_again = Arc::new(AtomicBool::new(false));
        let done = Arc::clone(&started_again);
        wires.clone().limit(Some(1 << 20));
        world.player.at(move |event| {
            let Event::Started { source, destination: volume } = event else { return };
            if *source != leaf {
                return;
            }
            let (before, wires, host, sr, volume) =
                (wires.all().len(), wires.clone(), Arc::clone(&destination), sr.clone(), volume.clone());
            let done = Arc::clone(&done);
            tokio::spawn(async move {
                while wires.all().get(before).is_none_or(|wire| wire.to_destination() < 256 << 10) {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                assert!(kill_daemon(&host, &volume));
                // Whoever has it attached, under the same datapaths and domains.
                let mut all = host.dp_list();
                all.retain(|(_, info)| info.vdi == volume);
                for (dp, info) in all {
                    let vm = Vm(info.vm.0.clone());
                    host.vdi_attach3("t", &dp, &sr, &volume, &vm, true).await.unwrap();
                    host.vdi_activate3("t", &dp, &sr, &volume, &vm).await.unwrap();
                }
                done.store(true, Ordering::SeqCst);
            });
        });
        let failed = world.migrate().await.unwrap_err();
        world.player.at_nothing();
        world.stage.source.wires().limit(None);
        assert!(started_again.load(Ordering::SeqCst), "{failed:?}");
        world.all_is_well().await.unwrap();
        world.migrate_well().await.unwrap();
        world.close().await.unwrap();
    }
}
