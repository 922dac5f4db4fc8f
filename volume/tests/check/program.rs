//! The program itself, run as an administrator runs it.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::support::Host;

/// What a run of the program said.
pub struct Run {
    /// The exit status.
    pub status: i32,
    /// What it printed.
    pub text: String,
    /// What it complained of.
    pub complaint: String,
}

/// Runs the program on a host.
pub fn run(host: &Host, arguments: &[&str]) -> Run {
    let output: Output = Command::new(env!("CARGO_BIN_EXE_xapi-storage-qcow2"))
        .args(arguments)
        .env("XAPI_STORAGE_QCOW2_ROOT", &host.root)
        .output()
        .unwrap();
    Run {
        status: output.status.code().unwrap(),
        text: String::from_utf8(output.stdout).unwrap(),
        complaint: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Checks an SR and gives the status with the report.
pub fn check(host: &Host, sr: &Path, options: &[&str]) -> (i32, Value) {
    let arguments: Vec<&str> = ["check", sr.to_str().unwrap(), "--json"].iter().chain(options).copied().collect();
    let run = run(host, &arguments);
    let report =
        serde_json::from_str(&run.text).unwrap_or_else(|error| panic!("{error}: {}{}", run.text, run.complaint));
    (run.status, report)
}

/// Sees that a check finds nothing.
pub fn assert_well(host: &Host, sr: &Path, options: &[&str]) {
    let (status, report) = check(host, sr, options);
    assert_eq!((status, &report["findings"]), (0, &Value::Array(Vec::new())), "{report:#}");
}

#[test]
fn a_command_line_that_means_nothing_has_a_status_of_its_own() {
    let host = Host { root: "/nonexistent".into() };
    for arguments in [&[][..], &["check"], &["grow", "/a"], &["tree", "/a", "b"], &["check", "/a", "--dot"]] {
        let wrong = run(&host, arguments);
        assert_eq!((wrong.status, wrong.text.as_str()), (2, ""), "{arguments:?}");
        assert!(wrong.complaint.contains("usage:"), "{}", wrong.complaint);
    }
    for arguments in [&["--help"][..], &["check", "--help"], &["--version"]] {
        let shown = run(&host, arguments);
        assert_eq!(shown.status, 0);
        assert!(shown.text.contains("xapi-storage-qcow2"), "{}", shown.text);
    }
    let unknown = uuid::Uuid::new_v4().to_string();
    let absent = run(&host, &["check", &unknown]);
    assert!(absent.status == 2 && absent.complaint.contains("not attached"), "{}", absent.complaint);
    let absent = run(&host, &["check", "/nonexistent/sr"]);
    assert!(absent.status == 1 && absent.complaint.contains("/nonexistent/sr"), "{}", absent.complaint);
}
