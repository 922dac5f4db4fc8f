//! What is deleted gives its space back, and nothing else changes, whatever is killed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use plugin::activation;
use plugin::host::Host;
use plugin::id::{Domain, VolumeUri};
use plugin::store::{Blank, Mode, Sr, Unit, plan};
use proptest::prelude::*;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use support::{Bench, Guest, MIB, assert_reads, names, write};

const BLOCK: u64 = 64 << 10;

/// Reads all of an image.
fn content(image: &Path) -> Vec<u8> {
    let raw = tempfile::NamedTempFile::new().unwrap();
    let status = Command::new("qemu-img")
        .args(["convert", "-U", "-f", "qcow2", "-O", "raw"])
        .args([image, raw.path()])
        .status()
        .unwrap();
    assert!(status.success());
    fs::read(raw.path()).unwrap()
}

/// Reads all volumes.
fn contents(bench: &Bench) -> BTreeMap<String, Vec<u8>> {
    bench.keys().into_iter().map(|key| (key.clone(), content(&bench.node_file(&key)))).collect()
}

/// Asks which blocks of each volume differ from each other one.
fn differences(bench: &Bench) -> Vec<Value> {
    let keys = bench.keys();
    let pairs = keys.iter().flat_map(|one| keys.iter().map(move |other| (one, other)));
    pairs.map(|(one, other)| bench.call("Volume.compare", json!({"key": one, "key2": other}))).collect()
}

