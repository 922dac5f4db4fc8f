//! What a call does not do: processes that it does not start, files that it does not read, locks that it does not wait
//! for. How long it takes is nothing for a test.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use plugin::lock::FileLock;
use serde_json::{Value, json};
use support::{Bench, MIB};

/// System calls that open files or start processes and threads.
const OPENING: &str = "open,openat,execve,clone,clone3,fork,vfork";

/// Makes a call and gives the lines of its trace; `None` without strace, by which this is done.
fn traced(bench: &Bench, method: &str, more: Value, calls: &str) -> Option<Vec<String>> {
    let trace = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-e", &format!("trace={calls}"), "-e", "signal=none", "-o"]).arg(trace.path());
    command.arg(env!("CARGO_BIN_EXE_xapi-storage-qcow2-volume")).args([method, "--json"]);
    command.env("XAPI_STORAGE_QCOW2_ROOT", &bench.host.root);
    let request = bench.request(more).to_string();
    let input = tempfile::NamedTempFile::new().unwrap();
    fs::write(input.path(), request).unwrap();
    command.stdin(Stdio::from(input.reopen().unwrap())).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = command.output().ok()?;
    assert!(output.status.success(), "{method}: {output:?}");
    Some(fs::read_to_string(trace.path()).unwrap().lines().map(str::to_owned).collect())
}

/// Counts the files of the SR and of the host that a trace opens.
fn opened(bench: &Bench, trace: &[String]) -> usize {
    let below = bench.path.parent().unwrap().to_str().unwrap();
    trace.iter().filter(|line| line.contains("open") && line.contains(below)).count()
}

/// Counts the processes that a trace starts.
fn started(trace: &[String]) -> usize {
    trace.iter().filter(|line| line.contains("execve(")).count() - 1
}

#[test]
fn a_stat_opens_the_same_three_files_however_many_volumes_there_are() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    for more in [0, 20] {
        for _ in 0..more {
            bench.create(MIB);
        }
        let Some(trace) = traced(&bench, "Volume.stat", json!({"key": volume}), OPENING) else { return };
        // Where the SR is, the SR's record and the tree's.
        assert_eq!(opened(&bench, &trace), 3, "{trace:#?}");
        assert!(
            !trace.iter().any(|line| ["clone(", "clone3(", "fork("].iter().any(|call| line.contains(call))),
            "{trace:#?}"
        );
    }
}

#[test]
fn a_list_opens_one_file_a_tree() {
    let bench = Bench::new();
    let count = |bench: &Bench| Some(opened(bench, &traced(bench, "SR.ls", json!({}), OPENING)?));
    let Some(empty) = count(&bench) else { return };
    let volume = bench.create(MIB);
    assert_eq!(count(&bench), Some(empty + 1));
    bench.snapshot(&volume);
    assert_eq!(count(&bench), Some(empty + 1));
    bench.create(MIB);
    assert_eq!(count(&bench), Some(empty + 2));
}

#[test]
fn a_volume_that_nobody_has_open_needs_no_other_process() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    bench.call("Volume.enable_cbt", json!({"key": volume}));
    let snapshot = bench.snapshot(&volume);
    for (method, more) in [
        ("Volume.create", json!({"name": "x", "description": "", "size": MIB, "sharable": false})),
        ("Volume.stat", json!({"key": volume})),
        ("Volume.snapshot", json!({"key": volume})),
        ("Volume.clone", json!({"key": volume})),
        ("Volume.revert", json!({"key": volume, "snapshot": snapshot})),
        ("Volume.set", json!({"key": volume, "k": "k", "v": "v"})),
        ("Volume.list_changed_blocks", json!({"key": snapshot, "key2": volume, "offset": 0, "length": -1})),
        ("Volume.destroy", json!({"key": snapshot})),
        ("SR.ls", json!({})),
        ("SR.stat", json!({})),
    ] {
        let Some(trace) = traced(&bench, method, more, OPENING) else { return };
        assert_eq!(started(&trace), 0, "{method}: {trace:#?}");
    }
    bench.check();
}

#[test]
fn a_snapshot_waits_for_the_disk_five_times_and_a_new_volume_too() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    for (method, more) in [
        ("Volume.snapshot", json!({"key": volume})),
        ("Volume.clone", json!({"key": volume})),
        ("Volume.create", json!({"name": "x", "description": "", "size": MIB, "sharable": false})),
    ] {
        let Some(trace) = traced(&bench, method, more, "fsync,fdatasync,syncfs,sync") else { return };
        assert_eq!(trace.len(), 5, "{method}: {trace:#?}");
    }
}

#[test]
fn no_call_waits_for_another_disks_lock_or_for_the_srs() {
    let bench = Bench::new();
    fs::write(bench.host.root.join("etc/xapi-storage-qcow2.json"), r#"{"lock_seconds": 1, "gc": false}"#).unwrap();
    let (volume, other) = (bench.create(MIB), bench.create(MIB));
    let take = |path: &std::path::Path| FileLock::acquire(&path.join("lock"), Duration::ZERO).unwrap();
    let _held = (take(&bench.path), take(&bench.tree_directory(&other)));
    let snapshot = bench.snapshot(&volume);
    for (method, more) in [
        ("Volume.create", json!({"name": "x", "description": "", "size": MIB, "sharable": false})),
        ("Volume.stat", json!({"key": other})),
        ("Volume.clone", json!({"key": volume})),
        ("Volume.resize", json!({"key": volume, "new_size": 2 * MIB})),
        ("Volume.set", json!({"key": volume, "k": "k", "v": "v"})),
        ("Volume.revert", json!({"key": volume, "snapshot": snapshot})),
        ("Volume.destroy", json!({"key": snapshot})),
        ("SR.ls", json!({})),
        ("SR.stat", json!({})),
    ] {
        bench.call(method, more);
    }
    // The locks are held indeed.
    assert_eq!(bench.code("Volume.set", json!({"key": other, "k": "k", "v": "v"})), "SR_BACKEND_FAILURE_201");
}
