//! What a datapath's calls do to the daemon, and what they do not do: they are in a migration's downtime.

use std::fs;
use std::process::Command;

use super::scene::{Scene, answer, executable, start};

/// System calls by which processes are started and the daemon is spoken to.
const SPEAKING: &str = "execve,connect,sendto,write,fsync";

/// Makes a call and gives the lines of its trace; `None` without strace, by which this is done.
fn traced(scene: &Scene, method: &str, domain: &str) -> Option<Vec<String>> {
    let trace = tempfile::NamedTempFile::new().unwrap();
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-s", "4096", "-e", &format!("trace={SPEAKING}"), "-e", "signal=none", "-o"]);
    strace.arg(trace.path()).arg(executable()).args([method, "--json"]);
    strace.env(plugin::host::ROOT_VARIABLE, scene.host.root());
    if Command::new("strace").arg("-V").output().is_err() {
        return None;
    }
    answer(start(&mut strace, scene.request(domain).to_string().as_bytes())).unwrap();
    Some(fs::read_to_string(trace.path()).unwrap().lines().map(str::to_owned).collect())
}

fn count(trace: &[String], text: &str) -> usize {
    trace.iter().filter(|line| line.contains(text)).count()
}

#[test]
fn activating_is_one_connection_and_one_turn_and_deactivating_three() {
    let scene = Scene::new();
    scene.call("Datapath.attach", "7");
    for (method, turns, syncs) in [("Datapath.activate", 1, 2), ("Datapath.deactivate", 3, 1)] {
        let Some(trace) = traced(&scene, method, "7") else { return };
        assert_eq!(count(&trace, "execve("), 1, "{method}: {trace:#?}");
        assert_eq!(count(&trace, "qmp.sock"), 1, "{method}: {trace:#?}");
        // What is sent to the daemon; the wish to begin goes with the first.
        assert_eq!(count(&trace, "\\\"execute\\\""), turns, "{method}: {trace:#?}");
        // The claim in the SR; that it is made, and not that it is taken back, must be durable with its name.
        assert_eq!(count(&trace, "fsync("), syncs, "{method}: {trace:#?}");
    }
    scene.call("Datapath.detach", "7");
    scene.assert_nothing_left();
}

#[test]
fn a_second_activation_and_what_is_not_the_last_deactivation_leave_the_daemon_alone() {
    let scene = Scene::new();
    scene.call("Datapath.activate", "7");
    scene.call("Datapath.attach", "8");
    for method in ["Datapath.activate", "Datapath.activate", "Datapath.deactivate", "Datapath.detach"] {
        let Some(trace) = traced(&scene, method, "8") else { return };
        assert_eq!((count(&trace, "connect("), count(&trace, "fsync(")), (0, 0), "{method}: {trace:#?}");
    }
    scene.call("Datapath.deactivate", "7");
    scene.call("Datapath.detach", "7");
    scene.assert_nothing_left();
}