/// Has commands executed on a volume's image, which is made writable as activating it does.
fn qemu_io(bench: &Bench, volume: &str, commands: &[&str]) {
    let host = Host::at(&bench.host.root);
    let key = volume.parse().unwrap();
    Sr::attached(&host, bench.sr.parse().unwrap()).unwrap().lock(&host, key).unwrap().make_writable(key).unwrap();
    let mut command = Command::new("qemu-io");
    command.args(["-d", "unmap", "-f", "qcow2"]).args(commands.iter().flat_map(|command| ["-c", command]));
    let output = command.arg(bench.node_file(volume)).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// Sees that the nodes take no more than 2 % over what fresh copies of them do, and one cluster each.
fn assert_small(bench: &Bench) {
    let directory = tempfile::tempdir().unwrap();
    for tree in fs::read_dir(bench.path.join("trees")).unwrap() {
        let tree = tree.unwrap().path();
        let record: Value = serde_json::from_slice(&fs::read(tree.join("tree.json")).unwrap()).unwrap();
        for (node, more) in record["nodes"].as_object().unwrap() {
            let (file, copy) = (tree.join(format!("{node}.qcow2")), directory.path().join(node));
            let mut command = Command::new("qemu-img");
            command.args(["convert", "-f", "qcow2", "-O", "qcow2"]);
            if let Some(parent) = more["parent"].as_str() {
                command.args(["-F", "qcow2", "-B"]).arg(tree.join(format!("{parent}.qcow2")));
            }
            assert!(command.args([&file, &copy]).status().unwrap().success());
            let [ours, fresh] = [&file, &copy].map(|path| fs::metadata(path).unwrap().blocks() * 512);
            assert!(ours <= fresh * 102 / 100 + BLOCK, "{}: {ours} instead of {fresh}", file.display());
        }
    }
}

/// Takes space back, and sees that nothing else changed.
fn assert_same_after_gc(bench: &Bench) {
    let before = (contents(bench), differences(bench));
    bench.gc();
    assert_eq!(contents(bench), before.0);
    assert_eq!(differences(bench), before.1);
    bench.check();
    assert_small(bench);
}

/// Makes a volume, a snapshot of it that was destroyed, and what both had written; what of it is in each of the two nodes
/// decides where the data goes.
fn hidden(bench: &Bench, lower: &[&str], upper: &[&str]) -> String {
    let volume = bench.create(4 * MIB);
    qemu_io(bench, &volume, lower);
    let snapshot = bench.snapshot(&volume);
    qemu_io(bench, &volume, upper);
    bench.destroy(&snapshot);
    assert_eq!(bench.tree(&volume)["nodes"].as_object().unwrap().len(), 2);
    volume
}

const MUCH: &[&str] = &["write -P 1 0 2M", "write -z 2M 256k"];
const LITTLE: &[&str] = &["write -P 2 1M 100k", "write -z 64k 64k", "discard 256k 64k", "write -P 3 3M 512"];

#[test]
fn what_two_nodes_had_is_in_one_whichever_takes_it() {
    for (lower, upper) in [(MUCH, LITTLE), (LITTLE, MUCH), (MUCH, &[][..]), (&[], MUCH), (&[], &[])] {
        let bench = Bench::new();
        let volume = hidden(&bench, lower, upper);
        let kept = bench.tree(&volume)["nodes"].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_same_after_gc(&bench);
        let tree = bench.tree(&volume);
        let nodes = tree["nodes"].as_object().unwrap();
        assert_eq!(nodes.len(), 1, "{tree}");
        assert!(kept.contains(nodes.keys().next().unwrap()));
        assert_eq!(bench.node_files().len(), 1);
        // Its guest goes on.
        qemu_io(&bench, &volume, &["write -P 9 0 4M"]);
        assert_reads(&bench.node_file(&volume), 9, 0, 4 * MIB);
    }
}

#[test]
fn a_volume_that_has_grown_keeps_its_end() {
    for (lower, upper) in [(MUCH, LITTLE), (LITTLE, MUCH)] {
        for size in [4 * MIB + 4096, 9 * MIB + 8192] {
            let bench = Bench::new();
            let volume = bench.create(4 * MIB - 4096);
            qemu_io(&bench, &volume, lower);
            qemu_io(&bench, &volume, &["write -P 7 3932160 252k"]);
            let snapshot = bench.snapshot(&volume);
            bench.call("Volume.resize", json!({"key": volume, "new_size": size}));
            qemu_io(&bench, &volume, upper);
            let kept = bench.snapshot(&volume);
            bench.call("Volume.resize", json!({"key": volume, "new_size": size + MIB}));
            bench.destroy(&snapshot);
            assert_same_after_gc(&bench);
            assert_eq!(bench.tree(&volume)["nodes"].as_object().unwrap().len(), 2);
            assert_eq!(content(&bench.node_file(&kept)).len() as u64, size);
        }
    }
}

#[test]
fn what_a_volume_knows_by_sectors_it_still_knows() {
    let bench = Bench::new();
    // As a migration from SMAPIv1 has it: data is to be laid under what is written, sector by sector.
    let child = bench.create(4 * MIB);
    let snapshot = bench.snapshot(&child);
    write(&bench.node_file(&child), 5, 512, 512);
    let again = bench.snapshot(&child);
    qemu_io(&bench, &child, &["write -P 6 1M 64k"]);
    bench.destroy(&again);
    bench.destroy(&snapshot);
    assert_eq!(bench.tree(&child)["nodes"].as_object().unwrap().len(), 3);
    bench.gc();
    assert_eq!(bench.tree(&child)["nodes"].as_object().unwrap().len(), 1);
    let parent = bench.create(4 * MIB);
    write(&bench.node_file(&parent), 1, 0, 4 * MIB);
    bench.call("Volume.compose", json!({"key": child, "key2": parent}));
    let file = bench.node_file(&child);
    assert_reads(&file, 1, 0, 512);
    assert_reads(&file, 5, 512, 512);
    assert_reads(&file, 1, 1024, MIB - 1024);
    assert_reads(&file, 6, MIB, BLOCK);
    assert_reads(&file, 1, MIB + BLOCK, 3 * MIB - BLOCK);
    bench.check();
}

proptest! {
    // The same histories on every run.
    #![proptest_config(ProptestConfig {
        cases: 6,
        failure_persistence: None,
        rng_seed: proptest::test_runner::RngSeed::Fixed(7),
        ..ProptestConfig::default()
    })]

    #[test]
    fn volumes_destroyed_in_any_order_give_their_space_back(
        steps in prop::collection::vec((0_u8..12, any::<usize>(), 0_u64..63, 1_u64..20), 8..24),
    ) {
        let bench = Bench::new();
        let mut live = vec![bench.create(4 * MIB)];
        for (at, (kind, which, block, count)) in steps.into_iter().enumerate() {
            let volume = live[which % live.len()].clone();
            let size = bench.call("Volume.stat", json!({"key": volume}))["virtual_size"].as_u64().unwrap();
            let (offset, length) = (block * BLOCK, (count * BLOCK).min(size - block * BLOCK));
            match kind {
                0..=3 => qemu_io(&bench, &volume, &[&format!("write -P {} {offset} {length}", at + 1)]),
                4 => qemu_io(&bench, &volume, &[&format!("write -z {offset} {length}")]),
                5 => qemu_io(&bench, &volume, &[&format!("discard {offset} {length}")]),
                6..=8 => live.push(bench.snapshot(&volume)),
                9 => live.push(bench.clone_of(&volume)),
                10 if count < 8 => {
                    bench.call("Volume.resize", json!({"key": volume, "new_size": size + count * 8192}));
                }
                _ if live.len() > 1 => {
                    bench.destroy(&volume);
                    live.retain(|other| *other != volume);
                }
                _ => {}
            }
        }
        while live.len() > 2 {
            let volume = live.remove(live.len() / 2);
            bench.destroy(&volume);
        }
        let before = (contents(&bench), differences(&bench));
        bench.gc();
        assert_eq!(contents(&bench), before.0);
        assert_eq!(differences(&bench), before.1);
        bench.check();
    }
}

