//! Every method on volumes that nobody has open: what it does, and what it does when called again.

mod support;

use std::fs;

use serde_json::{Value, json};
use support::{Bench, MIB, assert_reads, key, write};

#[test]
fn a_new_volume_is_listed_with_what_was_asked_for() {
    let bench = Bench::new();
    let request = json!({"name": "disk", "description": "of a guest", "size": 10 * MIB + 1, "sharable": true});
    let record = bench.call("Volume.create", request);
    assert_eq!(record["virtual_size"], json!(10 * MIB + 4096));
    assert_eq!(record["uri"], json!([format!("qsd://{}/{}", bench.sr, key(&record))]));
    assert!(record["physical_utilisation"].as_u64().unwrap() > 0);
    for (field, value) in [
        ("uuid", record["key"].clone()),
        ("name", json!("disk")),
        ("description", json!("of a guest")),
        ("sharable", json!(true)),
        ("read_write", json!(true)),
        ("keys", json!({})),
        ("volume_type", json!("Data")),
        ("cbt_enabled", json!(false)),
    ] {
        assert_eq!(record[field], value, "{field}");
    }
    assert_eq!(bench.call("Volume.stat", json!({"key": key(&record)})), record);
    assert_eq!(bench.call("SR.ls", json!({})), json!([record]));
    bench.check();
}

#[test]
fn a_snapshot_keeps_what_the_volume_held_and_lies_below_it() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    write(&bench.node_file(&volume), 1, 0, MIB);
    let snapshot = bench.snapshot(&volume);
    write(&bench.node_file(&volume), 2, 0, MIB);
    assert_reads(&bench.node_file(&snapshot), 1, 0, MIB);
    assert_reads(&bench.node_file(&volume), 2, 0, MIB);
    let tree = bench.tree(&volume);
    let node = |volume: &str| tree["volumes"][volume]["node"].as_str().unwrap();
    assert_eq!(tree["nodes"][node(&volume)]["parent"], json!(node(&snapshot)));
    bench.check();
}

#[test]
fn snapshots_and_clones_have_the_names_but_only_one_of_the_keys() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    bench.call("Volume.set_name", json!({"key": volume, "new_name": "x"}));
    bench.call("Volume.set_description", json!({"key": volume, "new_description": "y"}));
    for k in ["vdi-type", "is_a_snapshot", "snapshot_of", "snapshot_time", "content_id", "_sm_config_a", "other"] {
        bench.call("Volume.set", json!({"key": volume, "k": k, "v": "user"}));
    }
    for method in ["Volume.snapshot", "Volume.clone"] {
        let record = bench.call(method, json!({"key": volume}));
        assert_eq!(record["name"], json!("x"));
        assert_eq!(record["description"], json!("y"));
        assert_eq!(record["keys"], json!({"vdi-type": "user"}), "{method}");
    }
}

#[test]
fn clones_of_a_snapshot_and_of_a_leaf_read_as_their_original_and_are_written_apart() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    write(&bench.node_file(&volume), 1, 0, MIB);
    let snapshot = bench.snapshot(&volume);
    write(&bench.node_file(&volume), 2, 0, MIB);
    let (of_snapshot, of_leaf) = (bench.clone_of(&snapshot), bench.clone_of(&volume));
    assert_reads(&bench.node_file(&of_snapshot), 1, 0, MIB);
    assert_reads(&bench.node_file(&of_leaf), 2, 0, MIB);
    write(&bench.node_file(&of_leaf), 3, 0, MIB);
    assert_reads(&bench.node_file(&volume), 2, 0, MIB);
    bench.check();
}

#[test]
fn destroying_removes_nodes_upward_and_the_last_volume_takes_the_tree() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let first = bench.snapshot(&volume);
    let second = bench.snapshot(&volume);
    assert_eq!(bench.node_files().len(), 3);
    bench.destroy(&first);
    assert_eq!(bench.node_files().len(), 3, "a node with children stays, hidden");
    bench.destroy(&volume);
    assert_eq!(bench.node_files().len(), 2);
    bench.check();
    bench.destroy(&second);
    assert_eq!(support::names(&bench.path.join("trees")), Vec::<String>::new());
    for key in [&volume, &first, &second] {
        bench.destroy(key);
    }
    bench.check();
}

#[test]
fn a_volume_grows_and_does_not_shrink() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let size = |bench: &Bench, key: &str| bench.call("Volume.stat", json!({"key": key}))["virtual_size"].clone();
    for _ in 0..2 {
        bench.call("Volume.resize", json!({"key": volume, "new_size": 2 * MIB}));
        assert_eq!(size(&bench, &volume), json!(2 * MIB));
    }
    assert_eq!(bench.code("Volume.resize", json!({"key": volume, "new_size": MIB})), "SR_BACKEND_FAILURE_79");
    let snapshot = bench.snapshot(&volume);
    bench.call("Volume.resize", json!({"key": volume, "new_size": 3 * MIB}));
    assert_eq!(size(&bench, &snapshot), json!(2 * MIB));
    // What lies on the snapshot keeps its ground when the snapshot itself grows.
    bench.call("Volume.resize", json!({"key": snapshot, "new_size": 4 * MIB}));
    assert_eq!((size(&bench, &snapshot), size(&bench, &volume)), (json!(4 * MIB), json!(3 * MIB)));
    assert_reads(&bench.node_file(&snapshot), 0, 0, 4 * MIB);
    bench.check();
}

