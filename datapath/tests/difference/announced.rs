//! What is sent to destinations that announce one thing or another.

use std::process::Command;

use plugin::id::ContentId;
use plugin::mirror::{Base, Phase, Plan};
use serde_json::json;

use super::scene::{SIZE, Scene, Target, announce, assert_sent};
use super::site::{MIB, Site, assert_same, layers, reason};

#[test]
fn a_destination_that_promises_nothing_is_sent_everything() {
    let scene = Scene::new();
    let content = scene.content(scene.first);
    let other =
        announce(ContentId::random(), Base::Content(content)).replace("xapi-storage-qcow2", "xapi-storage-lvm");
    for (description, words) in [
        (None, "announces nothing"),
        (Some("a disk"), "not of this product"),
        (Some(&*other), "not of this product"),
        (Some("xapi-storage-qcow2 session=1 base=2"), "not a lower-case uuid"),
        (Some(&*announce(ContentId::random(), Base::Unknown)), "does not know"),
        (Some(&*announce(ContentId::random(), Base::Content(ContentId::random()))), "not sent from here"),
    ] {
        let mut target = scene.target(None, description);
        let record = scene.mirrored(scene.second, &mut target);
        assert!(reason(&record).contains(words), "{record:?}");
        assert!(record.progress.sent > 8 * MIB, "{record:?}");
    }
}

#[test]
fn only_the_layers_above_what_the_destination_holds_are_sent() {
    let scene = Scene::new();
    for (volume, holds, expected, bytes) in [
        (scene.second, scene.first, 1, MIB),
        (scene.leaf, scene.second, 1, 2 * MIB),
        (scene.leaf, scene.first, 2, 3 * MIB),
    ] {
        let description = announce(ContentId::random(), Base::Content(scene.content(holds)));
        let mut target = scene.target(Some(holds), Some(&description));
        let record = scene.mirrored(volume, &mut target);
        assert_eq!(layers(&record), expected);
        assert_sent(&record, bytes);
        assert!((record.progress.fraction() - 1.0).abs() < 1e-6, "{:?}", record.progress);
    }
}

#[test]
fn a_live_leaf_is_sent_as_a_difference_with_all_that_its_guest_writes() {
    let scene = Scene::new();
    for holds in [scene.second, scene.first] {
        let description = scene.promise(holds);
        let mut target = scene.target(Some(holds), Some(&description));
        scene.site.activate(scene.leaf, "7");
        let key = scene.site.mirror(scene.leaf, "7", "e", &target.socket);
        scene.site.io(scene.leaf, &["write -P 6 3M 1M"]);
        scene.site.wait(key, Phase::Ready);
        scene.site.io(scene.leaf, &["write -P 7 12M 1M", "write -z 0 64k", "discard 1M 64k"]);
        let record = scene.site.finish(key);
        assert_eq!(record.phase, Phase::Finished, "{:?}", record.reason);
        assert_eq!(layers(&record), if holds == scene.second { 1 } else { 2 });
        assert!(record.progress.sent < 8 * MIB, "{:?}", record.progress);
        scene.assert_serves(scene.leaf);
        scene.site.io(scene.leaf, &["write -P 1 0 1"]);
        scene.site.release(scene.leaf, "7");
        // What the checks above wrote came after the end.
        write_both(&scene, &mut target, &["write -P 0x66 9M 64k", "write -P 1 0 1"]);
    }
}

/// Writes the same to the leaf and to a destination, and compares them.
fn write_both(scene: &Scene, target: &mut Target, commands: &[&str]) {
    scene.site.write(scene.leaf, commands);
    let uri = format!("nbd+unix:///e?socket={}", target.socket.display());
    let mut io = Command::new("qemu-io");
    for text in commands {
        io.args(["-c", text]);
    }
    assert!(io.args(["-f", "raw", &uri]).output().unwrap().status.success());
    target.stop();
    assert_same(&scene.site.chain(scene.leaf), target.image.to_str().unwrap());
}

#[test]
fn a_guest_that_was_resized_is_sent_as_a_difference_through_layers_of_every_size() {
    let scene = Scene::new();
    let size = SIZE + 16 * MIB;
    scene.site.grow(scene.leaf, size);
    scene.site.write(scene.leaf, &["write -P 9 40M 1M"]);
    let third = scene.site.snapshot(scene.leaf);
    scene.site.write(scene.leaf, &["write -P 10 31M 2M"]);
    for (volume, holds, expected) in
        [(third, scene.second, 1), (scene.leaf, scene.second, 2), (scene.leaf, scene.first, 3)]
    {
        let mut target = scene.target_of(size, Some(holds), Some(&scene.promise(holds)));
        assert_eq!(layers(&scene.mirrored(volume, &mut target)), expected);
    }
    // Of what is larger than the source nobody knows what lies beyond.
    let mut target = scene.target_of(size, Some(scene.first), Some(&scene.promise(scene.first)));
    let record = scene.mirrored(scene.second, &mut target);
    assert!(reason(&record).contains("another size"), "{record:?}");
    let target = scene.target_of(SIZE, Some(scene.first), Some(&scene.promise(scene.first)));
    let record = scene.site.wait(scene.mirror(scene.leaf, &target), Phase::Failed);
    assert!(record.reason.unwrap().contains("invalid size"));
}

