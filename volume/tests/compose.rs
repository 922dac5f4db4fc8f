//! Volume.compose: a volume's own data goes onto another volume, and every other volume stays what it is.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use plugin::activation;
use plugin::attachment::Attachment;
use plugin::host::Host;
use plugin::id::{Domain, VolumeUri};
use plugin::store::{Blank, Mode, Unit};
use serde_json::{Value, json};
use support::{Bench, Guest, MIB, assert_reads, at_every_step, key, write, write_zeroes};

fn request(child: &str, parent: &str) -> Value {
    json!({"key": child, "key2": parent})
}

fn compose(bench: &Bench, child: &str, parent: &str) {
    assert_eq!(bench.call("Volume.compose", request(child, parent)), Value::Null);
}

/// Writes what [`assert_composed`] looks for: 1 in all of the parent, 2 and zeroes in parts of the child.
fn fill(bench: &Bench, child: &str, parent: &str) {
    write(&bench.node_file(parent), 1, 0, 4 * MIB);
    write(&bench.node_file(child), 2, MIB, MIB);
    write_zeroes(&bench.node_file(child), 2 * MIB, MIB);
}

/// Checks that the child's data lies on the parent's.
fn assert_composed(bench: &Bench, child: &str) {
    let file = bench.node_file(child);
    for (pattern, at) in [(1, 0), (2, MIB), (0, 2 * MIB), (1, 3 * MIB)] {
        assert_reads(&file, pattern, at, MIB);
    }
}

#[test]
fn what_the_child_did_not_write_comes_from_the_parent_and_zeroes_are_written() {
    let bench = Bench::new();
    let (child, parent) = (bench.create(4 * MIB), bench.create(4 * MIB));
    bench.call("Volume.set", json!({"key": child, "k": "vdi-type", "v": "user"}));
    bench.call("Volume.set_name", json!({"key": child, "new_name": "disk"}));
    fill(&bench, &child, &parent);
    let before = bench.call("Volume.stat", json!({"key": child}));
    compose(&bench, &child, &parent);
    assert_composed(&bench, &child);
    assert_eq!(bench.keys(), std::slice::from_ref(&child));
    assert_eq!(bench.code("Volume.stat", json!({"key": parent})), "Volume_does_not_exist");
    let after = bench.call("Volume.stat", json!({"key": child}));
    for field in ["key", "uuid", "name", "description", "keys", "uri", "virtual_size"] {
        assert_eq!(after[field], before[field], "{field}");
    }
    bench.check();

    // The same call again, which xapi may make, and the destruction of what is gone.
    compose(&bench, &child, &parent);
    bench.destroy(&parent);
    assert_composed(&bench, &child);
    let unknown = uuid::Uuid::new_v4().to_string();
    assert_eq!(bench.code("Volume.compose", request(&child, &unknown)), "Volume_does_not_exist");
    assert_eq!(bench.code("Volume.compose", request(&unknown, &child)), "Volume_does_not_exist");
    assert_eq!(bench.code("Volume.compose", request(&child, &child)), "SR_BACKEND_FAILURE_115");
    write(&bench.node_file(&child), 3, 3 * MIB, MIB);
    bench.destroy(&child);
    assert!(bench.node_files().is_empty());
    bench.check();
}

/// The destination's part of a migration from SMAPIv1 (xen-api `ocaml/xapi/storage_smapiv1_migrate.ml`).
#[test]
fn a_leaf_with_a_dummy_snapshot_is_composed_as_xapi_does_it() {
    let bench = Bench::new();
    let leaf = bench.create(4 * MIB);
    let dummy = bench.snapshot(&leaf);
    let parent = bench.create(4 * MIB);
    fill(&bench, &leaf, &parent);
    compose(&bench, &leaf, &parent);
    assert_composed(&bench, &leaf);
    assert_reads(&bench.node_file(&dummy), 0, 0, 4 * MIB);
    bench.check();
    bench.destroy(&dummy);
    bench.call("Volume.unset", json!({"key": leaf, "k": "_sm_config_base_mirror"}));
    assert_eq!(bench.keys(), std::slice::from_ref(&leaf));
    assert_composed(&bench, &leaf);
    bench.check();
    // The dummy may be gone before as well.
    let (other, below) = (bench.create(4 * MIB), bench.create(4 * MIB));
    bench.destroy(&bench.snapshot(&other));
    fill(&bench, &other, &below);
    compose(&bench, &other, &below);
    assert_composed(&bench, &other);
    bench.check();
}

