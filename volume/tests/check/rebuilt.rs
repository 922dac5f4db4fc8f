//! A tree's record that was lost, made anew from less and less of what there was.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;

use serde_json::{Value, json};

use crate::program::check;
use crate::scene::Copy;
use crate::support::{Bench, MIB, assert_reads, write};

/// Repairs an SR that has only the one fault.
fn repaired(bench: &Bench) -> Value {
    let (status, report) = check(&bench.host, &bench.path, &["--fast", "--repair"]);
    assert_eq!(status, 0, "{report:#}");
    report
}

/// Gives which volume is on which node.
fn places(bench: &Bench, volume: &str) -> Vec<(String, Value)> {
    let record = bench.tree(volume);
    record["volumes"].as_object().unwrap().iter().map(|(key, volume)| (key.clone(), volume["node"].clone())).collect()
}

#[test]
fn without_a_copy_a_torn_record_gives_what_it_still_tells_and_the_rest_gets_volumes_that_say_so() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    for pattern in 1..=3 {
        write(&bench.node_file(&volume), pattern, 0, 65536);
        bench.snapshot(&volume);
    }
    let clone = bench.clone_of(&volume);
    write(&bench.node_file(&clone), 9, 0, 65536);
    let tree = bench.tree_directory(&volume);
    let (whole, places) = (fs::read(tree.join("tree.json")).unwrap(), places(&bench, &volume));
    let files = Copy { path: bench.path.clone() }.content();
    let damage = |length: usize| {
        fs::write(tree.join("tree.json"), &whole[..length]).unwrap();
        fs::remove_file(tree.join("spare")).unwrap();
    };
    for length in [0, whole.len() / 3, whole.len() * 2 / 3, whole.len() - 3] {
        for (key, _) in &places {
            let link = bench.path.join("volumes").join(key);
            if !link.is_symlink() {
                std::os::unix::fs::symlink(format!("../trees/{}", tree.file_name().unwrap().to_str().unwrap()), link)
                    .unwrap();
            }
        }
        damage(length);
        let report = repaired(&bench);
        assert!(report["remarks"][0].as_str().unwrap().contains("made anew"), "{report:#}");
        let record = Copy::record(&tree);
        let after = record["volumes"].as_object().unwrap();
        for (key, node) in &places {
            if let Some(found) = after.get(key) {
                assert_eq!(&found["node"], node, "what is told is right");
            } else {
                assert!(report["remarks"][0].as_str().unwrap().contains(key), "{report:#}");
            }
        }
        let named: BTreeSet<&str> = after.values().map(|volume| volume["node"].as_str().unwrap()).collect();
        for (_, node) in &places {
            assert!(named.contains(node.as_str().unwrap()), "{record:#}");
        }
        for recovered in after.values().filter(|volume| volume["name"].as_str().unwrap().starts_with("recovered")) {
            assert!(!recovered["description"].as_str().unwrap().is_empty());
        }
        // What is listed now is what xapi can work with.
        assert_eq!(bench.keys().len(), after.len());
    }
    // The torn records are all kept.
    let kept = |name: &&String| name.starts_with("tree.json.damaged");
    assert_eq!(crate::support::names(&tree).iter().filter(kept).count(), 4);
    fs::write(tree.join("tree.json"), &whole).unwrap();
    assert!(Copy { path: bench.path.clone() }.content() == files);
}

#[test]
fn the_only_volume_of_a_tree_is_known_without_any_record() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    write(&bench.node_file(&volume), 5, 0, 65536);
    let (tree, file) = (bench.tree_directory(&volume), bench.node_file(&volume));
    for name in ["tree.json", "spare"] {
        fs::remove_file(tree.join(name)).unwrap();
    }
    repaired(&bench);
    assert_eq!((bench.keys(), bench.node_file(&volume)), (vec![volume.clone()], file.clone()));
    assert_reads(&file, 5, 0, 65536);
    bench.destroy(&volume);
    assert_eq!(bench.keys(), Vec::<String>::new());
}

