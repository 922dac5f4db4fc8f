//! Bits that flip in an image: found, or without effect on what any volume reads; and never spread.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::program::check;
use crate::scene::Random;
use crate::support::{Bench, MIB, write};

/// How many flips there are; each costs a few processes.
const FLIPS: usize = 24;

#[test]
fn a_bit_that_flips_in_the_tables_is_found_or_changes_nothing_and_never_spreads() {
    let mut random = Random::new(2);
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    write(&bench.node_file(&volume), 1, 0, MIB);
    bench.snapshot(&volume);
    write(&bench.node_file(&volume), 2, 65536, 65536);
    let files = bench.node_files();
    let damaged = random.pick(&files).clone();
    let (whole, expected) = (fs::read(&damaged).unwrap(), content(&files));
    // The header, the table and block of reference counts, the first- and second-level tables.
    let regions = [(0, 112), (65536, 16), (131_072, 64), (196_608, 16), (262_144, 256)];
    let mut found = 0;
    for _ in 0..FLIPS {
        let (start, length) = *random.pick(&regions);
        let (at, bit) = (start + random.below(length), random.below(8));
        // The flag of a cluster that reads as zeroes is as right set as not: nothing in the format tells.
        if start == 262_144 && at % 8 == 7 && bit == 0 {
            continue;
        }
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << bit;
        fs::write(&damaged, &flipped).unwrap();
        let others = others(&files, &damaged);
        let (status, report) = check(&bench.host, &bench.path, &["--repair"]);
        let names = |finding: &serde_json::Value| finding["path"] == json!(damaged.to_str().unwrap());
        let is_found = report["findings"].as_array().unwrap().iter().any(names)
            || report["repaired"].as_array().unwrap().iter().any(names);
        if is_found {
            found += 1;
        } else {
            let is_same = content(&files) == expected;
            assert!(status == 0 && is_same, "bit {bit} of byte {at}: {report:#}");
        }
        assert!(self::others(&files, &damaged) == others, "bit {bit} of byte {at} has spread");
    }
    assert!(found > FLIPS / 3, "{found}");
    fs::write(&damaged, whole).unwrap();
    assert_eq!(check(&bench.host, &bench.path, &[]).0, 0);
}

/// Reads the files but one.
fn others(files: &[PathBuf], damaged: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    files.iter().filter(|file| *file != damaged).map(|file| (file.clone(), fs::read(file).unwrap())).collect()
}

/// Reads what is in each image, with what it lies on; nothing of one that cannot be read.
fn content(files: &[PathBuf]) -> Vec<Option<Vec<u8>>> {
    let read = |file: &PathBuf| {
        let raw = file.with_extension("raw");
        let convert =
            Command::new("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]).args([file, &raw]).output();
        let bytes = convert.unwrap().status.success().then(|| fs::read(&raw).unwrap());
        drop(fs::remove_file(raw));
        bytes
    };
    files.iter().map(read).collect()
}