#[test]
fn snapshots_and_clones_of_the_parent_stay_as_they_are() {
    let bench = Bench::new();
    let (child, parent) = (bench.create(4 * MIB), bench.create(4 * MIB));
    write(&bench.node_file(&parent), 7, 0, MIB);
    let snapshot = bench.snapshot(&parent);
    fill(&bench, &child, &parent);
    let clone = bench.clone_of(&parent);
    write(&bench.node_file(&clone), 8, 0, MIB);
    compose(&bench, &child, &parent);
    assert_composed(&bench, &child);
    assert_reads(&bench.node_file(&snapshot), 7, 0, MIB);
    assert_reads(&bench.node_file(&clone), 8, 0, MIB);
    assert_reads(&bench.node_file(&clone), 1, MIB, 3 * MIB);
    let mut keys = vec![child.clone(), snapshot.clone(), clone.clone()];
    keys.sort();
    assert_eq!(bench.keys(), keys);
    bench.check();
    bench.destroy(&clone);
    bench.destroy(&snapshot);
    assert_composed(&bench, &child);
    // Snapshots and reverts go on in the new tree.
    let snapshot = bench.snapshot(&child);
    write(&bench.node_file(&child), 9, 0, 4 * MIB);
    bench.call("Volume.revert", json!({"key": child, "snapshot": snapshot}));
    assert_composed(&bench, &child);
    bench.check();
}

#[test]
fn two_volumes_of_one_tree_are_composed() {
    let bench = Bench::new();
    let base = bench.create(4 * MIB);
    write(&bench.node_file(&base), 6, 0, 4 * MIB);
    let (child, parent) = (bench.clone_of(&base), bench.clone_of(&base));
    fill(&bench, &child, &parent);
    compose(&bench, &child, &parent);
    assert_composed(&bench, &child);
    assert_reads(&bench.node_file(&base), 6, 0, 4 * MIB);
    bench.check();
    compose(&bench, &child, &parent);
    // A parent that the child lies on already only goes.
    let leaf = bench.clone_of(&child);
    write(&bench.node_file(&leaf), 5, 0, MIB);
    compose(&bench, &leaf, &child);
    assert_reads(&bench.node_file(&leaf), 5, 0, MIB);
    assert_reads(&bench.node_file(&leaf), 2, MIB, MIB);
    let mut keys = vec![base, leaf];
    keys.sort();
    assert_eq!(bench.keys(), keys);
    bench.check();
}

#[test]
fn sizes_may_differ() {
    let bench = Bench::new();
    for (child_size, parent_size) in [(8, 4), (4, 8)] {
        let (child, parent) = (bench.create(child_size * MIB), bench.create(parent_size * MIB));
        let dummy = bench.snapshot(&child);
        fill(&bench, &child, &parent);
        compose(&bench, &child, &parent);
        assert_composed(&bench, &child);
        if child_size > parent_size {
            assert_reads(&bench.node_file(&child), 0, 4 * MIB, 4 * MIB);
        }
        assert_eq!(bench.call("Volume.stat", json!({"key": child}))["virtual_size"], json!(child_size * MIB));
        // A leaf that was enlarged after its dummy was made shows the parent's end as well.
        let (large, whole) = (bench.clone_of(&dummy), bench.create(16 * MIB));
        bench.call("Volume.resize", json!({"key": large, "new_size": 16 * MIB}));
        write(&bench.node_file(&whole), 4, 0, 16 * MIB);
        compose(&bench, &large, &whole);
        assert_reads(&bench.node_file(&large), 4, 0, 16 * MIB);
    }
    bench.check();
}

