//! Changed blocks, held against what the volumes really hold as qemu-img reads it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use plugin::activation;
use plugin::host::Host;
use plugin::id::{Domain, VolumeUri};
use plugin::store::{Mode, Sr};
use proptest::prelude::*;
use serde_json::{Value, json};
use support::{Bench, CHANGING, Guest, MIB, assert_reads, names, write};

const BLOCK: u64 = 64 << 10;

/// Decodes base64 as the standard says, with no code of the plugin's.
fn decoded(text: &str) -> Vec<u8> {
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bits = Vec::new();
    for digit in text.trim_end_matches('=').bytes() {
        let value = digits.iter().position(|known| *known == digit).unwrap();
        bits.extend((0..6).rev().map(|bit| value >> bit & 1 == 1));
    }
    bits.chunks_exact(8).map(|byte| byte.iter().fold(0, |value, bit| value << 1 | u8::from(*bit))).collect()
}

/// Asks which blocks changed.
fn changed(bench: &Bench, from: &str, to: &str, offset: u64, length: i64) -> Vec<u64> {
    let request = json!({"key": from, "key2": to, "offset": offset, "length": length});
    let answer = bench.call("Volume.list_changed_blocks", request);
    assert_eq!(answer["granularity"], json!(BLOCK));
    let bitmap = decoded(answer["bitmap"].as_str().unwrap());
    let set = |bit: &u64| bitmap[usize::try_from(bit / 8).unwrap()] >> (7 - bit % 8) & 1 == 1;
    (0..bitmap.len() as u64 * 8).filter(set).map(|bit| offset / BLOCK + bit).collect()
}

/// Reads all of a volume.
fn content(bench: &Bench, volume: &str) -> Vec<u8> {
    let raw = bench.path.join("../raw");
    let status = Command::new("qemu-img")
        .args(["convert", "-U", "-f", "qcow2", "-O", "raw"])
        .args([&bench.node_file(volume), &raw])
        .status()
        .unwrap();
    assert!(status.success());
    fs::read(&raw).unwrap()
}

/// Finds the blocks of `to` that differ; beyond their end volumes read as zeroes.
fn differing(from: &[u8], to: &[u8]) -> Vec<u64> {
    let size = BLOCK as usize;
    let at = |bytes: &[u8], block: usize| {
        let mut found = bytes.get(block * size..).unwrap_or_default().to_vec();
        found.resize(size.min(to.len() - block * size), 0);
        found
    };
    (0..to.len().div_ceil(size))
        .filter(|block| at(from, *block) != at(to, *block))
        .map(|block| block as u64)
        .collect()
}

fn enable(bench: &Bench, volume: &str) {
    assert_eq!(bench.call("Volume.enable_cbt", json!({"key": volume})), Value::Null);
}

fn destroy_data(bench: &Bench, volume: &str) {
    assert_eq!(bench.call("Volume.data_destroy", json!({"key": volume})), Value::Null);
}

/// Moves a volume off a node that others lie on, as activating it for writing does.
fn make_writable(bench: &Bench, volume: &str) {
    let host = Host::at(&bench.host.root);
    let key = volume.parse().unwrap();
    let mut tree = Sr::attached(&host, bench.sr.parse().unwrap()).unwrap().lock(&host, key).unwrap();
    tree.make_writable(key).unwrap();
}

/// A disk's history, with what every volume of it holds or held last.
struct History {
    bench: Bench,
    /// The volumes that have data.
    live: Vec<String>,
    held: BTreeMap<String, Vec<u8>>,
    /// No two writes are the same.
    writes: u8,
}

impl History {
    fn new() -> Self {
        let bench = Bench::new();
        let volume = bench.create(16 * BLOCK + 4096);
        enable(&bench, &volume);
        Self { bench, live: vec![volume], held: BTreeMap::new(), writes: 0 }
    }

    fn qemu_io(&self, volume: &str, command: &str) {
        make_writable(&self.bench, volume);
        let image = self.bench.node_file(volume);
        let output = Command::new("qemu-io").args(["-d", "unmap", "-f", "qcow2", "-c", command]).arg(image).output();
        assert!(output.unwrap().status.success());
    }

