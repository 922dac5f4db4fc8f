//! Disks whose guest's writes are thrown away, and disks that many guests read.

use std::fs;
use std::process::Command;

use plugin::id::{NodeId, VolumeKey};
use plugin::store::plan;
use serde_json::{Value, json};
use uuid::Uuid;

use super::hosts::kill_daemon;
use super::scene::{Failure, Scene, answer, command, killed_at, start};

fn open(scene: &Scene, persistent: bool) -> Result<Value, Failure> {
    let request = json!({"uri": scene.uri.to_string(), "persistent": persistent, "dbg": ""});
    scene.try_request("Datapath.open", request.to_string().as_bytes())
}

fn close(scene: &Scene) {
    let request = json!({"uri": scene.uri.to_string(), "dbg": ""});
    assert_eq!(scene.try_request("Datapath.close", request.to_string().as_bytes()).unwrap(), Value::Null);
}

/// A guest's life: it starts, finds `found` at the start of its disk, writes `pattern` there and shuts down.
fn guest(scene: &Scene, found: u8, pattern: u8) {
    scene.call("Datapath.attach", "7");
    scene.call("Datapath.activate", "7");
    assert!(scene.io(&format!("read -P {found} 0 1M")));
    assert!(scene.io(&format!("write -P {pattern} 0 1M")));
    assert!(scene.io(&format!("read -P {pattern} 0 1M")));
    scene.call("Datapath.deactivate", "7");
    scene.call("Datapath.detach", "7");
}

/// Gives what is there when nobody has opened the volume.
fn found(scene: &Scene, pattern: u8) -> bool {
    scene.call("Datapath.activate_readonly", "8");
    let found = scene.io(&format!("read -P {pattern} 0 1M"));
    scene.call("Datapath.detach", "8");
    found
}

/// Counts the node files.
fn files(scene: &Scene) -> usize {
    let directory = scene.sr.load(scene.uri.volume).unwrap().directory;
    let names = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().ends_with(".qcow2")).count()
}

#[test]
fn what_a_guest_writes_is_thrown_away_when_its_disk_is_closed_or_opened_again() {
    let scene = Scene::new();
    guest(&scene, 0, 1);
    for closed in [true, false, true] {
        open(&scene, false).unwrap();
        guest(&scene, 1, 2);
        assert_eq!(files(&scene), 2);
        // It was only suspended: it goes on where it was.
        guest(&scene, 2, 3);
        if closed {
            close(&scene);
            assert_eq!(files(&scene), 1);
            assert!(found(&scene, 1));
        }
    }
    open(&scene, false).unwrap();
    guest(&scene, 1, 4);
    open(&scene, true).unwrap();
    guest(&scene, 1, 5);
    close(&scene);
    close(&scene);
    assert!(found(&scene, 5));
    assert_eq!(files(&scene), 1);
    scene.assert_nothing_left();
}

#[test]
fn a_snapshot_or_clone_meanwhile_holds_what_stays() {
    let scene = Scene::new();
    guest(&scene, 0, 1);
    open(&scene, false).unwrap();
    scene.call("Datapath.attach", "7");
    scene.call("Datapath.activate", "7");
    assert!(scene.io("write -P 2 0 1M"));
    let snapshot = VolumeKey::random();
    let mut tree = scene.sr.lock(&scene.host, scene.uri.volume).unwrap();
    let change = plan::snapshot(&tree.tree, scene.uri.volume, snapshot, NodeId::random()).unwrap();
    tree.switch(&scene.host, change).unwrap();
    let image = tree.chain_images(snapshot).unwrap().remove(0);
    drop(tree);
    let output = Command::new("qemu-io").args(["-r", "-U", "-c", "read -P 1 0 1M"]).arg(image.path).output().unwrap();
    assert!(output.status.success() && !String::from_utf8_lossy(&output.stdout).contains("failed"), "{output:?}");
    // The guest goes on with what it wrote.
    assert!(scene.io("read -P 2 0 1M"));
    assert!(scene.io("write -P 3 0 64k"));
    scene.call("Datapath.detach", "7");
    close(&scene);
    assert!(found(&scene, 1));
    assert_eq!(files(&scene), 2);
}