/// A worker that copies, and was made to stand still.
struct Stalled {
    child: std::process::Child,
    daemon: Pid,
}

impl Stalled {
    /// Makes a volume whose nodes are being merged, from now on without any progress.
    fn start(bench: &Bench, lower: &[&str], upper: &[&str]) -> (String, Vec<u8>, Self) {
        let pid = bench.host.root.join(format!("run/xapi-storage-qcow2/gc/{}/daemon.pid", bench.sr));
        loop {
            let volume = hidden(bench, lower, upper);
            let expected = content(&bench.node_file(&volume));
            let mut child = bench.host.start_gc(&bench.sr);
            while child.try_wait().unwrap().is_none() {
                // The marker is there, and the daemon has just begun.
                let text = fs::read_to_string(&pid).unwrap_or_default();
                let Some(daemon) = text.trim().parse().ok().and_then(Pid::from_raw) else { continue };
                let _ = kill_process(daemon, Signal::STOP);
                let is_theirs = fs::read_to_string(format!("/proc/{}/stat", daemon.as_raw_nonzero()));
                if is_theirs.is_ok_and(|stat| stat.contains(") T")) && bench.tree(&volume).get("merge").is_some() {
                    return (volume, expected, Self { child, daemon });
                }
                let _ = kill_process(daemon, Signal::CONT);
                break;
            }
            // It was too quick.
            child.wait().unwrap();
            bench.destroy(&volume);
        }
    }

    fn end(self, bench: &Bench) {
        // One that was killed is gone.
        let _ = kill_process(self.daemon, Signal::CONT);
        let output = self.child.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        bench.check_records();
    }
}

/// Activates a volume on a host, and gives how long that took.
fn activated(root: &Path, bench: &Bench, volume: &str) -> (Duration, impl FnOnce() + use<>) {
    let host = Host::at(root);
    let uri: VolumeUri = format!("qsd://{}/{volume}", bench.sr).parse().unwrap();
    let domain: Domain = "7".parse().unwrap();
    let began = Instant::now();
    activation::attach(&host, uri, &domain).unwrap();
    activation::activate(&host, uri, &domain, Mode::ReadWrite).unwrap();
    (began.elapsed(), move || activation::release(&host, uri, &domain).unwrap())
}