#[test]
fn keys_are_set_and_unset_any_number_of_times() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let keys = |bench: &Bench| bench.call("Volume.stat", json!({"key": volume}))["keys"].clone();
    for v in ["a", "b", "b"] {
        assert_eq!(bench.call("Volume.set", json!({"key": volume, "k": "k", "v": v})), Value::Null);
        assert_eq!(keys(&bench), json!({"k": v}));
    }
    for _ in 0..2 {
        assert_eq!(bench.call("Volume.unset", json!({"key": volume, "k": "k"})), Value::Null);
        assert_eq!(keys(&bench), json!({}));
    }
}

#[test]
fn an_sr_is_made_attached_described_and_removed_again() {
    let bench = Bench::without_sr();
    let probe = || bench.host.call("SR.probe", json!({"configuration": bench.configuration()}));
    let place = probe();
    assert_eq!(place, json!([{"configuration": bench.configuration(), "complete": true, "extra_info": {}}]));
    bench.create_sr();
    bench.create_sr();
    let found = probe();
    assert_eq!(found[0]["configuration"]["sr_uuid"], json!(bench.sr));
    for (what, expected) in [("name", "n"), ("description", "d")] {
        assert_eq!(bench.call("SR.stat", json!({}))[what], json!(expected));
        bench.call(&format!("SR.set_{what}"), json!({format!("new_{what}"): "new"}));
        assert_eq!(bench.call("SR.stat", json!({}))[what], json!("new"));
    }
    let stat = bench.call("SR.stat", json!({}));
    assert_eq!((&stat["sr"], &stat["uuid"]), (&json!(bench.sr), &json!(bench.sr)));
    assert_eq!(stat["health"], json!(["Healthy", ""]));
    assert!(stat["free_space"].as_u64().unwrap() <= stat["total_space"].as_u64().unwrap());
    assert_eq!(bench.host.call("Plugin.ls", json!({})), json!([bench.sr]));
    let volume = bench.create(MIB);
    assert_eq!(bench.code("SR.destroy", json!({})), "SR_BACKEND_FAILURE_39");
    bench.destroy(&volume);
    bench.call("SR.destroy", json!({}));
    assert_eq!(support::names(&bench.path), Vec::<String>::new());
    assert_eq!(bench.code("SR.stat", json!({})), "Sr_not_attached");
    assert_eq!(bench.call("SR.detach", json!({})), Value::Null);
}

#[test]
fn another_sr_in_the_directory_is_not_replaced() {
    let bench = Bench::new();
    let other = json!({"uuid": uuid::Uuid::new_v4().to_string(), "configuration": bench.configuration(),
        "name": "", "description": ""});
    assert_eq!(bench.host.code("SR.create", other.clone()), "SR_BACKEND_FAILURE_42");
    bench.create(MIB);
    fs::remove_file(bench.path.join("sr.json")).unwrap();
    assert_eq!(bench.host.code("SR.create", other), "SR_BACKEND_FAILURE_42");
}

#[test]
fn a_detached_sr_has_no_volumes_to_offer_until_it_is_attached_again() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    for _ in 0..2 {
        bench.call("SR.detach", json!({}));
        assert_eq!(bench.code("SR.ls", json!({})), "Sr_not_attached");
        assert_eq!(bench.code("Volume.destroy", json!({"key": volume})), "Sr_not_attached");
    }
    bench.host.call("SR.attach", json!({"configuration": bench.configuration()}));
    assert_eq!(bench.keys(), [volume]);
}

#[test]
fn the_plugin_says_what_it_is_and_what_it_sees() {
    let bench = Bench::new();
    let query = bench.host.call("Plugin.Query", json!({"dbg": "x"}));
    assert_eq!((&query["plugin"], &query["required_api_version"]), (&json!("qcow2"), &json!("5.0")));
    assert!(query["features"].as_array().unwrap().contains(&json!("VDI_MIRROR_IN")));
    let volume = bench.create(MIB);
    let snapshot = bench.snapshot(&volume);
    let text = bench.host.call("Plugin.diagnostics", json!({}));
    let text = text.as_str().unwrap();
    for part in [env!("CARGO_PKG_VERSION"), &bench.sr, &volume, &snapshot, bench.path.to_str().unwrap()] {
        assert!(text.contains(part), "{part} in {text}");
    }
}
