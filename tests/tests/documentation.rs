//! docs/methods.md against the executables: it describes every method that there is, and no other.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

/// The methods that an executable says it has.
fn methods(executable: &str) -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_BIN_EXE_fake-xapi")).with_file_name(executable);
    let output = Command::new(path).arg("--list-methods").output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// The methods in the first column of a chapter's tables.
fn described(chapter: &str) -> BTreeSet<String> {
    let rows = chapter.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    rows.flat_map(|cell| cell.split(", ")).filter(|name| name.contains('.')).map(str::to_owned).collect()
}

#[test]
fn every_method_is_described_and_no_other() {
    let text = include_str!("../../docs/methods.md");
    let (volume, datapath) = text.split_once("\n## Datapath plugin").unwrap();
    assert_eq!(described(volume), methods("xapi-storage-qcow2-volume"));
    assert_eq!(described(datapath), methods("xapi-storage-qcow2-datapath"));
}
