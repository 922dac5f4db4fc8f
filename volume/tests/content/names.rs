//! Names of contents in the tree, whoever changes it.

use std::fs;

use plugin::mirror::Base;
use serde_json::{Value, json};

use super::disk::{Disk, MIRROR, content};
use super::support::{Bench, MIB, assert_reads, key, write};

/// Makes a volume with data that a mirror brought, and gives it with what it is called.
fn filled(bench: &Bench, pattern: u8) -> (Disk<'_>, Base) {
    let disk = Disk::open(bench);
    let base = content(disk.announced().unwrap());
    disk.write(pattern, 0, MIB);
    disk.release(MIRROR);
    (disk, base)
}

fn edit_tree(bench: &Bench, volume: &str, edit: impl FnOnce(&mut Value)) {
    let mut tree = bench.tree(volume);
    edit(&mut tree);
    fs::write(bench.tree_directory(volume).join("tree.json"), tree.to_string()).unwrap();
}

/// Makes the record what a program without names of contents would have written.
fn forget_names(bench: &Bench, volume: &str) {
    edit_tree(bench, volume, |tree| {
        for node in tree["nodes"].as_object_mut().unwrap().values_mut() {
            node.as_object_mut().unwrap().remove("content");
        }
        tree["format"] = json!(1);
    });
}

#[test]
fn a_node_that_is_frozen_gets_a_name_and_keeps_the_one_it_has() {
    let bench = Bench::new();
    let (disk, base) = filled(&bench, 1);
    let first = bench.snapshot(&disk.key);
    assert_eq!(disk.content_of(&first).map(Base::Content), Some(base));
    write(&bench.node_file(&disk.key), 2, 0, MIB);
    let clone = bench.clone_of(&disk.key);
    // The volume's own node is frozen by that, until the volume is written to.
    let second = disk.content().unwrap();
    assert_ne!(Base::Content(second), base);
    assert_eq!(disk.content_of(&clone), None);
    disk.plug();
    assert_eq!((disk.next().base, disk.content()), (Base::Content(second), None));
}

#[test]
fn a_tree_of_an_older_program_is_read_and_promises_nothing() {
    let bench = Bench::new();
    let (disk, _) = filled(&bench, 1);
    let snapshot = bench.snapshot(&disk.key);
    forget_names(&bench, &disk.key);
    disk.plug();
    assert_eq!(disk.next().base, Base::Unknown);
    disk.release(MIRROR);
    forget_names(&bench, &disk.key);
    bench.check();
    // What others come to lie on is named from then on.
    let clone = Disk::of(&bench, &bench.clone_of(&snapshot));
    let name = disk.content_of(&snapshot).unwrap();
    clone.plug();
    assert_eq!(clone.next().base, Base::Content(name));
    clone.release(MIRROR);
    bench.check();
}

#[test]
fn a_graph_that_an_older_program_opened_promises_nothing() {
    let bench = Bench::new();
    let disk = Disk::open(&bench);
    let path = disk.host.volume_dir(disk.uri.volume).join("state.json");
    let mut state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    state["open"].as_object_mut().unwrap().remove("session").unwrap();
    fs::write(&path, state.to_string()).unwrap();
    disk.attach(MIRROR);
    disk.write(1, 0, MIB);
    let snapshot = bench.snapshot(&disk.key);
    assert!(disk.content_of(&snapshot).is_some());
    disk.release(MIRROR);
    assert_eq!(disk.content(), None);
}

#[test]
fn a_tree_without_names_is_written_for_older_programs() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    assert_eq!(bench.tree(&volume)["format"], json!(1));
    let snapshot = bench.snapshot(&volume);
    assert_eq!(bench.tree(&volume)["format"], json!(3));
    bench.destroy(&snapshot);
    bench.destroy(&volume);
    let (disk, _) = filled(&bench, 1);
    assert_eq!(bench.tree(&disk.key)["format"], json!(3));
    disk.activate("7");
    assert_eq!(bench.tree(&disk.key)["format"], json!(1));
    disk.release("7");
}

