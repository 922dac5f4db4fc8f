//! Calls at once, and calls that are killed: what is listed is what is on disk, and the next call goes on.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use serde_json::{Value, json};
use support::{Bench, CHANGING, Failure, MIB, key};

/// Makes calls all at once.
fn at_once(bench: &Bench, calls: &[(&str, Value)]) -> Vec<Result<Value, Failure>> {
    let children: Vec<_> =
        calls.iter().map(|(method, more)| bench.host.start(method, &bench.request(more.clone()))).collect();
    children.into_iter().map(|child| bench.host.finish(child)).collect()
}

#[test]
fn sixteen_snapshots_of_one_volume_at_once_are_sixteen_snapshots() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let answers = at_once(&bench, &vec![("Volume.snapshot", json!({"key": volume})); 16]);
    let mut keys: Vec<String> = answers.into_iter().map(|answer| key(&answer.unwrap())).collect();
    keys.push(volume.clone());
    keys.sort();
    assert_eq!(bench.keys(), keys);
    let tree = bench.tree(&volume);
    // Each lies on the one before: seventeen nodes, of which each but the root has another parent.
    let mut parents: Vec<&str> =
        tree["nodes"].as_object().unwrap().values().filter_map(|node| node["parent"].as_str()).collect();
    parents.sort_unstable();
    parents.dedup();
    assert_eq!(parents.len(), 16);
    bench.check();
}

#[test]
fn calls_on_different_volumes_at_once_are_all_carried_out() {
    let bench = Bench::new();
    let create = ("Volume.create", json!({"name": "x", "description": "", "size": MIB, "sharable": false}));
    let keys: Vec<String> =
        at_once(&bench, &vec![create; 16]).into_iter().map(|answer| key(&answer.unwrap())).collect();
    let snapshots: Vec<_> = keys.iter().map(|key| ("Volume.snapshot", json!({"key": key}))).collect();
    for answer in at_once(&bench, &snapshots) {
        answer.unwrap();
    }
    assert_eq!(bench.keys().len(), 32);
    let destroys: Vec<_> = bench.keys().into_iter().map(|key| ("Volume.destroy", json!({"key": key}))).collect();
    let twice: Vec<_> = destroys.iter().chain(&destroys).cloned().collect();
    for answer in at_once(&bench, &twice) {
        assert_eq!(answer.unwrap(), Value::Null);
    }
    assert_eq!(bench.keys(), Vec::<String>::new());
    bench.check();
}

#[test]
fn every_call_made_by_two_processes_at_once_is_right_both_times() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    for (method, more) in [
        ("Volume.stat", json!({})),
        ("Volume.set", json!({"k": "k", "v": "v"})),
        ("Volume.unset", json!({"k": "k"})),
        ("Volume.set_name", json!({"new_name": "x"})),
        ("Volume.set_description", json!({"new_description": "x"})),
        ("Volume.resize", json!({"new_size": 2 * MIB})),
        ("Volume.snapshot", json!({})),
        ("Volume.clone", json!({})),
        ("SR.ls", json!({})),
        ("SR.stat", json!({})),
        ("SR.set_name", json!({"new_name": "x"})),
        ("Volume.destroy", json!({})),
    ] {
        let mut request = more.clone();
        request["key"] = json!(volume);
        for answer in at_once(&bench, &[(method, request.clone()), (method, request)]) {
            answer.unwrap_or_else(|failure| panic!("{method}: {failure:?}"));
        }
    }
    assert_eq!(bench.keys().len(), 4);
    let configuration = json!({"configuration": bench.configuration()});
    for answer in at_once(&bench, &vec![("SR.attach", configuration); 4]) {
        assert_eq!(answer.unwrap(), json!(bench.sr));
    }
    for answer in at_once(&bench, &vec![("SR.detach", json!({})); 4]) {
        assert_eq!(answer.unwrap(), Value::Null);
    }
    bench.check();
}

#[test]
fn a_scan_amid_changes_lists_whole_volumes_and_never_fails() {
    let bench = Bench::new();
    let stays = bench.create(MIB);
    let running = std::sync::atomic::AtomicBool::new(true);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..10 {
                    let volume = bench.create(MIB);
                    let snapshot = bench.snapshot(&volume);
                    bench.destroy(&volume);
                    let extra = bench.snapshot(&stays);
                    bench.destroy(&extra);
                    bench.destroy(&snapshot);
                }
                running.store(false, std::sync::atomic::Ordering::Relaxed);
            });
        }
        while running.load(std::sync::atomic::Ordering::Relaxed) {
            assert!(bench.keys().contains(&stays));
            bench.host.call("SR.attach", json!({"configuration": bench.configuration()}));
            assert_eq!(bench.call("Volume.stat", json!({"key": stays}))["key"], json!(stays));
        }
    });
    assert_eq!(bench.keys(), [stays]);
    bench.check();
}