#[test]
fn whoever_needs_a_volume_has_it_at_once_on_whatever_host() {
    for elsewhere in [false, true] {
        let bench = Bench::new();
        let other = bench.other_host();
        let root = if elsewhere { &other.root } else { &bench.host.root };
        let (volume, expected, stalled) = Stalled::start(&bench, MUCH, LITTLE);
        let (took, release) = activated(root, &bench, &volume);
        // A fifth of a second without all else that runs here.
        assert!(took < Duration::from_secs(5), "{took:?}");
        assert_eq!(bench.tree(&volume).get("merge"), None);
        let socket = root.join(format!("run/xapi-storage-qcow2/volumes/{volume}/nbd.sock"));
        let mut guest = Guest::connect(&socket, &volume, true);
        guest.write(8, 3 * MIB + BLOCK, BLOCK);
        stalled.end(&bench);
        // Nobody touches it while it is open.
        let log = bench.host.gc(&bench.sr);
        assert!(log.contains("active on"), "{log}");
        let text = bench.host.call("Plugin.diagnostics", json!({"dbg": ""}));
        assert!(text.as_str().unwrap().contains("waits: "), "{text}");
        let health = bench.call("SR.stat", json!({}))["health"].clone();
        assert_eq!(health[0], json!("Healthy"));
        assert!(health[1].as_str().unwrap().contains("is not brought back: volume"), "{health}");
        assert_eq!(bench.tree(&volume)["nodes"].as_object().unwrap().len(), 2);
        guest.disconnect();
        release();
        bench.gc();
        assert_eq!(bench.call("SR.stat", json!({}))["health"][1], json!(""));
        let mut wanted = expected;
        let at = usize::try_from(3 * MIB + BLOCK).unwrap();
        wanted[at..at + 65536].fill(8);
        assert_eq!(content(&bench.node_file(&volume)), wanted);
        bench.check();
    }
}

#[test]
fn every_call_that_needs_the_nodes_stops_the_worker() {
    for (method, more) in [
        ("Volume.snapshot", json!({})),
        ("Volume.resize", json!({"new_size": 5 * MIB})),
        ("Volume.compare", json!({"key2": "none"})),
        ("Volume.copy", json!({})),
        ("Volume.destroy", json!({})),
    ] {
        let bench = Bench::new();
        let (volume, expected, stalled) = Stalled::start(&bench, LITTLE, MUCH);
        let mut request = more;
        request["key"] = json!(volume);
        request["dest_sr"] = json!(bench.sr);
        bench.call(method, request);
        stalled.end(&bench);
        bench.gc();
        if method != "Volume.destroy" {
            assert_eq!(content(&bench.node_file(&volume))[..expected.len()], expected);
        }
        bench.check();
    }
}

#[test]
fn a_worker_that_dies_leaves_only_a_marker() {
    let bench = Bench::new();
    let (volume, expected, Stalled { mut child, daemon }) = Stalled::start(&bench, MUCH, LITTLE);
    child.kill().unwrap();
    child.wait().unwrap();
    // Its daemon goes with it.
    while fs::read_to_string(format!("/proc/{}/stat", daemon.as_raw_nonzero()))
        .is_ok_and(|stat| !stat.contains(") Z"))
    {}
    let text = bench.host.call("Plugin.diagnostics", json!({"dbg": ""}));
    assert!(text.as_str().unwrap().contains("was killed"), "{text}");
    assert_ne!(bench.tree(&volume)["merge"], Value::Null);
    assert_eq!(bench.tree(&volume)["format"], json!(5));
    assert_eq!(content(&bench.node_file(&volume)), expected);
    bench.call("Volume.set", json!({"key": volume, "k": "k", "v": "v"}));
    assert_eq!(bench.tree(&volume).get("merge"), None);
    assert_same_after_gc(&bench);
    assert!(bench.tree(&volume)["format"].as_u64().unwrap() < 5, "older programs can read it again");
}

