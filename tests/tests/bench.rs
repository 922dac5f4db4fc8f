//! `fake-xapi bench all` at its smallest: everything is measured and told, whatever the figures are.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use fake_xapi::bench::well_formed;
use serde_json::Value;

/// Every row of what is to be reached.
const WITH_BARS: [&str; 24] = [
    "activate",
    "base-physical",
    "base-time",
    "base-wire",
    "call-volume-snapshot",
    "crowd-activate",
    "crowd-snapshot",
    "crowd-waiting",
    "deactivate-mirror",
    "ext4",
    "memory-datapath",
    "memory-volume",
    "merge",
    "mirror",
    "relay",
    "scan",
    "scan-growth",
    "scan-memory",
    "snapshot",
    "sparse-time",
    "sparse-wire",
    "stat",
    "stat-growth",
    "tree-physical",
];

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

/// The median as somebody else would take it.
fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[half] } else { f64::midpoint(sorted[half - 1], sorted[half]) }
}

#[test]
fn a_small_run_measures_everything_and_tells_what_it_missed() {
    let directory = tempfile::tempdir().unwrap();
    let (json, plots) = (directory.path().join("bench.json"), directory.path().join("plots"));
    // Where nothing is ever written to a disk, for it is slow while other tests run.
    let place = ["/dev/shm", "/tmp"].into_iter().find(|place| Path::new(place).is_dir()).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_fake-xapi"))
        .args(["bench", "all", "--scale", "small", "--place", place, "--json"])
        .arg(&json)
        .arg("--plot")
        .arg(&plots)
        .output()
        .unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{told}\n{}", String::from_utf8_lossy(&output.stderr));

    let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    for fact in ["cpu", "kernel", "file_system", "qemu_img", "qemu_storage_daemon", "load"] {
        assert!(report["machine"][fact].as_str().is_some_and(|text| !text.is_empty()), "{fact}: {report}");
    }
    let mut with_bars = BTreeSet::new();
    let mut all = BTreeSet::new();
    let (mut reached, mut missed) = (0, 0);
    for group in report["groups"].as_array().unwrap() {
        assert_eq!(group["failed"], Value::Null);
        for figure in group["figures"].as_array().unwrap() {
            assert!(all.insert(figure["id"].as_str().unwrap()), "twice: {figure}");
            if figure["bar"].is_object() {
                with_bars.insert(figure["id"].as_str().unwrap());
            }
            consistent(figure, &told);
            reached += usize::from(figure["verdict"] == "reached");
            missed += usize::from(figure["verdict"] == "missed");
        }
    }
    let expected: BTreeSet<&str> = WITH_BARS.into_iter().chain(["tree-time", "tree-wire"]).collect();
    assert_eq!(with_bars, expected);
    assert!(told.contains(&format!("{reached} reached, {missed} missed")), "{told}");
    assert_eq!(told.matches("MISSED").count(), missed, "{told}");

    drawn(&plots);
}

/// A figure's numbers follow from its samples, and the table has it.
fn consistent(figure: &Value, told: &str) {
    assert!(told.contains(figure["what"].as_str().unwrap()), "{figure} is not told of:\n{told}");
    if figure["verdict"] == "skipped" {
        assert!(told.contains(figure["skipped"].as_str().unwrap()), "{figure}");
        return;
    }
    let samples = numbers(&figure["measured"]["samples"]);
    assert!(!samples.is_empty() && samples.iter().all(|sample| *sample >= 0.0), "{figure}");
    let value = median(&samples);
    assert!((figure["measured"]["median"].as_f64().unwrap() - value).abs() <= value * 1e-9, "{figure}");
    let reference = numbers(&figure["reference"]["samples"]);
    let Some((kind, limit)) = figure["bar"].as_object().and_then(|bar| bar.iter().next()) else { return };
    let judged = match kind.as_str() {
        "times" => value / median(&reference),
        "more" => value - median(&reference),
        "value" => value,
        other => panic!("a bar {other}"),
    };
    let verdict = if judged <= limit.as_f64().unwrap() { "reached" } else { "missed" };
    assert_eq!(figure["verdict"], verdict, "{figure}");
}

/// Every chart is there, well-formed, and not empty.
fn drawn(plots: &Path) {
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(plots).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        well_formed(&text).unwrap_or_else(|wrong| panic!("{}: {wrong}", path.display()));
        assert!(text.contains("<rect") || text.contains("<polyline"), "{} is empty", path.display());
        names.insert(path.file_stem().unwrap().to_str().unwrap().to_owned());
    }
    let expected =
        ["bars", "calls", "crowd", "datapath", "memory", "mirror", "scale", "snapshot", "tree-bytes", "tree-time"];
    assert_eq!(names, expected.map(str::to_owned).into());
}
