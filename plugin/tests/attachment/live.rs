//! Changes under clients.

use std::sync::atomic::{AtomicBool, Ordering};

use plugin::error::Error;
use plugin::qemu::{Image, block_on};
use plugin::store::Mode;
use serde_json::json;

use super::scene::{SIZE, Scene};

fn snapshot(scene: &Scene, overlay: &Image) {
    block_on(scene.attachment().snapshot(overlay)).unwrap();
}

fn resize(scene: &Scene, bytes: u64) -> plugin::Result<()> {
    block_on(scene.attachment().resize(bytes))
}

#[test]
fn a_live_snapshot_keeps_what_was_before_and_every_write_after() {
    let scene = Scene::new();
    let base = scene.image();
    scene.activate("7", Mode::ReadWrite, std::slice::from_ref(&base));
    let overlays: Vec<Image> = (0..3).map(|_| scene.image()).collect();
    let (mut client, done) = (scene.client(false), AtomicBool::new(false));
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut written = 0_u64;
            while !done.load(Ordering::Relaxed) || written < 256 {
                let block = written % 1024;
                client.write((written % 251) as u8, &format!("{}k", block * 8), "8k");
                written += 1;
            }
            written
        });
        for overlay in &overlays {
            snapshot(&scene, overlay);
            snapshot(&scene, overlay);
            assert_eq!(scene.top(), Some(overlay.node));
        }
        done.store(true, Ordering::Relaxed);
        writer.join().unwrap()
    });
    drop(client);
    let reads: Vec<String> = (written.saturating_sub(1024)..written)
        .map(|number| format!("read -P {} {}k 8k", number % 251, (number % 1024) * 8))
        .collect();
    assert!(scene.io(true, &reads.iter().map(String::as_str).collect::<Vec<_>>()));
    scene.deactivate("7");
    // The same again, from the files alone.
    let chain: Vec<Image> = overlays.iter().rev().cloned().chain([base]).collect();
    scene.activate("7", Mode::ReadOnly, &chain);
    assert!(scene.io(true, &reads.iter().map(String::as_str).collect::<Vec<_>>()));
}

#[test]
fn a_frozen_layer_is_no_longer_written() {
    let scene = Scene::new();
    let (base, overlay) = (scene.image(), scene.image());
    scene.activate("7", Mode::ReadWrite, std::slice::from_ref(&base));
    let mut client = scene.client(false);
    client.write(1, "0", "1M");
    snapshot(&scene, &overlay);
    client.write(2, "0", "512k");
    drop(client);
    scene.deactivate("7");
    scene.activate("7", Mode::ReadOnly, &[base]);
    assert!(scene.io(true, &["read -P 1 0 1M"]));
}

#[test]
fn a_volume_that_is_only_read_can_get_an_overlay_too() {
    let scene = Scene::new();
    let (base, overlay) = (scene.image(), scene.image());
    scene.activate("7", Mode::ReadOnly, &[base]);
    let mut client = scene.client(true);
    snapshot(&scene, &overlay);
    assert!(client.run("read -P 0 0 64k").starts_with("read "));
    assert_eq!(scene.top(), Some(overlay.node));
}

#[test]
fn a_snapshot_killed_before_its_switch_can_be_undone_and_one_killed_after_it_is_known() {
    let scene = Scene::new();
    let (base, overlay) = (scene.image(), scene.image());
    scene.activate("7", Mode::ReadWrite, std::slice::from_ref(&base));
    scene.edit_state(|state| state["open"]["overlay"] = json!(overlay.node));
    assert_eq!(scene.top(), Some(base.node));
    block_on(scene.attachment().drop_unused_overlay(&overlay)).unwrap();
    snapshot(&scene, &overlay);
    scene.edit_state(|state| {
        state["open"]["nodes"] = json!([base.node]);
        state["open"]["overlay"] = json!(overlay.node);
    });
    assert_eq!(scene.top(), Some(overlay.node));
    assert!(block_on(scene.attachment().drop_unused_overlay(&overlay)).is_err());
    assert!(scene.io(false, &["write -P 3 0 64k"]));
    scene.deactivate("7");
    scene.activate("7", Mode::ReadOnly, &[overlay, base]);
    assert!(scene.io(true, &["read -P 3 0 64k"]));
}

#[test]
fn a_snapshot_that_fails_leaves_everything_as_it_was() {
    let scene = Scene::new();
    let (base, overlay) = (scene.image(), scene.image());
    scene.activate("7", Mode::ReadWrite, std::slice::from_ref(&base));
    let missing = Image { path: scene.path("missing.qcow2"), ..overlay.clone() };
    assert!(block_on(scene.attachment().snapshot(&missing)).is_err());
    assert_eq!(scene.top(), Some(base.node));
    snapshot(&scene, &overlay);
    assert!(scene.io(false, &["write -P 3 0 64k"]));
}

#[test]
fn a_volume_grows_between_clients_and_not_under_one() {
    let scene = Scene::new();
    let chain = [scene.image(), scene.image()];
    scene.activate("7", Mode::ReadWrite, &chain);
    let client = scene.client(false);
    assert!(matches!(resize(&scene, 2 * SIZE), Err(Error::VolumeInUse { .. })));
    assert_eq!(scene.info("export-size"), json!(SIZE));
    drop(client);
    for _ in 0..2 {
        resize(&scene, 2 * SIZE).unwrap();
        assert_eq!(scene.info("export-size"), json!(2 * SIZE));
    }
    assert!(scene.io(false, &["write -P 4 12M 4M", "read -P 0 8M 4M"]));
}

#[test]
fn a_volume_that_is_only_read_does_not_grow() {
    let scene = Scene::new();
    scene.activate("7", Mode::ReadOnly, &[scene.image()]);
    assert!(matches!(resize(&scene, 2 * SIZE), Err(Error::VolumeInUse { .. })));
    assert_eq!(scene.info("export-size"), json!(SIZE));
}