#[test]
fn data_that_others_share_is_neither_lost_nor_taken_from_them() {
    let bench = Bench::new();
    let (child, parent) = (bench.create(4 * MIB), bench.create(4 * MIB));
    fill(&bench, &child, &parent);
    let snapshot = bench.snapshot(&child);
    write(&bench.node_file(&child), 3, 0, 4096);
    // The snapshot's data is the child's too; without either a copy or a loss they cannot be parted.
    for volume in [&child, &snapshot] {
        assert_eq!(bench.code("Volume.compose", request(volume, &parent)), "SR_OPERATION_NOT_SUPPORTED");
        assert_reads(&bench.node_file(&parent), 1, 0, 4 * MIB);
        bench.check();
    }
    // Once only the child needs it, all of it goes along.
    bench.destroy(&snapshot);
    compose(&bench, &child, &parent);
    assert_reads(&bench.node_file(&child), 3, 0, 4096);
    for (pattern, at) in [(2, MIB), (0, 2 * MIB), (1, 3 * MIB)] {
        assert_reads(&bench.node_file(&child), pattern, at, MIB);
    }
    bench.check();
}

#[test]
fn a_chain_that_would_be_too_long_is_refused() {
    let bench = Bench::new();
    let (child, parent) = (bench.create(MIB), bench.create(MIB));
    let path = bench.tree_directory(&parent).join("tree.json");
    let mut tree = bench.tree(&parent);
    // As many nodes as are allowed below the child, and then one more, without making that many snapshots.
    let mut below = tree["volumes"][&parent]["node"].as_str().unwrap().to_owned();
    for _ in 1..plugin::store::plan::MAX_CHAIN {
        let node = uuid::Uuid::new_v4().to_string();
        let directory = bench.tree_directory(&parent);
        let backing = format!("{below}.qcow2");
        let blank = Blank { virtual_size: MIB, backing: Some(&backing), unit: Unit::Cluster };
        blank.create(&directory.join(format!("{node}.qcow2"))).unwrap();
        tree["nodes"][&node] = json!({"parent": below, "virtual_size": MIB});
        below = node;
    }
    tree["volumes"][&parent]["node"] = json!(below);
    std::fs::write(&path, tree.to_string()).unwrap();
    assert_eq!(bench.code("Volume.compose", request(&child, &parent)), "SR_BACKEND_FAILURE_109");
    assert_eq!(bench.keys().len(), 2);
    bench.destroy(&parent);
    bench.check();
}

/// Composes volumes and is killed at each step in turn. After each, what is listed is right and every volume reads as
/// it did before or as it is to; then the call again is carried out.
fn killed_at_every_step(make: impl Fn(&Bench) -> (String, String)) {
    let bench = Bench::new();
    at_every_step(|call, number| {
        let (child, parent) = make(&bench);
        fill(&bench, &child, &parent);
        let others: Vec<String> = bench.keys().into_iter().filter(|key| *key != child && *key != parent).collect();
        let compose_them = bench.request(request(&child, &parent));
        let killed = bench.host.killed_at("Volume.compose", &compose_them, call, number)?;
        // Before anything is finished: every volume once, the parent perhaps gone.
        let mut listed = bench.keys();
        listed.retain(|key| *key != parent);
        let mut expected = [others, vec![child.clone()]].concat();
        expected.sort();
        assert_eq!(listed, expected, "{call} {number}");
        assert_eq!(bench.call("Volume.stat", json!({"key": child}))["key"], json!(child));
        match number % 3 {
            // The call comes again,
            1 => {}
            // or somebody else's,
            2 => drop(bench.call("Volume.set", json!({"key": child, "k": "k", "v": "v"}))),
            // or everything is collected.
            _ => bench.check(),
        }
        compose(&bench, &child, &parent);
        assert_composed(&bench, &child);
        bench.check();
        assert_eq!(bench.keys(), expected, "{call} {number}");
        for key in bench.keys() {
            bench.destroy(&key);
        }
        assert!(bench.node_files().is_empty());
        Some(killed)
    });
}

#[test]
fn composing_two_trees_killed_at_any_step_can_be_repeated() {
    killed_at_every_step(|bench| {
        let leaf = bench.create(4 * MIB);
        bench.snapshot(&leaf);
        (leaf, bench.create(4 * MIB))
    });
}

#[test]
fn composing_away_the_childs_tree_killed_at_any_step_can_be_repeated() {
    killed_at_every_step(|bench| {
        let parent = bench.create(4 * MIB);
        bench.snapshot(&parent);
        (bench.create(4 * MIB), parent)
    });
}

#[test]
fn composing_in_one_tree_killed_at_any_step_can_be_repeated() {
    killed_at_every_step(|bench| {
        let base = bench.create(4 * MIB);
        (bench.clone_of(&base), bench.clone_of(&base))
    });
}