    fn size(&self, volume: &str) -> u64 {
        self.bench.call("Volume.stat", json!({"key": volume}))["virtual_size"].as_u64().unwrap()
    }

    /// Does something that the numbers choose.
    fn step(&mut self, kind: u8, which: usize, block: u64, count: u64) {
        let volume = self.live[which % self.live.len()].clone();
        let size = self.size(&volume);
        // Whole blocks: zeroes that are written to what is zero, beside data in the same block, count as a change of it.
        let offset = block % size.div_ceil(BLOCK) * BLOCK;
        let length = (count * BLOCK).min(size - offset);
        match kind {
            0..=7 => {
                self.writes += 1;
                // A part of a block is a change of the block.
                let part = if kind < 4 { length } else { 512 };
                self.qemu_io(&volume, &format!("write -P {} {offset} {part}", self.writes));
            }
            8 => self.qemu_io(&volume, &format!("write -z {offset} {length}")),
            9 => self.qemu_io(&volume, &format!("discard {offset} {length}")),
            10..=13 => {
                let snapshot = self.bench.snapshot(&volume);
                self.live.push(snapshot);
            }
            14 => {
                let clone = self.bench.clone_of(&volume);
                enable(&self.bench, &clone);
                self.live.push(clone);
            }
            15 => {
                let snapshot = &self.live[(which + usize::from(self.writes) + 1) % self.live.len()];
                if *snapshot != volume {
                    self.bench.call("Volume.revert", json!({"snapshot": snapshot, "key": volume}));
                }
            }
            16 => {
                self.bench.call("Volume.resize", json!({"key": volume, "new_size": size + count * 4096}));
            }
            17..=19 if self.live.len() > 1 => {
                self.held.insert(volume.clone(), content(&self.bench, &volume));
                destroy_data(&self.bench, &volume);
                self.live.retain(|other| *other != volume);
            }
            20 if self.live.len() > 1 => {
                self.bench.destroy(&volume);
                self.live.retain(|other| *other != volume);
            }
            21 => {
                if let Some(gone) = self.held.keys().nth(which % self.held.len().max(1)).cloned() {
                    self.bench.destroy(&gone);
                    self.held.remove(&gone);
                }
            }
            _ => {}
        }
    }

    /// Holds what is told of every two volumes against what they hold.
    fn check(&mut self) {
        for volume in self.live.clone() {
            self.held.insert(volume.clone(), content(&self.bench, &volume));
        }
        for (from, old) in &self.held {
            for (to, new) in &self.held {
                let expected = differing(old, new);
                assert_eq!(changed(&self.bench, from, to, 0, -1), expected, "from {from} to {to}");
            }
        }
    }
}

proptest! {
    // The same histories on every run.
    #![proptest_config(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        rng_seed: proptest::test_runner::RngSeed::Fixed(1),
        ..ProptestConfig::default()
    })]

    #[test]
    fn changed_blocks_are_those_that_differ_whatever_happened(
        steps in prop::collection::vec((0_u8..22, any::<usize>(), 0_u64..20, 1_u64..4), 1..18),
    ) {
        let mut history = History::new();
        for (kind, which, block, count) in steps {
            history.step(kind, which, block, count);
        }
        history.check();
        // Again, when what nobody names was merged.
        history.bench.gc();
        history.check();
    }
}

#[test]
fn zeroes_over_a_part_of_a_blank_block_change_nothing() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    enable(&bench, &volume);
    let first = bench.snapshot(&volume);
    let zeroed = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -z 61440 196608", "-c", "write -P 1 512k 512"])
        .arg(bench.node_file(&volume))
        .status();
    assert!(zeroed.unwrap().success());
    assert_eq!(changed(&bench, &first, &volume, 0, -1), [8]);
    let second = bench.snapshot(&volume);
    // Also by what is written down of a file that goes.
    destroy_data(&bench, &volume);
    destroy_data(&bench, &second);
    for (from, to) in [(&first, &second), (&second, &first), (&first, &volume)] {
        assert_eq!(changed(&bench, from, to, 0, -1), [8]);
    }
}