#[test]
fn a_blank_destination_costs_the_data_and_not_the_size() {
    let scene = Scene::new();
    for size in [64 * MIB, 1 << 40] {
        let volume = scene.site.create(size);
        scene.site.write(volume, &["write -P 1 0 4M", "write -P 2 60M 2M", "write -z 8M 1M"]);
        for larger in [0, MIB] {
            let description = announce(ContentId::random(), Base::Blank);
            let mut target = scene.target_of(size + larger, None, Some(&description));
            let record = scene.site.wait(scene.mirror(volume, &target), Phase::Finished);
            assert_eq!(record.plan, Some(Plan::Blank));
            assert_sent(&record, 6 * MIB);
            target.stop();
            use std::os::unix::fs::MetadataExt;
            let taken = target.image.metadata().unwrap().blocks() * 512;
            assert!(taken < 7 * MIB, "{taken}");
            let blocks = target.image.to_str().unwrap().to_owned();
            if size < 1 << 40 {
                assert_same(&scene.site.chain(volume), &blocks);
            } else {
                check_pattern(&blocks);
            }
        }
    }
}

/// Checks what is written to a disk that is too large to be compared.
fn check_pattern(image: &str) {
    let mut io = Command::new("qemu-io");
    for text in ["read -P 1 0 4M", "read -P 0 4M 56M", "read -P 2 60M 2M", "read -P 0 62M 100M", "read -P 0 512G 4M"]
    {
        io.args(["-c", text]);
    }
    let output = io.args(["-r", "-f", "qcow2", image]).output().unwrap();
    assert!(!String::from_utf8_lossy(&output.stdout).contains("failed"), "{output:?}");
}

#[test]
fn a_live_leaf_on_a_blank_destination_is_sent_whole() {
    let scene = Scene::new();
    let mut target = scene.target(None, Some(&announce(ContentId::random(), Base::Blank)));
    scene.site.activate(scene.leaf, "7");
    let key = scene.site.mirror(scene.leaf, "7", "e", &target.socket);
    scene.site.io(scene.leaf, &["write -P 6 3M 1M", "write -z 0 1M"]);
    scene.site.wait(key, Phase::Ready);
    scene.site.io(scene.leaf, &["write -P 7 12M 1M", "write -z 1M 1M", "discard 3M 64k"]);
    let record = scene.site.finish(key);
    assert_eq!((record.phase, record.plan), (Phase::Finished, Some(Plan::Blank)), "{:?}", record.reason);
    scene.site.release(scene.leaf, "7");
    target.stop();
    assert_same(&scene.site.chain(scene.leaf), target.image.to_str().unwrap());
}

#[test]
fn what_was_sent_in_a_session_is_known_in_the_next_until_the_host_boots() {
    let scene = Scene::new();
    let session = ContentId::random();
    let mut target = scene.target(None, Some(&announce(session, Base::Blank)));
    scene.mirrored(scene.first, &mut target);
    for lost in [false, true] {
        if lost {
            std::fs::remove_dir_all(scene.site.host.runtime_dir().join("sessions")).unwrap();
        }
        let description = announce(ContentId::random(), Base::Content(session));
        let mut target = scene.target(Some(scene.first), Some(&description));
        let record = scene.mirrored(scene.second, &mut target);
        match lost {
            false => assert_eq!(layers(&record), 1),
            true => assert!(reason(&record).contains("not sent from here")),
        }
    }
}

#[test]
fn a_session_that_was_begun_is_never_trusted_again() {
    let scene = Scene::new();
    let session = ContentId::random();
    let promise = announce(session, Base::Content(scene.content(scene.first)));
    // Begun and broken off.
    let mut target = scene.target(Some(scene.first), Some(&promise));
    let link = scene.link(&target);
    link.cut_after(MIB / 2);
    let key = scene.site.mirror(scene.second, "-1", "e", link.socket());
    assert_eq!(layers(&scene.site.wait(key, Phase::Failed)), 1);
    // Another node, into what is announced as before.
    let record = scene.mirrored(scene.leaf, &mut target);
    assert!(reason(&record).contains("was sent"), "{record:?}");
    // Nor is what the session left known.
    let description = announce(ContentId::random(), Base::Content(session));
    let mut target = scene.target(Some(scene.leaf), Some(&description));
    let leaf = scene.site.snapshot(scene.leaf);
    scene.site.write(scene.leaf, &["write -P 11 5M 1M"]);
    let record = scene.mirrored(scene.leaf, &mut target);
    assert!(reason(&record).contains("not sent from here"), "{record:?}");
    scene.site.destroy(leaf);
}

#[test]
fn what_was_sent_to_a_larger_destination_is_not_all_that_it_holds() {
    let scene = Scene::new();
    let size = SIZE + 16 * MIB;
    let session = ContentId::random();
    let target = scene.target_of(size, None, Some(&announce(session, Base::Unknown)));
    let record = scene.site.wait(scene.mirror(scene.first, &target), Phase::Finished);
    assert!(reason(&record).contains("does not know"), "{record:?}");
    scene.site.grow(scene.leaf, size);
    let mut target = scene.target_of(size, None, Some(&announce(ContentId::random(), Base::Content(session))));
    let record = scene.mirrored(scene.leaf, &mut target);
    assert!(reason(&record).contains("not sent from here"), "{record:?}");
}

#[test]
fn what_another_host_sent_is_not_taken_for_ones_own() {
    let scene = Scene::new();
    let other = Site::new(scene.directory.path(), "o", &json!({}));
    let session = ContentId::random();
    let mut target = scene.target(None, Some(&announce(session, Base::Blank)));
    scene.mirrored(scene.first, &mut target);
    let volume = other.create(SIZE);
    other.write(volume, &["write -P 21 0 1M"]);
    other.snapshot(volume);
    let description = announce(ContentId::random(), Base::Content(session));
    let mut target = scene.target(Some(scene.first), Some(&description));
    let key = other.mirror(volume, "-1", "e", &target.socket);
    let record = other.wait(key, Phase::Finished);
    assert!(reason(&record).contains("not sent from here"), "{record:?}");
    target.stop();
    assert_same(&other.chain(volume), target.image.to_str().unwrap());
}
