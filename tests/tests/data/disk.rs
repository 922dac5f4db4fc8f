//! The judges: that they see what is the same, and what is not.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fake_xapi::disk::{Fingerprint, Inventory, Links, Pair, Shape, Sr, Topology, judge, model_holds, qemu_img};
use fake_xapi::plan::Plan;
use serde_json::json;
use tempfile::TempDir;

use crate::daemon::{create, qemu_io};

const MIB: u64 = 1 << 20;

/// An SR made by hand: node name, parent, volume that names it.
struct Made {
    directory: TempDir,
}

impl Made {
    fn new(nodes: &[(&str, Option<&str>, Option<&str>)]) -> Self {
        let made = Self { directory: tempfile::tempdir().unwrap() };
        let tree = made.path().join("trees/t");
        std::fs::create_dir_all(&tree).unwrap();
        std::fs::create_dir(made.path().join("volumes")).unwrap();
        let (mut records, mut volumes) = (BTreeMap::new(), BTreeMap::new());
        for (index, (node, parent, volume)) in nodes.iter().enumerate() {
            let backing = parent.map(|parent| format!("{parent}.qcow2"));
            create(&made.image(node), 2 * MIB, backing.as_deref());
            qemu_io(&made.image(node), &[&format!("write -P {} {}k 64k", index + 1, index * 64)]);
            records.insert(*node, json!({"parent": parent, "virtual_size": 2 * MIB}));
            if let Some(volume) = volume {
                volumes.insert(*volume, json!({"node": node, "name": "x"}));
                std::os::unix::fs::symlink("../trees/t", made.path().join("volumes").join(volume)).unwrap();
            }
        }
        let record = json!({"format": 1, "nodes": records, "volumes": volumes});
        std::fs::write(tree.join("tree.json"), record.to_string()).unwrap();
        made
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn image(&self, node: &str) -> PathBuf {
        self.path().join(format!("trees/t/{node}.qcow2"))
    }
}

fn pairs() -> Vec<Pair> {
    let pair = |name: &str, source: &str, destination: &str| Pair {
        name: name.into(),
        source: source.into(),
        destination: destination.into(),
    };
    vec![pair("one", "A", "K"), pair("two", "B", "L"), pair("disk", "C", "M")]
}

/// a ─ b ─ c, each named by a volume.
fn source() -> Made {
    Made::new(&[("a", None, Some("A")), ("b", Some("a"), Some("B")), ("c", Some("b"), Some("C"))])
}

#[test]
fn a_faithful_copy_is_judged_faithful_and_its_hidden_nodes_do_not_count() {
    let source = source();
    let destination = Made::new(&[("k", None, Some("K")), ("h", Some("k"), None), ("l", Some("h"), Some("L"))]);
    // The hidden node holds what the source has in b, the node above it nothing of its own.
    qemu_io(&destination.image("l"), &["write -z 128k 64k"]);
    create(&destination.image("m"), 4 * MIB, Some("l.qcow2"));
    qemu_io(&destination.image("m"), &["write -P 3 128k 64k"]);
    let tree = json!({
        "nodes": {"k": {"parent": null}, "h": {"parent": "k"}, "l": {"parent": "h"}, "m": {"parent": "l"}},
        "volumes": {"K": {"node": "k"}, "L": {"node": "l"}, "M": {"node": "m"}},
    });
    std::fs::write(destination.path().join("trees/t/tree.json"), tree.to_string()).unwrap();
    std::os::unix::fs::symlink("../trees/t", destination.path().join("volumes/M")).unwrap();
    let judgement = judge(source.path(), destination.path(), &pairs(), Shape::Same).unwrap();
    assert!(judgement.topology && judgement.content, "{judgement:?}");
    assert_eq!(judgement.nodes[1].parent.as_deref(), Some("A"));
    let sr = Sr::read(destination.path()).unwrap();
    assert_eq!(sr.contradictions().unwrap(), [""; 0]);
    assert_eq!(sr.check().unwrap(), [""; 0]);
    assert_eq!(Topology::of(&sr, Links::Headers), Topology::of(&sr, Links::Records));
}

#[test]
fn one_byte_that_differs_is_found_in_the_node_that_has_it() {
    let (source, destination) = (source(), source());
    let same: Vec<Pair> = pairs().into_iter().map(|pair| Pair { destination: pair.source.clone(), ..pair }).collect();
    let judgement = judge(source.path(), destination.path(), &same, Shape::Same).unwrap();
    assert!(judgement.topology && judgement.content, "{judgement:?}");
    qemu_io(&destination.image("c"), &["write -P 9 1000000 1"]);
    let judgement = judge(source.path(), destination.path(), &same, Shape::Same).unwrap();
    let identical: Vec<bool> = judgement.nodes.iter().map(|node| node.identical).collect();
    assert_eq!(identical, [true, true, false]);
    assert!(judgement.topology && !judgement.content && judgement.problems[0].starts_with("disk: "));
}

#[test]
fn a_branch_that_became_a_chain_is_another_topology() {
    let source = Made::new(&[("a", None, Some("A")), ("b", Some("a"), Some("B")), ("c", Some("a"), Some("C"))]);
    let destination = Made::new(&[("k", None, Some("K")), ("l", Some("k"), Some("L")), ("m", Some("l"), Some("M"))]);
    let judgement = judge(source.path(), destination.path(), &pairs(), Shape::Same).unwrap();
    assert!(!judgement.topology);
    let itself = pairs().into_iter().map(|pair| Pair { destination: pair.source.clone(), ..pair }).next().unwrap();
    let flat = judge(source.path(), source.path(), &[itself], Shape::Flat).unwrap();
    assert!(flat.topology);
    assert!(
        judgement.problems.iter().any(|problem| problem.starts_with("disk is based on two, not on one")),
        "{judgement:?}"
    );
}

#[test]
fn a_volume_that_is_missing_is_a_problem_of_its_own() {
    let destination = Made::new(&[("k", None, Some("K")), ("l", Some("k"), Some("L"))]);
    let judgement = judge(source().path(), destination.path(), &pairs(), Shape::Same).unwrap();
    assert!(!judgement.topology && !judgement.content);
    assert!(judgement.problems.iter().any(|problem| problem.contains("no volume M")), "{judgement:?}");
}

#[test]
fn records_headers_links_and_files_that_contradict_each_other_are_told() {
    let sr = source();
    create(&sr.image("stray"), MIB, None);
    std::fs::remove_file(sr.path().join("volumes/B")).unwrap();
    std::os::unix::fs::symlink("../trees/t", sr.path().join("volumes/Z")).unwrap();
    let record = std::fs::read_to_string(sr.path().join("trees/t/tree.json")).unwrap();
    let record = record.replace(r#""parent":"b""#, r#""parent":"a""#);
    std::fs::write(sr.path().join("trees/t/tree.json"), record).unwrap();
    let found = Sr::read(sr.path()).unwrap().contradictions().unwrap().join("\n");
    for words in [
        "stray.qcow2 is named by no record",
        "stray.qcow2 belongs to no",
        "volume B has no link",
        "volume Z",
        "node c",
    ] {
        assert!(found.contains(words), "{words}: {found}");
    }
}

#[test]
fn an_inventory_tells_what_came_and_whether_anything_is_left() {
    let sr = source();
    let before = Inventory::of(sr.path()).unwrap();
    assert!(!before.is_empty());
    create(&sr.image("new"), MIB, None);
    let after = Inventory::of(sr.path()).unwrap();
    assert_eq!(after.beyond(&before), [sr.image("new").display().to_string()]);
    assert_eq!(before.beyond(&after), [""; 0]);
    let empty = tempfile::tempdir().unwrap();
    assert!(Inventory::of(empty.path()).unwrap().is_empty());
}

#[test]
fn allocation_counts_data_of_each_file_and_no_zeroes() {
    let sr = source();
    qemu_io(&sr.image("c"), &["write -z 512k 256k", "write -z -u 1M 64k"]);
    let read = Sr::read(sr.path()).unwrap();
    assert_eq!(read.allocated_bytes().unwrap(), 3 * 65536);
    assert_eq!(qemu_img::allocated(&sr.image("c")).unwrap(), 65536);
    assert!(read.physical_bytes().unwrap() >= 3 * 65536);
}

#[test]
fn a_fingerprint_depends_on_content_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (one, other) = (directory.path().join("1"), directory.path().join("2"));
    create(&one, 2 * MIB, None);
    create(&other, 3 * MIB + 512, None);
    let empty = Fingerprint::of(&one).unwrap();
    qemu_io(&one, &["write -P 5 100k 100k", "write -P 0 1M 64k"]);
    qemu_io(&other, &["write -P 6 100k 200k", "write -P 5 100k 100k", "write -z 200k 100k"]);
    assert_eq!(Fingerprint::of(&one).unwrap(), Fingerprint::of(&other).unwrap());
    assert_ne!(Fingerprint::of(&one).unwrap(), empty);
    qemu_io(&other, &["write -P 5 3145728 512"]);
    assert_ne!(Fingerprint::of(&one).unwrap(), Fingerprint::of(&other).unwrap());
}

#[test]
fn an_image_is_held_against_a_plans_model() {
    let plan = br#"{"size": 1048576, "steps": [{"zero": {"offset": 0, "length": 4096}}, {"snapshot": "a"},
        {"write": {"offset": 70000, "length": 10000, "seed": 4}}]}"#;
    let model = Plan::parse(plan).unwrap().model().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (image, raw) = (directory.path().join("i"), directory.path().join("r"));
    create(&image, MIB, None);
    assert_eq!(model_holds(&image, &model.disks_of("a").unwrap()[0], None).unwrap(), None);
    let wrong = model_holds(&image, &model.disks()[0], None).unwrap().unwrap();
    assert!(wrong.starts_with("byte 70000 is 0x00"), "{wrong}");
    let mut content = vec![0; MIB as usize];
    model.disks()[0].render(0, &mut content);
    std::fs::write(&raw, content).unwrap();
    let status = std::process::Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([&raw, &image])
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(model_holds(&image, &model.disks()[0], None).unwrap(), None);
}