/// Makes a disk with a snapshot before its second block was written and one after.
fn two_snapshots(bench: &Bench) -> (String, String, String) {
    let volume = bench.create(4 * MIB);
    enable(bench, &volume);
    write(&bench.node_file(&volume), 1, 0, BLOCK);
    let first = bench.snapshot(&volume);
    write(&bench.node_file(&volume), 2, BLOCK, BLOCK);
    let second = bench.snapshot(&volume);
    write(&bench.node_file(&volume), 3, 2 * BLOCK, BLOCK);
    (volume, first, second)
}

#[test]
fn a_volume_whose_data_was_destroyed_is_still_there_and_cannot_be_used() {
    let bench = Bench::new();
    let (volume, first, second) = two_snapshots(&bench);
    for _ in 0..2 {
        destroy_data(&bench, &first);
        let record = bench.call("Volume.stat", json!({"key": first}));
        assert_eq!(record["volume_type"], json!("CBT_Metadata"));
        assert_eq!(record["cbt_enabled"], json!(true));
        assert_eq!(record["virtual_size"], json!(4 * MIB));
        assert!(bench.keys().contains(&first));
    }
    for (method, more) in [
        ("Volume.snapshot", json!({"key": first})),
        ("Volume.clone", json!({"key": first})),
        ("Volume.resize", json!({"key": first, "new_size": 8 * MIB})),
        ("Volume.revert", json!({"key": volume, "snapshot": first})),
        ("Volume.revert", json!({"key": first, "snapshot": second})),
    ] {
        assert_eq!(bench.code(method, more), "SR_BACKEND_FAILURE_46", "{method}");
    }
    let (host, domain): (_, Domain) = (Host::at(&bench.host.root), "7".parse().unwrap());
    let uri: VolumeUri = format!("qsd://{}/{first}", bench.sr).parse().unwrap();
    activation::attach(&host, uri, &domain).unwrap_err();
    activation::activate(&host, uri, &domain, Mode::ReadOnly).unwrap_err();
    activation::release(&host, uri, &domain).unwrap();

    bench.call("Volume.set", json!({"key": first, "k": "vdi-type", "v": "cbt_metadata"}));
    assert_eq!(changed(&bench, &first, &volume, 0, -1), [1, 2]);
    assert_reads(&bench.node_file(&volume), 1, 0, BLOCK);
    bench.destroy(&first);
    bench.check();
}

#[test]
fn data_that_nothing_lies_on_goes_and_its_changes_stay() {
    let bench = Bench::new();
    let (volume, first, second) = two_snapshots(&bench);
    bench.call("Volume.revert", json!({"key": volume, "snapshot": first}));
    write_to(&bench, &volume, 4, 3 * BLOCK);
    let files = bench.node_files().len();
    destroy_data(&bench, &second);
    assert_eq!(bench.node_files().len(), files - 1);
    bench.host.call("SR.attach", json!({"configuration": bench.configuration()}));
    assert_eq!(changed(&bench, &first, &second, 0, -1), [1]);
    assert_eq!(changed(&bench, &second, &volume, 0, -1), [1, 3]);
    assert_eq!(changed(&bench, &volume, &second, 0, -1), [1, 3]);

    // The node below a change that is only recorded is not written to: a second one lies on it.
    write_to(&bench, &first, 5, 5 * BLOCK);
    assert_eq!(changed(&bench, &second, &first, 0, -1), [1, 5]);
    bench.destroy(&second);
    let left = names(&bench.tree_directory(&volume));
    assert!(!left.iter().any(|name| name.ends_with(".changed.json")), "{left:?}");
    bench.check();
}

/// Writes a block as a guest that is started for it does.
fn write_to(bench: &Bench, volume: &str, pattern: u8, offset: u64) {
    make_writable(bench, volume);
    write(&bench.node_file(volume), pattern, offset, BLOCK);
}

