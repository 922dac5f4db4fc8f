//! Two hosts, and claims that outlive what they were for.

use std::fs;
use std::time::Duration;

use plugin::host::Process;
use plugin::id::{NodeId, VolumeKey};
use plugin::store::plan;
use uuid::Uuid;

use super::scene::Scene;

/// Kills the volume's daemon and waits for its end.
pub fn kill_daemon(scene: &Scene) {
    for pid in scene.processes() {
        let process = Process::of_pid(&scene.host, pid).unwrap();
        process.kill(&scene.host, Duration::from_secs(60)).unwrap();
    }
}

#[test]
fn a_second_host_is_refused_with_the_holders_uuid() {
    let scene = Scene::new();
    let (this, other) = (scene.host.uuid().unwrap(), scene.other.uuid().unwrap());
    scene.call("Datapath.activate", "7");
    assert_eq!(scene.claims(), [this]);
    for method in ["Datapath.activate", "Datapath.activate_readonly"] {
        let failure = scene.try_call_on(&scene.other, method, "7").unwrap_err();
        assert_eq!(failure.params, ["Activated_on_another_host".to_owned(), this.to_string()]);
    }
    scene.call("Datapath.deactivate", "7");
    assert!(scene.claims().is_empty());
    scene.try_call_on(&scene.other, "Datapath.activate", "7").unwrap();
    let failure = scene.try_call("Datapath.activate", "7").unwrap_err();
    assert_eq!(failure.params[1], other.to_string());
}

#[test]
fn two_hosts_may_read() {
    let scene = Scene::new();
    scene.call("Datapath.activate_readonly", "7");
    scene.try_call_on(&scene.other, "Datapath.activate_readonly", "7").unwrap();
    assert_eq!(scene.claims().len(), 2);
    let failure = scene.try_call("Datapath.activate", "7").unwrap_err();
    assert_eq!(failure.params[1], scene.other.uuid().unwrap().to_string());
    scene.try_call_on(&scene.other, "Datapath.detach", "7").unwrap();
    scene.call("Datapath.activate", "7");
}

#[test]
fn a_claim_from_before_a_power_cycle_is_only_the_holders_to_ignore() {
    let scene = Scene::new();
    scene.call("Datapath.activate", "7");
    kill_daemon(&scene);
    fs::remove_dir_all(scene.directory_of_volume()).unwrap();
    let directory = scene.host.root().join("proc/sys/kernel/random");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("boot_id"), Uuid::new_v4().to_string()).unwrap();
    assert!(scene.try_call_on(&scene.other, "Datapath.activate", "7").is_err());
    scene.call("Datapath.activate", "7");
    assert!(scene.io("write -P 1 0 64k"));
    scene.call("Datapath.detach", "7");
    scene.assert_nothing_left();
}

#[test]
fn a_claim_without_a_daemon_behind_it_is_taken_back() {
    let scene = Scene::new();
    for method in ["Datapath.deactivate", "Datapath.detach", "Datapath.activate"] {
        scene.call("Datapath.activate", "7");
        kill_daemon(&scene);
        assert_eq!(scene.claims().len(), 1);
        scene.call(method, "7");
        assert_eq!(scene.claims().len(), usize::from(method == "Datapath.activate"), "{method}");
    }
    assert!(scene.io("write -P 1 0 64k"));
}

#[test]
fn what_others_lie_on_is_never_written() {
    let scene = Scene::new();
    scene.call("Datapath.activate", "7");
    assert!(scene.io("write -P 1 0 1M"));
    scene.call("Datapath.deactivate", "7");
    let clone = VolumeKey::random();
    let mut tree = scene.sr.lock(&scene.host, scene.uri.volume).unwrap();
    let below = tree.volume(scene.uri.volume).unwrap().node;
    let change = plan::clone(&tree.tree, scene.uri.volume, clone, NodeId::random(), None).unwrap();
    tree.apply(&change).unwrap();
    let path = tree.image(below).unwrap().path;
    drop(tree);
    let before = fs::read(&path).unwrap();
    scene.call("Datapath.activate_readonly", "7");
    assert_eq!(scene.sr.load(clone).unwrap().tree.nodes.len(), 2);
    scene.call("Datapath.activate", "7");
    assert!(scene.io("write -P 2 0 64k"));
    scene.call("Datapath.detach", "7");
    let tree = scene.sr.load(clone).unwrap();
    assert_eq!(tree.tree.nodes.len(), 3);
    assert_ne!(tree.volume(scene.uri.volume).unwrap().node, below);
    assert!(fs::read(&path).unwrap() == before);
    scene.call("Datapath.activate_readonly", "7");
    assert!(scene.io("read -P 2 0 64k"));
    assert!(scene.io("read -P 1 64k 960k"));
}