#[test]
fn a_reverted_volume_begins_with_what_the_snapshot_holds() {
    let bench = Bench::new();
    let (disk, base) = filled(&bench, 1);
    let snapshot = bench.snapshot(&disk.key);
    disk.plug();
    disk.write(2, 0, MIB);
    disk.release(MIRROR);
    for _ in 0..2 {
        bench.call("Volume.revert", json!({"key": disk.key, "snapshot": snapshot}));
        disk.plug();
        assert_eq!(disk.next().base, base);
        disk.release(MIRROR);
    }
    // Another volume of the tree serves as well, but not while it is written to.
    let clone = Disk::of(&bench, &bench.clone_of(&snapshot));
    clone.activate("7");
    clone.write(3, 0, MIB);
    let refused = bench.code("Volume.revert", json!({"key": disk.key, "snapshot": clone.key}));
    assert_eq!(refused, "SR_BACKEND_FAILURE_24");
    clone.release("7");
    bench.call("Volume.revert", json!({"key": disk.key, "snapshot": clone.key}));
    disk.plug();
    assert_eq!(disk.next().base, Base::Content(clone.content().unwrap()));
    disk.release(MIRROR);
}

#[test]
fn what_is_composed_onto_other_data_loses_its_names() {
    let bench = Bench::new();
    let (child, _) = filled(&bench, 1);
    let dummy = bench.snapshot(&child.key);
    child.plug();
    child.write(2, MIB, MIB);
    child.release(MIRROR);
    bench.destroy(&dummy);
    let (parent, below) = filled(&bench, 3);
    bench.call("Volume.compose", json!({"key": child.key, "key2": parent.key}));
    assert_reads(&bench.node_file(&child.key), 1, 0, MIB);
    let tree = bench.tree(&child.key);
    let named: Vec<&Value> = tree["nodes"].as_object().unwrap().values().map(|node| &node["content"]).collect();
    assert_eq!(named.iter().filter(|name| !name.is_null()).count(), 1, "{tree}");
    child.plug();
    assert_eq!(child.next().base, Base::Unknown);
    child.release(MIRROR);

    // Where nothing was written to the child it is the parent.
    let empty = Disk::new(&bench);
    let (parent, other) = filled(&bench, 4);
    bench.call("Volume.compose", json!({"key": empty.key, "key2": parent.key}));
    empty.plug();
    assert_eq!(empty.next().base, other);
    assert_ne!(other, below);
    empty.release(MIRROR);
}

#[test]
fn a_copy_has_no_name_and_one_of_nothing_is_blank() {
    let bench = Bench::new();
    let (disk, _) = filled(&bench, 1);
    let blank = bench.create(MIB);
    for (volume, base) in [(&disk.key, Base::Unknown), (&blank, Base::Blank)] {
        let copied = Disk::of(
            &bench,
            &key(&bench
                .call("Volume.copy", json!({"key": volume, "dest_sr": bench.sr, "name": "c", "description": ""}))),
        );
        assert_eq!(copied.content(), None);
        copied.plug();
        assert_eq!(copied.next().base, base);
        copied.release(MIRROR);
    }
}

#[test]
fn empty_nodes_do_not_hide_what_is_below_and_smaller_ones_do() {
    let bench = Bench::new();
    let (disk, base) = filled(&bench, 1);
    let mut snapshots = Vec::new();
    for _ in 0..3 {
        snapshots.push(bench.snapshot(&disk.key));
    }
    // As if the empty ones had no names.
    edit_tree(&bench, &disk.key, |tree| {
        for snapshot in &snapshots[1..] {
            let node = tree["volumes"][snapshot]["node"].as_str().unwrap().to_owned();
            tree["nodes"][&node].as_object_mut().unwrap().remove("content");
        }
    });
    disk.plug();
    assert_eq!(disk.next().base, base);
    disk.release(MIRROR);

    // A volume that was laid on a larger one hides the end of that.
    let (small, large) = (Disk::new(&bench), bench.create(8 * MIB));
    let large = Disk::of(&bench, &large);
    large.plug();
    large.write(5, 6 * MIB, MIB);
    large.release(MIRROR);
    bench.call("Volume.compose", json!({"key": small.key, "key2": large.key}));
    small.plug();
    assert_eq!(small.next().base, Base::Unknown);
    small.release(MIRROR);
}
