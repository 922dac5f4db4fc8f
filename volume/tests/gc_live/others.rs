//! Merges that wait because of who else uses a volume, and what is read meanwhile.

use std::process::Command;

use plugin::activation;
use plugin::id::{Domain, VolumeUri};
use plugin::lock::FileLock;
use plugin::store::Mode;
use serde_json::json;

use super::scene::{Scene, content};

const SECONDS: std::time::Duration = std::time::Duration::from_secs(60);
const MUCH: &[&str] = &["write -P 1 0 3M", "write -P 2 12M 1M"];
const LITTLE: &[&str] = &["write -P 3 1M 100k", "write -P 4 13M 64k"];

/// Activates a volume for another domain on a host, until what is given is called.
fn used(scene: &Scene, root: &std::path::Path, volume: &str, domain: &str, mode: Mode) -> impl FnOnce() + use<> {
    let host = plugin::host::Host::at(root);
    let uri: VolumeUri = format!("qsd://{}/{volume}", scene.bench.sr).parse().unwrap();
    let domain: Domain = domain.parse().unwrap();
    activation::attach(&host, uri, &domain).unwrap();
    activation::activate(&host, uri, &domain, mode).unwrap();
    move || activation::release(&host, uri, &domain).unwrap()
}

#[test]
fn nodes_that_more_than_one_guest_reads_wait() {
    let (mut scene, snapshots) = Scene::new(&[MUCH, LITTLE, &[]]);
    scene.start();
    scene.bench.destroy(&snapshots[0]);
    let elsewhere = scene.bench.other_host().root;
    let here = scene.bench.host.root.clone();
    for (root, domain, mode, words) in [
        (&here, "8", Mode::ReadOnly, "are active on this host"),
        (&elsewhere, "8", Mode::ReadOnly, "is active on host"),
        (&here, "MIRc0ffee", Mode::ReadWrite, "are active on this host"),
    ] {
        let release = used(&scene, root, &snapshots[1], domain, mode);
        let nodes = scene.nodes();
        let log = scene.gc();
        assert!(log.contains(words), "{log}");
        assert_eq!(scene.nodes(), nodes);
        let health = scene.bench.call("SR.stat", json!({}))["health"].clone();
        assert!(health[1].as_str().unwrap().contains(words), "{health}");
        release();
    }
    scene.gc();
    scene.assert_agree();
    scene.stop_and_look();
}

#[test]
fn a_volume_that_is_only_read_or_migrated_or_not_to_be_touched_waits() {
    for (domain, mode, words) in
        [("8", Mode::ReadOnly, "where it is only read"), ("MIRc0ffee", Mode::ReadWrite, "for a migration")]
    {
        let (scene, snapshots) = Scene::new(&[MUCH, LITTLE, &[]]);
        scene.bench.destroy(&snapshots[0]);
        let release = used(&scene, &scene.bench.host.root, &scene.volume, domain, mode);
        let log = scene.gc();
        assert!(log.contains(words), "{log}");
        release();
    }
    let (mut scene, snapshots) = Scene::new(&[MUCH, LITTLE, &[]]);
    scene.start();
    scene.bench.destroy(&snapshots[0]);
    let settings = scene.bench.host.root.join("etc/xapi-storage-qcow2.json");
    std::fs::write(settings, r#"{"gc": false, "gc_live": false}"#).unwrap();
    let log = scene.gc();
    assert!(log.contains("is active on this host"), "{log}");
    assert_eq!(scene.nodes(), 3);
    scene.stop_and_look();
}

#[test]
fn a_disk_reads_the_same_however_far_a_merge_has_come() {
    const LOW: &[&str] = &["write -P 1 8M 1500k", "write -P 2 1M 64k"];
    const HIGH: &[&str] = &["write -P 3 0 2M"];
    let mut all = vec![[LOW, HIGH, &[]], [HIGH, LOW, &[]]];
    while let Some(layers) = all.pop() {
        let (scene, snapshots) = Scene::new(&layers);
        let expected = content(&scene.bench.node_file(&scene.volume));
        scene.activate();
        scene.bench.destroy(&snapshots[0]);
        // What is copied is not to be made one before this has been read: then the daemon reads tables for the first time
        // that have changed since it opened the files.
        scene.set_speed(1);
        let (mut worker, _) = scene.merging();
        let lock = FileLock::acquire(&scene.bench.tree_directory(&scene.volume).join("lock"), SECONDS).unwrap();
        let daemon = scene.bench.host.root.join(format!("run/xapi-storage-qcow2/gc/{}/daemon.pid", scene.bench.sr));
        let Ok(pid) = std::fs::read_to_string(daemon) else {
            // It was too quick.
            drop(lock);
            assert!(worker.wait().unwrap().success());
            scene.release();
            all.push(layers);
            continue;
        };
        scene.wait_for_end(pid.trim().parse().unwrap());
        assert!(read(&scene) == expected, "before the nodes are one");
        assert!(worker.try_wait().unwrap().is_none());
        drop(lock);
        assert!(worker.wait().unwrap().success());
        assert_eq!(scene.nodes(), 2);
        assert!(read(&scene) == expected, "afterwards");
        scene.assert_agree();
        scene.release();
        scene.bench.check();
    }
}

/// Reads all that a volume's guest would.
fn read(scene: &Scene) -> Vec<u8> {
    let socket = scene.host().volume_dir(scene.volume.parse().unwrap()).join("nbd.sock");
    let uri = format!("nbd+unix:///{}?socket={}", scene.volume, socket.display());
    let raw = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", "raw", "-O", "raw", &uri]).arg(raw.path());
    assert!(command.status().unwrap().success());
    std::fs::read(raw.path()).unwrap()
}
