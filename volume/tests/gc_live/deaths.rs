//! Workers and daemons killed while nodes are merged that a guest has open.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::guest::Guest;
use super::scene::{REGION, Scene, content};

/// The system calls by which a worker changes something, or speaks to a daemon. strace counts each by itself.
const STEPS: [&str; 11] = [
    "flock",
    "write",
    "fsync",
    "renameat",
    "unlink",
    "ftruncate",
    "pwrite64",
    "clone3",
    "sendto",
    "recvfrom",
    "kill",
];

/// What is merged.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Up,
    Down,
    Written,
}

impl Way {
    fn layers(self) -> [&'static [&'static str]; 3] {
        const MUCH: &[&str] = &["write -P 1 0 3M", "write -P 2 12M 1M"];
        const LITTLE: &[&str] = &["write -P 3 1M 100k", "write -z 64k 64k", "write -P 4 13M 64k"];
        match self {
            Self::Up => [LITTLE, MUCH, &[]],
            Self::Down => [MUCH, LITTLE, &[]],
            // The last one has no snapshot.
            Self::Written => [MUCH, &["write -P 5 0 2M"], &["write -P 5 1M 64k"]],
        }
    }
}

/// A volume whose guest runs, and of which there is something to merge.
fn begun(way: Way) -> Scene {
    let [first, second, third] = way.layers();
    let layers = if way == Way::Written { vec![first, second] } else { vec![first, second, third] };
    let (mut scene, snapshots) = Scene::new(&layers);
    scene.start();
    scene.bench.destroy(&snapshots[0]);
    scene
}

fn kill_daemon(scene: &mut Scene) {
    scene.died = true;
    let daemon = Pid::from_raw(scene.daemon()).unwrap();
    let _ = kill_process(daemon, Signal::KILL);
    scene.wait_for_end(daemon.as_raw_nonzero().get());
}

/// Says which case it was, if that fails.
struct Told(String);

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}

/// Kills a worker at the n-th of some system call, and the volume's daemon with it if that is asked. False when it was
/// through before.
fn killed_at(way: Way, call: &str, n: u32, and_daemon: bool) -> bool {
    let _told = Told(format!("{way:?} {call} {n}, and its daemon: {and_daemon}"));
    let mut scene = begun(way);
    let Ok(mut child) = Command::new("strace")
        .args(["-qq", "-o", "/dev/null", "-e", &format!("inject={call}:signal=KILL:when={n}")])
        .arg(env!("CARGO_BIN_EXE_xapi-storage-qcow2-volume"))
        .args(["gc", &scene.bench.sr])
        .env("XAPI_STORAGE_QCOW2_ROOT", &scene.bench.host.root)
        .stderr(Stdio::null())
        .spawn()
    else {
        // There is no strace here.
        drop(scene.stop());
        return false;
    };
    let was_killed = !child.wait().unwrap().success();
    if and_daemon {
        kill_daemon(&mut scene);
        let account = scene.guest.take().unwrap().bereft();
        // Whoever comes next finishes what was begun, and the guest starts again.
        scene.activate();
        let found = content(&scene.bench.node_file(&scene.volume));
        account.model.assert_holds(&found, false);
        let model = account.model.after_death(&found);
        let socket = scene.host().volume_dir(scene.volume.parse().unwrap()).join("nbd.sock");
        scene.guest = Some(Guest::start(&socket, &scene.volume, model, REGION));
    } else {
        // One that looks at the daemon too.
        scene.bench.call("Volume.compare", json!({"key": scene.volume, "key2": scene.volume}));
    }
    scene.assert_agree();
    scene.gc();
    scene.assert_agree();
    assert_eq!(scene.nodes(), 2, "{way:?} {call} {n}");
    scene.stop_and_look();
    scene.gc();
    let left = if way == Way::Written { 1 } else { 2 };
    assert_eq!(scene.nodes(), left, "{way:?} {call} {n}");
    scene.check();
    was_killed
}

#[test]
fn a_worker_killed_at_some_steps_leaves_what_the_next_call_ends() {
    for (way, call, n, and_daemon) in [
        (Way::Down, "renameat", 3, false),
        (Way::Down, "sendto", 24, true),
        (Way::Up, "ftruncate", 1, false),
        (Way::Up, "sendto", 30, false),
        (Way::Written, "recvfrom", 9, true),
        (Way::Written, "write", 30, false),
    ] {
        killed_at(way, call, n, and_daemon);
    }
}

/// Sweeps that are made at once; they mostly wait.
const AT_ONCE: usize = 2;

#[test]
#[ignore = "takes minutes"]
fn a_worker_killed_at_any_step_leaves_what_the_next_call_ends() {
    let (kills, next, began) = (AtomicU32::new(0), AtomicUsize::new(0), Instant::now());
    let only = std::env::var("GC_STEPS").unwrap_or(STEPS.join(","));
    let calls: Vec<&str> = only.split(',').collect();
    let sweeps: Vec<_> =
        calls.iter().flat_map(|call| [Way::Up, Way::Down, Way::Written].map(|way| (way, call))).collect();
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((way, call)) = sweeps.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let mut n = 1;
                    while killed_at(*way, call, n, n % 2 == 0) {
                        n += 1;
                        kills.fetch_add(1, Ordering::SeqCst);
                    }
                    eprintln!("{way:?} {call}: {} kills, {:?}", n - 1, began.elapsed());
                }
            });
        }
    });
    let kills = kills.into_inner();
    eprintln!("{kills} kills in {:?}", began.elapsed());
    assert!(kills > 200 || calls.len() < STEPS.len(), "{kills}");
}

#[test]
fn a_daemon_that_dies_in_the_middle_of_a_merge_has_lost_nothing_that_was_flushed() {
    for way in [Way::Down, Way::Up] {
        let mut scene = begun(way);
        scene.set_speed(1);
        let (worker, begun) = scene.merging();
        assert!(begun);
        kill_daemon(&mut scene);
        let account = scene.guest.take().unwrap().bereft();
        scene.activate();
        let found = content(&scene.bench.node_file(&scene.volume));
        account.model.assert_holds(&found, false);
        scene.set_speed(64);
        assert!(worker.wait_with_output().unwrap().status.success());
        scene.gc();
        scene.assert_agree();
        assert_eq!(scene.nodes(), 2);
        scene.release();
        assert!(content(&scene.bench.node_file(&scene.volume)) == found);
        assert_eq!(scene.bench.tree(&scene.volume).get("intent"), None::<&Value>);
        scene.check();
    }
}
