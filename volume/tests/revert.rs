//! Volume.revert: a volume goes back to a snapshot and stays itself.

mod support;

use serde_json::{Value, json};
use support::{Bench, MIB, assert_reads, at_every_step, key, names, write};

fn revert(bench: &Bench, volume: &str, snapshot: &str) {
    let answer = bench.call("Volume.revert", json!({"snapshot": snapshot, "key": volume}));
    assert_eq!(answer, Value::Null);
}

#[test]
fn a_reverted_volume_holds_what_the_snapshot_does_and_stays_itself() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    bench.call("Volume.set", json!({"key": volume, "k": "vdi-type", "v": "user"}));
    bench.call("Volume.set_name", json!({"key": volume, "new_name": "disk"}));
    write(&bench.node_file(&volume), 1, 0, MIB);
    let first = bench.snapshot(&volume);
    write(&bench.node_file(&volume), 2, 0, MIB);
    let second = bench.snapshot(&volume);
    write(&bench.node_file(&volume), 3, 0, MIB);
    bench.call("Volume.resize", json!({"key": volume, "new_size": 8 * MIB}));
    let before = bench.call("Volume.stat", json!({"key": volume}));

    for _ in 0..2 {
        revert(&bench, &volume, &first);
        assert_reads(&bench.node_file(&volume), 1, 0, MIB);
        let after = bench.call("Volume.stat", json!({"key": volume}));
        for field in ["key", "uuid", "name", "description", "keys", "uri"] {
            assert_eq!(after[field], before[field], "{field}");
        }
        assert_eq!(after["virtual_size"], json!(4 * MIB));
        // Both snapshots and the volume; what the volume held before is gone.
        assert_eq!(bench.node_files().len(), 3);
        bench.check();
    }
    write(&bench.node_file(&volume), 4, 0, MIB);
    assert_reads(&bench.node_file(&first), 1, 0, MIB);
    assert_reads(&bench.node_file(&second), 2, 0, MIB);

    revert(&bench, &volume, &second);
    assert_reads(&bench.node_file(&volume), 2, 0, MIB);
    bench.destroy(&first);
    bench.destroy(&second);
    assert_reads(&bench.node_file(&volume), 2, 0, MIB);
    bench.destroy(&volume);
    assert!(bench.node_files().is_empty());
}

#[test]
fn clones_of_the_reverted_state_stay() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    let snapshot = bench.snapshot(&volume);
    write(&bench.node_file(&volume), 2, 0, MIB);
    let clone = bench.clone_of(&volume);
    revert(&bench, &volume, &snapshot);
    assert_reads(&bench.node_file(&clone), 2, 0, MIB);
    assert_reads(&bench.node_file(&volume), 0, 0, MIB);
    bench.check();
}

#[test]
fn a_snapshot_of_another_disk_and_one_that_is_gone_change_nothing() {
    let bench = Bench::new();
    let (volume, other) = (bench.create(4 * MIB), bench.create(4 * MIB));
    write(&bench.node_file(&volume), 1, 0, MIB);
    let gone = bench.snapshot(&volume);
    bench.destroy(&gone);
    let before = bench.tree(&volume);
    for (snapshot, code) in [
        (&other, "SR_OPERATION_NOT_SUPPORTED"),
        (&gone, "Volume_does_not_exist"),
        (&volume, "SR_BACKEND_FAILURE_115"),
    ] {
        assert_eq!(bench.code("Volume.revert", json!({"snapshot": snapshot, "key": volume})), code);
        assert_eq!(bench.tree(&volume), before);
    }
    bench.check();
}

#[test]
fn two_reverts_at_once_are_both_right() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    let snapshot = bench.snapshot(&volume);
    let request = bench.request(json!({"snapshot": snapshot, "key": volume}));
    let calls: Vec<_> = (0..8).map(|_| bench.host.start("Volume.revert", &request)).collect();
    for call in calls {
        assert_eq!(bench.host.finish(call).unwrap(), Value::Null);
    }
    assert_eq!(bench.node_files().len(), 2);
    assert_eq!(bench.keys().len(), 2);
    assert_eq!(key(&bench.call("Volume.stat", json!({"key": volume}))), volume);
    bench.check();
}

/// Makes a disk that holds 1, and beside it one that holds 2 and has a snapshot, which xapi takes for one of the first
/// disk: a migration leaves it so where the two had only data in common that no volume was called by any more.
fn apart(bench: &Bench) -> (String, String, String) {
    let (volume, other) = (bench.create(4 * MIB), bench.create(2 * MIB));
    write(&bench.node_file(&volume), 1, 0, 4 * MIB);
    write(&bench.node_file(&other), 2, 0, 2 * MIB);
    let snapshot = bench.snapshot(&other);
    write(&bench.node_file(&other), 3, 0, MIB);
    bench.call("Volume.set", json!({"key": snapshot, "k": "snapshot_of", "v": volume}));
    (volume, snapshot, other)
}