#[test]
fn after_a_kill_both_volumes_can_be_destroyed() {
    let bench = Bench::new();
    at_every_step(|call, number| {
        let (child, parent) = (bench.create(4 * MIB), bench.create(4 * MIB));
        let compose_them = bench.request(request(&child, &parent));
        let killed = bench.host.killed_at("Volume.compose", &compose_them, call, number)?;
        // In the order of xapi's receive_cancel2 and in the other.
        let (first, second) = if number % 2 == 0 { (&child, &parent) } else { (&parent, &child) };
        bench.destroy(first);
        bench.destroy(second);
        assert_eq!(bench.keys(), Vec::<String>::new(), "{call} {number}");
        bench.check();
        assert!(bench.node_files().is_empty(), "{call} {number}");
        Some(killed)
    });
}

#[test]
fn a_list_made_meanwhile_has_every_volume_once() {
    let bench = Bench::new();
    for _ in 0..10 {
        let leaf = bench.create(MIB);
        let dummy = bench.snapshot(&leaf);
        let parent = bench.create(MIB);
        let snapshot = bench.snapshot(&parent);
        let calls: Vec<_> =
            (0..2).map(|_| bench.host.start("Volume.compose", &bench.request(request(&leaf, &parent)))).collect();
        let lists: Vec<_> = (0..6).map(|_| bench.host.start("SR.ls", &bench.request(json!({})))).collect();
        for list in lists {
            let answer = bench.host.finish(list).unwrap();
            let keys: Vec<String> = answer.as_array().unwrap().iter().map(key).collect();
            for volume in [&leaf, &dummy, &snapshot] {
                assert_eq!(keys.iter().filter(|key| *key == volume).count(), 1, "{keys:?}");
            }
        }
        // Two calls of one request: both are told that it is done.
        for call in calls {
            bench.host.finish(call).unwrap();
        }
        for volume in [leaf, dummy, snapshot] {
            bench.destroy(&volume);
        }
    }
    bench.check();
}

#[test]
fn what_a_guest_has_is_not_composed() {
    let bench = Bench::new();
    let (child, parent) = (bench.create(4 * MIB), bench.create(4 * MIB));
    fill(&bench, &child, &parent);
    let host = Host::at(&bench.host.root);
    let other = bench.other_host();
    let domain: Domain = "7".parse().unwrap();
    for (volume, mode) in [(&child, Mode::ReadWrite), (&parent, Mode::ReadWrite), (&parent, Mode::ReadOnly)] {
        let uri: VolumeUri = format!("qsd://{}/{volume}", bench.sr).parse().unwrap();
        activation::activate(&host, uri, &domain, mode).unwrap();
        assert_eq!(bench.code("Volume.compose", request(&child, &parent)), "SR_BACKEND_FAILURE_24");
        let elsewhere = other.code("Volume.compose", bench.request(request(&child, &parent)));
        assert_eq!(elsewhere, "Activated_on_another_host");
        activation::release(&host, uri, &domain).unwrap();
    }
    // Attached for the VM that comes, and left behind by the migration.
    let uri: VolumeUri = format!("qsd://{}/{child}", bench.sr).parse().unwrap();
    activation::attach(&host, uri, &domain).unwrap();
    let stale: VolumeUri = format!("qsd://{}/{parent}", bench.sr).parse().unwrap();
    activation::activate(&host, stale, &"CP0a1b2c".parse().unwrap(), Mode::ReadWrite).unwrap();
    compose(&bench, &child, &parent);
    activation::activate(&host, uri, &domain, Mode::ReadWrite).unwrap();
    let mut guest = Guest::connect(&host.volume_dir(uri.volume).join("nbd.sock"), &child, true);
    for (pattern, at) in [(1, 0), (2, MIB), (0, 2 * MIB), (1, 3 * MIB)] {
        guest.read(pattern, at, MIB);
    }
    guest.write(5, 3 * MIB, MIB);
    guest.disconnect();
    activation::release(&host, uri, &domain).unwrap();
    assert_eq!(Attachment::volumes(&host).unwrap(), []);
    assert_reads(&bench.node_file(&child), 5, 3 * MIB, MIB);
    bench.check();
}
