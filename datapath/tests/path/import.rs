//! Datapath.import_activate, and what comes through the socket that it gives.

use std::fs;
use std::path::PathBuf;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::scene::{SIZE, Scene};
use super::tapdisk::Tapdisk;

const MIRROR: &str = "MIR0a1b2c";

fn import(scene: &Scene, domain: &str) -> PathBuf {
    match scene.call("Datapath.import_activate", domain) {
        Value::String(path) => path.into(),
        other => panic!("{other}"),
    }
}

fn relay(scene: &Scene) -> Vec<i32> {
    let is_relay = |pid: &i32| {
        let command_line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command_line.contains("import-relay") && command_line.contains(&scene.uri.volume.to_string())
    };
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(is_relay).collect()
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if condition() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("{what}: never");
}

#[test]
fn what_tapdisk_writes_is_in_the_volume() {
    let scene = Scene::new();
    scene.call("Datapath.attach", MIRROR);
    scene.call("Datapath.activate", MIRROR);
    let socket = import(&scene, MIRROR);
    assert!(socket.as_os_str().len() <= 107);
    let mut tapdisk = Tapdisk::pass(&socket);
    assert_eq!(tapdisk.negotiate().unwrap(), SIZE);
    // Sectors of 512 bytes, whatever the image likes.
    tapdisk.write(512, &[7; 1024]).unwrap();
    tapdisk.write(4 << 20, &[8; 1 << 20]).unwrap();
    assert_eq!(tapdisk.read(0, 2048).unwrap(), [vec![0; 512], vec![7; 1024], vec![0; 512]].concat());
    scene.call("Datapath.deactivate", MIRROR);
    assert!(tapdisk.read(0, 512).is_err());
    assert!(relay(&scene).is_empty() && !socket.exists());
    scene.call("Datapath.detach", MIRROR);
    scene.assert_nothing_left();
    scene.call("Datapath.activate_readonly", "7");
    assert!(scene.io("read -P 7 512 1k") && scene.io("read -P 8 4M 1M") && scene.io("read -P 0 0 512"));
    scene.call("Datapath.detach", "7");
    scene.assert_nothing_left();
}

#[test]
fn a_tapdisk_that_was_paused_is_greeted_anew_on_the_same_connection() {
    let scene = Scene::new();
    scene.call("Datapath.activate", MIRROR);
    let mut tapdisk = Tapdisk::pass(&import(&scene, MIRROR));
    for round in 1..=5_u8 {
        assert_eq!(tapdisk.negotiate().unwrap(), SIZE);
        tapdisk.write(0, &[round; 4096]).unwrap();
        tapdisk.pause();
    }
    tapdisk.negotiate().unwrap();
    assert_eq!(tapdisk.read(0, 4096).unwrap(), [5; 4096]);
    scene.call("Datapath.detach", MIRROR);
    scene.assert_nothing_left();
    assert!(relay(&scene).is_empty());
}

#[test]
fn a_second_call_gives_the_same_socket_and_takes_a_second_connection() {
    let scene = Scene::new();
    scene.call("Datapath.activate", MIRROR);
    let socket = import(&scene, MIRROR);
    let mut first = Tapdisk::pass(&socket);
    first.negotiate().unwrap();
    assert_eq!(import(&scene, MIRROR), socket);
    assert_eq!(relay(&scene).len(), 1);
    let mut second = Tapdisk::pass(&socket);
    second.negotiate().unwrap();
    first.write(0, &[1; 512]).unwrap();
    assert_eq!(second.read(0, 512).unwrap(), [1; 512]);
    // Nor does one that connects and passes nothing disturb the others.
    drop(std::os::unix::net::UnixStream::connect(&socket).unwrap());
    first.write(0, &[2; 512]).unwrap();
    scene.call("Datapath.detach", MIRROR);
    scene.assert_nothing_left();
}

#[test]
fn only_a_volume_that_is_open_for_writing_can_be_imported_to() {
    let scene = Scene::new();
    let refused = |domain: &str| scene.try_call("Datapath.import_activate", domain).unwrap_err().code;
    assert_eq!(refused(MIRROR), "SR_BACKEND_FAILURE_46");
    scene.call("Datapath.attach", MIRROR);
    assert_eq!(refused(MIRROR), "SR_BACKEND_FAILURE_46");
    scene.call("Datapath.activate_readonly", MIRROR);
    assert_eq!(refused(MIRROR), "SR_BACKEND_FAILURE_46");
    scene.call("Datapath.activate", MIRROR);
    // Where xapi activated a domain of dom0 it names another one here.
    import(&scene, "0");
    scene.call("Datapath.deactivate", "0");
    assert_eq!(relay(&scene).len(), 1);
    scene.call("Datapath.deactivate", MIRROR);
    assert!(relay(&scene).is_empty());
    scene.call("Datapath.detach", MIRROR);
    scene.assert_nothing_left();
}

#[test]
fn an_import_ends_when_a_guest_activates_the_volume_that_nobody_writes_to_any_more() {
    let scene = Scene::new();
    scene.call("Datapath.activate", MIRROR);
    let mut tapdisk = Tapdisk::pass(&import(&scene, MIRROR));
    tapdisk.negotiate().unwrap();
    tapdisk.write(0, &[1; 512]).unwrap();
    tapdisk.pause();
    eventually("the end of the relay", || {
        scene.call("Datapath.activate", "7");
        relay(&scene).is_empty()
    });
    let negotiated = tapdisk.negotiate().and_then(|_| tapdisk.write(0, &[2; 512]));
    assert!(negotiated.is_err());
    assert!(scene.io("read -P 1 0 512"));
    for domain in [MIRROR, "7"] {
        scene.call("Datapath.detach", domain);
    }
    scene.assert_nothing_left();
}

#[test]
fn a_relay_that_was_killed_is_replaced_and_one_without_a_socket_ends() {
    let scene = Scene::new();
    scene.call("Datapath.activate", MIRROR);
    let socket = import(&scene, MIRROR);
    for pid in relay(&scene) {
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }
    eventually("the end of the relay", || relay(&scene).is_empty());
    assert_eq!(import(&scene, MIRROR), socket);
    let mut tapdisk = Tapdisk::pass(&socket);
    tapdisk.negotiate().unwrap();
    tapdisk.write(0, &[1; 512]).unwrap();
    fs::remove_file(&socket).unwrap();
    eventually("the end of the relay", || relay(&scene).is_empty());
    scene.call("Datapath.detach", MIRROR);
    scene.assert_nothing_left();
}
