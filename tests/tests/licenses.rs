//! The licences of what is linked in: each has its text in packaging/THIRD-PARTY-LICENSES.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;

#[test]
fn what_is_linked_in_has_its_licence_in_the_list_and_nothing_else_does() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/licenses.py");
    let output = Command::new(script).arg("--check").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn each_package_says_the_licence_that_is_in_the_repository() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let license = std::fs::read_to_string(root.join("LICENSE")).unwrap();
    assert!(license.contains("GNU LESSER GENERAL PUBLIC LICENSE") && license.contains("Version 2.1, February 1999"));
    let workspace = std::fs::read_to_string(root.join("Cargo.toml")).unwrap();
    assert!(workspace.contains("license = \"LGPL-2.1-or-later\""));
    for package in ["plugin", "volume", "datapath", "tests"] {
        let manifest = std::fs::read_to_string(root.join(package).join("Cargo.toml")).unwrap();
        assert!(manifest.contains("license.workspace = true"), "{package}");
    }
}