/// The system calls by which a worker changes something, or waits. strace counts each by itself.
const STEPS: [&str; 12] = [
    "flock", "write", "fsync", "renameat", "unlink", "unlinkat", "mkdir", "clone3", "clone", "kill", "sendto",
    "recvfrom",
];

/// Kills a worker that merges at the n-th of some system call; everything reads the same, and the next one ends it. False
/// when it was through before.
fn killed_at(bench: &Bench, going_up: bool, call: &str, n: u32) -> bool {
    let volume = if going_up { hidden(bench, LITTLE, MUCH) } else { hidden(bench, MUCH, LITTLE) };
    let expected = content(&bench.node_file(&volume));
    let Ok(mut child) = Command::new("strace")
        .args(["-qq", "-o", "/dev/null", "-e", &format!("inject={call}:signal=KILL:when={n}")])
        .arg(env!("CARGO_BIN_EXE_xapi-storage-qcow2-volume"))
        .args(["gc", &bench.sr])
        .env("XAPI_STORAGE_QCOW2_ROOT", &bench.host.root)
        .stderr(Stdio::null())
        .spawn()
    else {
        // There is no strace here.
        return false;
    };
    let was_killed = !child.wait().unwrap().success();
    // Whoever looks next finishes what was begun.
    assert_eq!(bench.call("Volume.compare", json!({"key": volume, "key2": volume}))["ranges"], json!([]));
    assert_eq!(content(&bench.node_file(&volume)), expected, "{call} {n}");
    bench.gc();
    assert_eq!(content(&bench.node_file(&volume)), expected, "{call} {n}");
    assert_eq!(bench.tree(&volume)["nodes"].as_object().unwrap().len(), 1, "{call} {n}");
    assert!(was_killed || n > 1 || !["flock", "write", "fsync", "renameat"].contains(&call), "{call} was not seen");
    bench.check();
    bench.destroy(&volume);
    was_killed
}

#[test]
fn a_worker_killed_at_some_steps_is_followed_by_one_that_ends_it() {
    let bench = Bench::new();
    for (index, call) in (0_u32..).zip(STEPS) {
        let mut n = 1 + index % 2;
        while killed_at(&bench, index % 2 == 0, call, n) {
            n += 8;
        }
    }
}

#[test]
#[ignore = "takes minutes"]
fn a_worker_killed_at_any_step_is_followed_by_one_that_ends_it() {
    let bench = Bench::new();
    let mut kills = 0;
    for call in STEPS {
        for going_up in [false, true] {
            kills += (1..).find(|n| !killed_at(&bench, going_up, call, *n)).unwrap() - 1;
        }
    }
    assert!(kills > 100, "{kills}");
}

