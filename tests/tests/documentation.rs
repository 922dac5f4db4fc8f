//! The docs against what there is: docs/methods.md has every method and no other, and tests that are named exist.

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

/// All of the project's tests, as one text.
fn sources() -> String {
    fn read(directory: &Path, into: &mut String) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                read(&path, into);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                into.push_str(&std::fs::read_to_string(&path).unwrap());
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut text = String::new();
    for part in ["plugin", "volume", "datapath", "tests"] {
        for kind in ["src", "tests"].map(|kind| root.join(part).join(kind)) {
            if kind.is_dir() {
                read(&kind, &mut text);
            }
        }
    }
    text
}

#[test]
fn every_test_that_the_docs_name_is_there() {
    let sources = sources();
    let text = [
        include_str!("../../docs/faults.md"),
        include_str!("../../docs/mirroring.md"),
        include_str!("../../docs/qemu.md"),
    ]
    .concat();
    // In the docs' code quotes, a name of a test is a sentence; "…" stands for any part of one.
    let quoted = text.split('`').skip(1).step_by(2);
    let names = quoted.filter(|name| {
        name.matches('_').count() > 2 && name.chars().all(|c| c.is_ascii_lowercase() || c == '_' || c == '…')
    });
    let names: BTreeSet<&str> = names.collect();
    assert!(names.len() > 40, "{names:?}");
    let is_there = |name: &str| {
        let parts: Vec<&str> = name.split('…').filter(|part| !part.is_empty()).collect();
        let begins = if name.starts_with('…') { String::new() } else { "fn ".to_owned() };
        let ends = if name.ends_with('…') { "" } else { "(" };
        match &parts[..] {
            [only] => sources.contains(&format!("{begins}{only}{ends}")),
            parts => parts.iter().all(|part| sources.contains(part)),
        }
    };
    let missing: Vec<&&str> = names.iter().filter(|name| !is_there(name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