#[test]
fn an_sr_is_not_destroyed_from_under_a_volume_that_is_being_made() {
    for _ in 0..5 {
        let bench = Bench::new();
        let create = ("Volume.create", json!({"name": "x", "description": "", "size": MIB, "sharable": false}));
        let answers = at_once(&bench, &[create.clone(), ("SR.destroy", json!({})), create]);
        let made = [&answers[0], &answers[2]].iter().filter(|answer| answer.is_ok()).count();
        match &answers[1] {
            Ok(_) => assert_eq!(made, 0, "{answers:?}"),
            Err(failure) => {
                assert_eq!(failure.code, "SR_BACKEND_FAILURE_39");
                assert_eq!(bench.keys().len(), made);
            }
        }
    }
}

/// Kills a call at each of its steps in turn; after each, what is listed is what is on disk, and the same call again
/// is carried out. `request` is given the volume, a snapshot of it, and the step.
fn killed_at_every_step(method: &str, request: impl Fn(&Bench, &str, &str, u32) -> Value) {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let base = bench.snapshot(&volume);
    for step in 1..500 {
        let more = request(&bench, &volume, &base, step);
        let before = bench.keys();
        let Some(killed) = bench.host.killed_at(method, &bench.request(more.clone()), CHANGING, step) else {
            // There is no strace here.
            return;
        };
        let after = bench.keys();
        assert!(after.len().abs_diff(before.len()) <= 1, "{step}");
        // At once, while a qemu-img of the killed call may be at work.
        bench.call("Volume.set", json!({"key": volume, "k": "step", "v": step.to_string()}));
        bench.check();
        assert_eq!(bench.keys(), after, "{step}: garbage is not listed");
        bench.call(method, more);
        bench.check();
        for key in bench.keys() {
            if key != volume && key != base {
                bench.destroy(&key);
            }
        }
        if !killed {
            assert!(step > 1);
            return;
        }
    }
    panic!("the call never came to its end");
}

#[test]
fn a_create_killed_at_any_step_can_be_repeated() {
    let create = json!({"name": "x", "description": "", "size": MIB, "sharable": false});
    killed_at_every_step("Volume.create", |_, _, _, _| create.clone());
}

#[test]
fn a_snapshot_killed_at_any_step_can_be_repeated() {
    // Of a volume of its own each time, so that no chain of hidden nodes grows.
    killed_at_every_step("Volume.snapshot", |bench, _, _, _| json!({"key": bench.create(MIB)}));
}

#[test]
fn a_clone_killed_at_any_step_can_be_repeated() {
    killed_at_every_step("Volume.clone", |_, _, base, _| json!({"key": base}));
}

#[test]
fn a_set_killed_at_any_step_can_be_repeated() {
    killed_at_every_step("Volume.set", |_, volume, _, step| json!({"key": volume, "k": "k", "v": step.to_string()}));
}

#[test]
fn a_resize_killed_at_any_step_can_be_repeated() {
    killed_at_every_step("Volume.resize", |bench, volume, _, _| {
        let size = bench.call("Volume.stat", json!({"key": volume}))["virtual_size"].as_u64().unwrap();
        json!({"key": volume, "new_size": size + 4096})
    });
}

#[test]
fn a_destroy_of_a_trees_last_volume_killed_at_any_step_can_be_repeated() {
    killed_at_every_step("Volume.destroy", |bench, _, _, _| json!({"key": bench.create(MIB)}));
}

#[test]
fn a_destroy_of_one_of_several_volumes_killed_at_any_step_can_be_repeated() {
    killed_at_every_step("Volume.destroy", |bench, _, base, _| json!({"key": bench.clone_of(base)}));
}

#[test]
fn calls_killed_at_random_never_spoil_the_list() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let create = json!({"name": "x", "description": "", "size": MIB, "sharable": false});
    for round in 0..30_u64 {
        let victim = bench.keys().into_iter().find(|key| *key != volume).unwrap_or_default();
        let mut children: Vec<_> = [
            ("Volume.create", create.clone()),
            ("Volume.snapshot", json!({"key": volume})),
            ("Volume.clone", json!({"key": volume})),
            ("Volume.destroy", json!({"key": victim})),
        ]
        .iter()
        .map(|(method, more)| bench.host.start(method, &bench.request(more.clone())))
        .collect();
        // Any moment of the calls will do; this only spreads them.
        std::thread::sleep(Duration::from_micros(round * 1500 % 25_000));
        for child in &mut children {
            let _ = child.kill();
            child.wait().unwrap();
        }
        assert!(bench.keys().contains(&volume));
    }
    bench.check();
    for key in bench.keys() {
        bench.destroy(&key);
    }
    bench.check();
}