#[test]
fn all_of_a_disks_data_may_go_before_its_volumes() {
    let bench = Bench::new();
    let (volume, first, second) = two_snapshots(&bench);
    for key in [&second, &volume, &first] {
        destroy_data(&bench, key);
    }
    assert!(bench.node_files().is_empty());
    assert_eq!(bench.keys().len(), 3);
    assert_eq!(changed(&bench, &first, &volume, 0, -1), [1, 2]);
    bench.destroy(&second);
    assert_eq!(changed(&bench, &first, &volume, 0, -1), [1, 2]);
    bench.destroy(&first);
    bench.destroy(&volume);
    assert!(names(&bench.path.join("trees")).is_empty());
}

#[test]
fn what_a_guest_wrote_and_did_not_flush_is_told() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    enable(&bench, &volume);
    let snapshot = bench.snapshot(&volume);
    let (host, domain): (_, Domain) = (Host::at(&bench.host.root), "7".parse().unwrap());
    let uri: VolumeUri = format!("qsd://{}/{volume}", bench.sr).parse().unwrap();
    let socket = activation::attach(&host, uri, &domain).unwrap();
    activation::activate(&host, uri, &domain, Mode::ReadWrite).unwrap();
    let mut guest = Guest::connect(&socket, &volume, true);
    for block in 1..5 {
        guest.write_unflushed(7, block * 2 * BLOCK, 512);
        let expected: Vec<u64> = (1..=block).map(|block| block * 2).collect();
        assert_eq!(changed(&bench, &snapshot, &volume, 0, -1), expected);
    }
    guest.read(7, 2 * BLOCK, 512);
    guest.write_unflushed(8, 0, BLOCK);
    guest.disconnect();
    activation::release(&host, uri, &domain).unwrap();
    assert_eq!(changed(&bench, &snapshot, &volume, 0, -1), [0, 2, 4, 6, 8]);
}

#[test]
fn an_extent_is_widened_to_blocks_and_ends_with_the_volume() {
    let bench = Bench::new();
    let volume = bench.create(20 * BLOCK + 4096);
    enable(&bench, &volume);
    let snapshot = bench.snapshot(&volume);
    for block in [0, 7, 8, 9, 20] {
        write(&bench.node_file(&volume), 1, block * BLOCK, 4096);
    }
    let bits = |offset: u64, length: i64| {
        let request = json!({"key": snapshot, "key2": volume, "offset": offset, "length": length});
        decoded(bench.call("Volume.list_changed_blocks", request)["bitmap"].as_str().unwrap())
    };
    assert_eq!(bits(0, -1), [0b1000_0001, 0b1100_0000, 0b0000_1000]);
    assert_eq!(bits(0, i64::MAX), bits(0, -1));
    assert_eq!(bits(0, 1), [0b1000_0000]);
    assert_eq!(bits(7 * BLOCK + 1, BLOCK as i64), [0b1100_0000]);
    assert_eq!(bits(7 * BLOCK, BLOCK as i64), [0b1000_0000]);
    assert_eq!(bits(9 * BLOCK, -1), [0b1000_0000, 0b0001_0000]);
    assert_eq!(bits(100 * BLOCK, -1), [0_u8; 0]);
    assert_eq!(bits(0, 0), [0_u8; 0]);
    let request = json!({"key": snapshot, "key2": volume, "offset": -1, "length": 1});
    assert_eq!(bench.code("Volume.list_changed_blocks", request), "SR_BACKEND_FAILURE_115");
}