/// Checks that the first volume was reverted, and the others are as they were.
fn assert_reverted(bench: &Bench, (volume, snapshot, other): &(String, String, String)) {
    assert_eq!(bench.call("Volume.stat", json!({"key": volume}))["virtual_size"], json!(2 * MIB));
    assert_reads(&bench.node_file(volume), 2, 0, 2 * MIB);
    assert_reads(&bench.node_file(snapshot), 2, 0, 2 * MIB);
    assert_reads(&bench.node_file(other), 3, 0, MIB);
    assert_reads(&bench.node_file(other), 2, MIB, MIB);
}

#[test]
fn a_volume_is_reverted_to_its_snapshot_in_another_tree_and_back() {
    let bench = Bench::new();
    let all @ (volume, snapshot, _) = &apart(&bench);
    bench.call("Volume.set_name", json!({"key": volume, "new_name": "disk"}));
    bench.call("Volume.set", json!({"key": volume, "k": "vdi-type", "v": "user"}));
    let own = bench.snapshot(volume);
    let before = bench.call("Volume.stat", json!({"key": volume}));

    for _ in 0..2 {
        revert(&bench, volume, snapshot);
        assert_reverted(&bench, all);
        assert_reads(&bench.node_file(&own), 1, 0, 4 * MIB);
        let after = bench.call("Volume.stat", json!({"key": volume}));
        for field in ["key", "uuid", "name", "description", "keys", "uri"] {
            assert_eq!(after[field], before[field], "{field}");
        }
        assert_eq!(bench.tree_directory(volume), bench.tree_directory(snapshot));
        assert_eq!(bench.node_files().len(), 4);
        bench.check();
    }
    write(&bench.node_file(volume), 4, 0, MIB);
    assert_reads(&bench.node_file(snapshot), 2, 0, 2 * MIB);

    let request = json!({"snapshot": own, "key": volume});
    assert_eq!(bench.code("Volume.revert", request), "SR_OPERATION_NOT_SUPPORTED");
    bench.call("Volume.set", json!({"key": own, "k": "snapshot_of", "v": volume}));
    revert(&bench, volume, &own);
    assert_reads(&bench.node_file(volume), 1, 0, 4 * MIB);
    bench.destroy(&own);
    bench.check();

    // With its last volume a tree goes.
    revert(&bench, volume, snapshot);
    assert_reverted(&bench, all);
    assert_eq!(names(&bench.path.join("trees")).len(), 1);
    bench.check();
}

#[test]
fn a_revert_to_another_tree_killed_at_any_step_can_be_repeated() {
    let bench = Bench::new();
    at_every_step(|call, number| {
        let all @ (volume, snapshot, other) = &apart(&bench);
        if number % 2 == 0 {
            bench.snapshot(volume);
        }
        let mut expected = bench.keys();
        expected.sort();
        let request = bench.request(json!({"snapshot": snapshot, "key": volume}));
        let killed = bench.host.killed_at("Volume.revert", &request, call, number)?;
        assert_eq!(bench.keys(), expected, "{call} {number}");
        assert_reads(&bench.node_file(other), 3, 0, MIB);
        match number % 3 {
            // The call comes again,
            1 => {}
            // or somebody else's,
            2 => drop(bench.call("Volume.set", json!({"key": snapshot, "k": "k", "v": "v"}))),
            // or everything is collected.
            _ => bench.check(),
        }
        revert(&bench, volume, snapshot);
        assert_reverted(&bench, all);
        bench.check();
        assert_eq!(bench.keys(), expected, "{call} {number}");
        expected.iter().for_each(|key| bench.destroy(key));
        assert!(bench.node_files().is_empty());
        Some(killed)
    });
}

#[test]
fn a_revert_to_another_tree_for_which_there_is_no_space_changes_nothing() {
    let bench = Bench::new();
    let (volume, snapshot, _) = &apart(&bench);
    let request = bench.request(json!({"snapshot": snapshot, "key": volume}));
    let before = [volume, snapshot].map(|key| bench.tree(key));
    for number in 1..100 {
        let Some(output) = bench.host.struck("Volume.revert", &request, "fsync:error=ENOSPC", number) else { return };
        if output.status.success() {
            assert!(number > 2, "no file was synced");
            break;
        }
        assert!(String::from_utf8_lossy(&output.stdout).contains("SR_BACKEND_FAILURE_44"), "{output:?}");
        bench.check();
        assert_eq!([volume, snapshot].map(|key| bench.tree(key)), before);
        assert_reads(&bench.node_file(volume), 1, 0, 4 * MIB);
    }
    assert_reads(&bench.node_file(volume), 2, 0, 2 * MIB);
    bench.check();
}