#[test]
fn a_disk_in_use_is_not_opened_in_another_way() {
    let scene = Scene::new();
    scene.call("Datapath.activate", "7");
    assert_eq!(open(&scene, false).unwrap_err().code, "SR_BACKEND_FAILURE_24");
    open(&scene, true).unwrap();
    assert!(scene.io("write -P 1 0 1M"));
    scene.call("Datapath.detach", "7");
    // Left by a migration whose end it was never told: the VM may start here.
    scene.call("Datapath.activate", "MIR0a1b2c");
    open(&scene, false).unwrap();
    scene.call("Datapath.activate", "7");
    for persistent in [false, true] {
        assert_eq!(open(&scene, persistent).unwrap_err().code, "SR_BACKEND_FAILURE_24");
    }
    assert!(scene.io("write -P 2 0 1M"));
    // Closed too early: another still has it.
    scene.call("Datapath.activate_readonly", "8");
    scene.call("Datapath.detach", "7");
    close(&scene);
    assert!(scene.io("read -P 2 0 1M"));
    scene.call("Datapath.detach", "8");
    assert_eq!(files(&scene), 1);
    assert!(found(&scene, 1));
}

#[test]
fn after_a_crash_nothing_of_it_is_there() {
    let scene = Scene::new();
    guest(&scene, 0, 1);
    let directory = scene.host.root().join("proc/sys/kernel/random");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("boot_id"), Uuid::new_v4().to_string()).unwrap();
    for opened in [true, false, true] {
        if opened {
            open(&scene, false).unwrap();
        }
        scene.call("Datapath.activate", "7");
        assert!(scene.io("read -P 1 0 1M"));
        assert!(scene.io("write -P 2 0 1M"));
        kill_daemon(&scene);
        fs::remove_dir_all(scene.directory_of_volume()).unwrap();
        fs::write(directory.join("boot_id"), Uuid::new_v4().to_string()).unwrap();
    }
    assert!(found(&scene, 1));
    close(&scene);
    assert_eq!(files(&scene), 1);
    scene.assert_nothing_left();
}

/// System calls by which something is changed, or waited for. strace counts each by itself.
const STEPS: [&str; 8] = ["flock", "write", "fsync", "rename", "unlink", "fallocate", "clone3", "sendto"];

#[test]
fn calls_killed_at_any_step_keep_what_stays_and_throw_the_rest_away() {
    let scene = Scene::new();
    guest(&scene, 0, 1);
    for (method, extra) in [
        ("Datapath.open", json!({"persistent": false})),
        ("Datapath.activate", json!({})),
        ("Datapath.close", json!({})),
    ] {
        let mut request = scene.request("7");
        request.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let mut kills = 0;
        for call in STEPS {
            for n in 1..60 {
                open(&scene, false).unwrap();
                guest(&scene, 1, 2);
                if method == "Datapath.activate" {
                    open(&scene, false).unwrap();
                }
                let Some(killed) = killed_at(&scene, method, &request, call, n) else { return };
                kills += u32::from(killed);
                if method == "Datapath.activate" {
                    scene.call("Datapath.activate", "7");
                    assert!(scene.io("read -P 1 0 1M"), "{call} {n}");
                    assert!(scene.io("write -P 2 0 1M"));
                    scene.call("Datapath.detach", "7");
                }
                close(&scene);
                assert!(found(&scene, 1), "{method} {call} {n}");
                if !killed {
                    break;
                }
            }
        }
        assert!(kills > 5, "{method} {kills}");
    }
    let mut tree = scene.sr.lock(&scene.host, scene.uri.volume).unwrap();
    tree.update(scene.uri.volume, |_| ()).unwrap();
    tree.sweep([]);
    drop(tree);
    assert_eq!(files(&scene), 1);
    scene.assert_nothing_left();
}

#[test]
fn twenty_domains_read_one_volume_at_once() {
    let scene = Scene::new();
    guest(&scene, 0, 1);
    let domains: Vec<String> = (0..20).map(|number| format!("u0_copy_{number}")).collect();
    let all_at_once = |method: &str| {
        let calls: Vec<_> = domains
            .iter()
            .map(|domain| {
                let request = scene.request(domain).to_string();
                start(&mut command(&scene.host, method), request.as_bytes())
            })
            .collect();
        let answers: Vec<Value> = calls.into_iter().map(|call| answer(call).unwrap()).collect();
        assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    };
    all_at_once("Datapath.attach");
    all_at_once("Datapath.activate_readonly");
    assert!(scene.io("read -P 1 0 1M"));
    assert!(!scene.io("write -P 2 0 64k"), "it is read-only");
    // Nested: whichever goes, the rest read on.
    for domain in &domains[..19] {
        scene.call("Datapath.deactivate", domain);
        assert!(scene.io("read -P 1 0 1M"));
        scene.call("Datapath.detach", domain);
    }
    assert_eq!(scene.claims().len(), 1);
    all_at_once("Datapath.deactivate");
    assert!(scene.claims().is_empty());
    all_at_once("Datapath.detach");
    scene.assert_nothing_left();
}