#[test]
fn changes_are_told_only_where_they_are_tracked() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    let before = bench.snapshot(&volume);
    let request = |from: &str, to: &str| json!({"key": from, "key2": to, "offset": 0, "length": -1});
    assert_eq!(bench.code("Volume.list_changed_blocks", request(&before, &volume)), "SR_BACKEND_FAILURE_460");
    assert_eq!(bench.code("Volume.data_destroy", json!({"key": before})), "SR_BACKEND_FAILURE_460");
    enable(&bench, &volume);
    enable(&bench, &volume);
    let tracked = bench.snapshot(&volume);
    let stat = |key: &str| bench.call("Volume.stat", json!({"key": key}));
    assert_eq!(stat(&tracked)["cbt_enabled"], json!(true));
    assert_eq!(stat(&bench.clone_of(&volume))["cbt_enabled"], json!(false));
    let other = bench.create(4 * MIB);
    enable(&bench, &other);
    assert_eq!(bench.code("Volume.list_changed_blocks", request(&other, &volume)), "SR_BACKEND_FAILURE_460");
    for _ in 0..2 {
        assert_eq!(bench.call("Volume.disable_cbt", json!({"key": volume})), Value::Null);
    }
    assert_eq!(bench.code("Volume.list_changed_blocks", request(&tracked, &volume)), "SR_BACKEND_FAILURE_460");
}

#[test]
fn changes_survive_that_nodes_are_merged() {
    let bench = Bench::new();
    let (volume, first, second) = two_snapshots(&bench);
    let tree = bench.tree(&volume);
    let node = |key: &str| tree["volumes"][key]["node"].as_str().unwrap().to_owned();
    let (bottom, middle, top) = (node(&first), node(&second), node(&volume));
    let leaf = bench.snapshot(&volume);
    destroy_data(&bench, &second);
    // The middle is merged into the one above, by the rules for whoever merges: both have a record first.
    let directory = bench.tree_directory(&volume);
    let status = Command::new("qemu-img")
        .args(["rebase", "-f", "qcow2", "-F", "qcow2", "-b", &format!("{bottom}.qcow2")])
        .arg(directory.join(format!("{top}.qcow2")))
        .status()
        .unwrap();
    assert!(status.success());
    for (node, block) in [(&middle, 1), (&top, 2)] {
        let record = json!({"format": 1, "block": BLOCK, "data": [[block, 1]], "zero": []});
        fs::write(directory.join(format!("{node}.changed.json")), record.to_string()).unwrap();
    }
    let mut tree = bench.tree(&volume);
    tree["nodes"].as_object_mut().unwrap().remove(&middle);
    tree["nodes"][&top]["parent"] = json!(bottom);
    tree["format"] = json!(3);
    tree["history"] = json!({
        &middle: {"parent": bottom, "virtual_size": 4 * MIB},
        &top: {"parent": middle, "virtual_size": 4 * MIB},
    });
    fs::write(directory.join("tree.json"), tree.to_string()).unwrap();
    fs::remove_file(directory.join(format!("{middle}.qcow2"))).unwrap();
    bench.host.call("SR.attach", json!({"configuration": bench.configuration()}));

    assert_reads(&bench.node_file(&volume), 2, BLOCK, BLOCK);
    assert_eq!(changed(&bench, &first, &second, 0, -1), [1]);
    assert_eq!(changed(&bench, &second, &leaf, 0, -1), [2]);
    assert_eq!(changed(&bench, &first, &volume, 0, -1), [1, 2]);
    bench.destroy(&second);
    bench.destroy(&first);
    assert_reads(&bench.node_file(&volume), 2, BLOCK, BLOCK);
}

#[test]
fn a_data_destroy_killed_anywhere_is_done_or_not() {
    for n in 1.. {
        let bench = Bench::new();
        let (volume, first, second) = two_snapshots(&bench);
        bench.call("Volume.revert", json!({"key": volume, "snapshot": first}));
        let killed = bench.host.killed_at("Volume.data_destroy", &bench.request(json!({"key": second})), CHANGING, n);
        assert_eq!(changed(&bench, &first, &second, 0, -1), [1]);
        destroy_data(&bench, &second);
        assert_eq!(changed(&bench, &first, &second, 0, -1), [1]);
        assert_eq!(bench.node_files().len(), 2);
        bench.destroy(&second);
        bench.check();
        if killed != Some(true) {
            break;
        }
    }
}
