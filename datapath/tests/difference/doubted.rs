//! Mirrors of a difference that are switched off, verified, ended in the middle, and looked at.

use plugin::id::ContentId;
use plugin::mirror::{self, Base, How, Phase};
use serde_json::json;

use super::eventually::eventually;
use super::scene::{SIZE, Scene, announce};
use super::site::{MIB, assert_same, layers, reason};

#[test]
fn differences_can_be_switched_off() {
    let scene = Scene::with(&json!({"difference": false}));
    let mut target = scene.target(Some(scene.first), Some(&scene.promise(scene.first)));
    let record = scene.mirrored(scene.second, &mut target);
    assert!(reason(&record).contains("difference is off"), "{record:?}");
}

#[test]
fn a_destination_that_lies_is_caught_by_verifying_and_only_by_that() {
    for (verify, phase) in [(false, Phase::Finished), (true, Phase::Failed)] {
        let scene = Scene::with(&json!({"verify": verify}));
        let description = scene.promise(scene.first);
        let target = scene.target(None, Some(&description));
        let record = scene.site.wait(scene.mirror(scene.second, &target), phase);
        assert_eq!(layers(&record), 1);
        if verify {
            assert!(record.reason.unwrap().contains("differ at byte 0"));
        }
        let target = scene.target(Some(scene.second), Some(&announce(ContentId::random(), Base::Blank)));
        let volume = scene.site.create(SIZE);
        scene.site.wait(scene.mirror(volume, &target), phase);
    }
}

#[test]
fn what_is_verified_and_right_is_complete_and_leaves_nothing() {
    let scene = Scene::with(&json!({"verify": true}));
    let mut target = scene.target(Some(scene.first), Some(&scene.promise(scene.first)));
    scene.mirrored(scene.leaf, &mut target);
    let mut target = scene.target(Some(scene.first), Some(&scene.promise(scene.first)));
    scene.site.activate(scene.leaf, "7");
    let key = scene.site.mirror(scene.leaf, "7", "e", &target.socket);
    scene.site.wait(key, Phase::Ready);
    scene.site.io(scene.leaf, &["write -P 6 3M 1M"]);
    scene.site.path("deactivate", scene.leaf, "7");
    let record = scene.site.record(key);
    assert_eq!((record.phase, layers(&record)), (Phase::Finished, 2), "{:?}", record.reason);
    scene.site.path("detach", scene.leaf, "7");
    target.stop();
    assert_same(&scene.site.chain(scene.leaf), target.image.to_str().unwrap());
}

#[test]
fn a_mirror_of_several_layers_can_be_ended_at_any_place_and_leaves_nothing() {
    let scene = Scene::new();
    scene.site.activate(scene.leaf, "7");
    // Within the first layer, in its flush, within the second, and in the first bytes of all.
    for bytes in [40, 300, MIB / 2, MIB + 700, 2 * MIB] {
        for how in ["cut", "stall", "kill"] {
            let target = scene.target(Some(scene.first), Some(&scene.promise(scene.first)));
            let link = scene.link(&target);
            match how {
                "cut" => link.cut_after(bytes),
                _ => link.stall_after(bytes),
            }
            let key = scene.site.mirror(scene.leaf, "7", "e", link.socket());
            match how {
                "cut" => drop(scene.site.wait(key, Phase::Failed)),
                "stall" => {
                    eventually("progress", || (link.passed() >= bytes).then_some(()));
                    let record = mirror::end(&scene.site.host, &scene.site.record(key), How::Cancel, "test").unwrap();
                    assert_eq!(record.phase, Phase::Cancelled, "{:?}", record.reason);
                }
                _ => {
                    eventually("progress", || (link.passed() >= bytes).then_some(()));
                    let process = scene.site.record(key).supervisor.unwrap();
                    process.kill(&scene.site.host, std::time::Duration::from_secs(20)).unwrap();
                    link.cut();
                    mirror::reap(&scene.site.host, scene.leaf).unwrap();
                }
            }
            scene.assert_serves(scene.leaf);
        }
    }
    let snapshot = scene.site.snapshot(scene.leaf);
    scene.site.release(scene.leaf, "7");
    scene.site.destroy(snapshot);
}

#[test]
fn progress_never_goes_back_over_several_layers() {
    let scene = Scene::new();
    let target = scene.target(Some(scene.first), Some(&scene.promise(scene.first)));
    let link = scene.link(&target);
    link.slow(4 * MIB);
    let key = scene.site.mirror(scene.leaf, "-1", "e", link.socket());
    let (mut last, mut jobs) = (0.0, std::collections::BTreeSet::new());
    let record = eventually("end", || {
        let record = scene.site.record(key);
        let fraction = record.progress.fraction();
        assert!(fraction >= last, "{fraction} after {last}");
        last = fraction;
        jobs.insert((record.progress.earlier, record.progress.later));
        record.phase.is_terminal().then_some(record)
    });
    assert_eq!((record.phase, layers(&record)), (Phase::Finished, 2));
    assert!(jobs.len() >= 2, "{jobs:?}");
}
