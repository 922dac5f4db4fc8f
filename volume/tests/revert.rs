//! Volume.revert: a volume goes back to a snapshot and stays itself.

mod support;

use serde_json::{Value, json};
use support::{Bench, MIB, assert_reads, key, write};

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