#[test]
fn space_comes_back_without_anybodys_help() {
    let bench = Bench::new();
    fs::write(bench.host.root.join("etc/xapi-storage-qcow2.json"), "{}").unwrap();
    let volume = bench.create(4 * MIB);
    qemu_io(&bench, &volume, MUCH);
    let (first, second) = (bench.snapshot(&volume), bench.snapshot(&volume));
    qemu_io(&bench, &volume, LITTLE);
    let expected = content(&bench.node_file(&volume));
    bench.destroy(&first);
    bench.destroy(&second);
    let began = Instant::now();
    while bench.tree(&volume)["nodes"].as_object().unwrap().len() > 1 || bench.path.join("gc").exists() {
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "{}",
            bench.host.call("Plugin.diagnostics", json!({"dbg": ""}))
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(content(&bench.node_file(&volume)), expected);
    bench.check();
    assert_eq!(names(&bench.host.root.join("run/xapi-storage-qcow2/gc")), Vec::<String>::new());
}

#[test]
fn a_chain_is_not_made_longer_than_it_may_be() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let other = bench.clone_of(&volume);
    let directory = bench.tree_directory(&volume);
    let mut tree = bench.tree(&volume);
    let mut below = tree["volumes"][&volume]["node"].as_str().unwrap().to_owned();
    for _ in 2..plan::MAX_CHAIN {
        let node = uuid::Uuid::new_v4().to_string();
        let backing = format!("{below}.qcow2");
        let blank = Blank { virtual_size: MIB, backing: Some(&backing), unit: Unit::Cluster };
        blank.create(&directory.join(format!("{node}.qcow2"))).unwrap();
        tree["nodes"][&node] = json!({"parent": below, "virtual_size": MIB});
        below = node;
    }
    tree["volumes"][&volume]["node"] = json!(below);
    fs::write(directory.join("tree.json"), tree.to_string()).unwrap();
    let nodes = |bench: &Bench| bench.tree(&volume)["nodes"].as_object().unwrap().len();
    let before = nodes(&bench);
    // The last one that may be.
    let snapshot = bench.snapshot(&volume);
    assert_eq!(nodes(&bench), before + 1);
    let child = bench.create(MIB);
    for (method, more) in [
        ("Volume.snapshot", json!({"key": volume})),
        ("Volume.clone", json!({"key": volume})),
        ("Volume.revert", json!({"key": other, "snapshot": volume})),
        ("Volume.compose", json!({"key": child, "key2": volume})),
    ] {
        assert_eq!(bench.code(method, more), "SR_BACKEND_FAILURE_109", "{method}");
        assert_eq!(nodes(&bench), before + 1, "{method}");
    }
    // What does not reach the end of it goes on, and so does whoever was cloned at the end and is to be written to.
    let clone = bench.clone_of(&snapshot);
    let last = bench.clone_of(&other);
    for volume in [clone, last, child, other, snapshot, volume] {
        bench.destroy(&volume);
    }
    bench.check();
}

#[test]
fn hidden_nodes_in_a_row_become_one() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    let mut snapshots = Vec::new();
    for commands in [MUCH, &[], LITTLE, &["write -P 4 0 1M"], &[]] {
        qemu_io(&bench, &volume, commands);
        snapshots.push(bench.snapshot(&volume));
    }
    let kept = snapshots.remove(2);
    snapshots.iter().for_each(|snapshot| bench.destroy(snapshot));
    assert_eq!(bench.tree(&volume)["nodes"].as_object().unwrap().len(), 6);
    assert_same_after_gc(&bench);
    assert_eq!(bench.tree(&volume)["nodes"].as_object().unwrap().len(), 2);
    bench.destroy(&volume);
    bench.destroy(&kept);
    bench.check();
}

#[test]
fn an_sr_that_is_detached_has_no_worker_left() {
    let bench = Bench::new();
    let (volume, expected, stalled) = Stalled::start(&bench, MUCH, LITTLE);
    // One more waits for the first one, and a third is not needed: which of these two is which, they make out.
    let mut more = [bench.host.start_gc(&bench.sr), bench.host.start_gc(&bench.sr)];
    let ended = loop {
        let ended = more.iter_mut().map(|child| child.try_wait().unwrap()).collect::<Vec<_>>();
        if let Some(place) = ended.iter().position(Option::is_some) {
            assert!(ended[place].unwrap().success(), "two are enough");
            break place;
        }
        std::thread::yield_now();
    };
    let next = &mut more[1 - ended];
    assert_eq!(next.try_wait().unwrap(), None);
    assert_eq!(bench.call("SR.detach", json!({})), Value::Null);
    let Stalled { mut child, .. } = stalled;
    assert!(!child.wait().unwrap().success());
    next.wait().unwrap();
    assert_eq!(bench.tree(&volume)["nodes"].as_object().unwrap().len(), 2);
    bench.host.call("SR.attach", json!({"configuration": bench.configuration()}));
    assert_eq!(content(&bench.node_file(&volume)), expected);
    assert_same_after_gc(&bench);
}