#[test]
fn a_copy_that_is_one_operation_behind_still_finds_what_each_volume_reads() {
    type Operation = fn(&Bench, &str, &str);
    let operations: [(&str, Operation); 4] = [
        ("snapshot", |bench, volume, _| drop(bench.snapshot(volume))),
        ("clone", |bench, volume, _| drop(bench.clone_of(volume))),
        ("revert", |bench, volume, snapshot| {
            bench.call("Volume.revert", json!({"key": volume, "snapshot": snapshot}));
        }),
        ("destroy", |bench, _, snapshot| bench.destroy(snapshot)),
    ];
    for (name, operation) in operations {
        let bench = Bench::new();
        let volume = bench.create(MIB);
        write(&bench.node_file(&volume), 1, 0, 65536);
        let snapshot = bench.snapshot(&volume);
        write(&bench.node_file(&volume), 2, 0, 65536);
        let tree = bench.tree_directory(&volume);
        let copy = fs::read(tree.join("spare")).unwrap();
        operation(&bench, &volume, &snapshot);
        let before = Copy { path: bench.path.clone() }.content();
        fs::remove_file(tree.join("tree.json")).unwrap();
        fs::write(tree.join("spare"), copy).unwrap();
        repaired(&bench);
        let after = Copy { path: bench.path.clone() }.content();
        for (key, chain) in &before {
            // An overlay that was never written to reads as what it lies on.
            let reads = |chain: &Vec<Vec<u8>>| chain.iter().find(|file| has_data(file)).cloned();
            assert!(reads(&after[key]) == reads(chain), "{name}: volume {key}");
        }
    }
}

/// Tells whether an image has anything of its own: its first-level table has an entry.
fn has_data(file: &[u8]) -> bool {
    let number = |at: usize| u64::from_be_bytes(file[at..at + 8].try_into().unwrap());
    let (size, table) = (u32::from_be_bytes(file[36..40].try_into().unwrap()), usize::try_from(number(40)).unwrap());
    (0..usize::try_from(size).unwrap()).any(|entry| number(table + 8 * entry) != 0)
}

#[test]
fn a_record_is_not_made_anew_from_images_of_which_one_is_missing() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let snapshot = bench.snapshot(&volume);
    let tree = bench.tree_directory(&volume);
    fs::rename(bench.node_file(&snapshot), bench.path.join("away")).unwrap();
    fs::write(tree.join("tree.json"), "{").unwrap();
    fs::remove_file(tree.join("spare")).unwrap();
    let (status, report) = check(&bench.host, &bench.path, &["--fast", "--repair"]);
    assert!(status == 1 && report["remarks"][0].as_str().unwrap().contains("whose file is not there"), "{report:#}");
    assert_eq!(fs::read(tree.join("tree.json")).unwrap(), b"{");
}

#[test]
fn a_stale_copy_is_no_reason_to_forget_that_another_host_has_a_volume() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let tree = bench.tree_directory(&volume);
    let mut record = bench.tree(&volume);
    record["volumes"][&volume]["active"] =
        json!([{"host": uuid::Uuid::new_v4(), "boot_id": uuid::Uuid::new_v4(), "mode": "rw"}]);
    fs::write(tree.join("tree.json"), record.to_string()).unwrap();
    bench.call("Volume.set", json!({"key": volume, "k": "k", "v": "v"}));
    let record = fs::read(tree.join("tree.json")).unwrap();
    // A copy that agrees has the claim too.
    fs::write(tree.join("tree.json"), "").unwrap();
    repaired(&bench);
    assert_eq!(fs::read(tree.join("tree.json")).unwrap(), record);
    // One that does not is not relied on.
    let file = fs::OpenOptions::new().write(true).open(bench.node_file(&volume)).unwrap();
    fs::write(tree.join("tree.json"), "").unwrap();
    file.write_all_at(&(2 * MIB).to_be_bytes(), 24).unwrap();
    let (status, report) = check(&bench.host, &bench.path, &["--fast", "--repair"]);
    assert!(status == 1 && report["remarks"][0].as_str().unwrap().contains("active"), "{report:#}");
}
