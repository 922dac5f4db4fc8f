//! Plans that were chosen because each asks for something that random ones may miss.

use std::path::Path;
use std::sync::Arc;

use fake_xapi::plan::Plan;
use fake_xapi::scenario::{Outcome, Settings, Subject, run};
use fake_xapi::sxm::Flow;

use crate::{FLOWS, migrate, settings, wrong};

async fn outcome(json: &str, flow: Flow, one_host: bool) -> Outcome {
    let outcome = migrate(Subject::of(Plan::parse(json.as_bytes()).unwrap()).unwrap(), flow, one_host).await;
    assert_eq!(wrong(&outcome.report), None, "\n{outcome}");
    outcome
}

/// Two snapshots on a branch each, the second of them with data zeroed and discarded.
const BRANCHES: &str = r#""steps": [
    {"write": {"offset": 0, "length": 1048576, "seed": 1}}, {"snapshot": "a"},
    {"write": {"offset": 524288, "length": 524288, "seed": 2}}, {"snapshot": "b"},
    {"revert": "a"}, {"zero": {"offset": 0, "length": 131072}},
    {"discard": {"offset": 262144, "length": 131072}}, {"snapshot": "c"},
    {"write": {"offset": 2097152, "length": 65536, "seed": 3}}]"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_without_snapshots_migrates() {
    for flow in FLOWS {
        outcome(
            r#"{"size": 4194304, "steps": [{"write": {"offset": 4096, "length": 5000, "seed": 1}}]}"#,
            flow,
            false,
        )
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_acknowledged_write_of_a_guest_that_never_waits_is_at_the_destination() {
    for flow in FLOWS {
        let plan = format!(r#"{{"size": 67108864, "guest": {{}}, {BRANCHES}}}"#);
        let outcome = outcome(&plan, flow, false).await;
        assert!(outcome.report.guests[0].acknowledged > 1000, "\n{outcome}");
        assert_eq!(outcome.report.guests[0].failed, 0, "\n{outcome}");
        assert!(outcome.report.guests[0].latency.max_seconds < 5.0, "\n{outcome}");
        assert!(outcome.report.downtime_seconds.is_some());
    }
}

/// The snapshots that two branches, and the leaf and a snapshot, had in common are gone, and their data is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn branches_of_snapshots_that_were_destroyed_migrate() {
    for flow in FLOWS {
        let plan = r#"{"size": 8388608, "guest": {"writes_per_second": 100}, "steps": [
            {"write": {"offset": 0, "length": 2097152, "seed": 1}}, {"snapshot": "root"},
            {"write": {"offset": 1048576, "length": 524288, "seed": 2}}, {"snapshot": "left"},
            {"revert": "root"}, {"zero": {"offset": 0, "length": 262144}}, {"snapshot": "right"},
            {"write": {"offset": 4194304, "length": 524288, "seed": 3}}, {"snapshot": "gone"},
            {"resize": 12582912}, {"write": {"offset": 4194304, "length": 65536, "seed": 4}},
            {"destroy": "gone"}, {"destroy": "root"}]}"#;
        let outcome = outcome(plan, flow, false).await;
        assert_eq!(outcome.report.nodes.len(), 3, "\n{outcome}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_halted_vm_migrates() {
    for flow in FLOWS {
        let outcome = outcome(&format!(r#"{{"size": 4194304, "halted": true, {BRANCHES}}}"#), flow, false).await;
        assert_eq!(outcome.report.downtime_seconds, None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_sent_as_a_difference_is_read_back_where_that_is_asked_for() {
    for verify in [false, true] {
        let plan = Plan::parse(format!(r#"{{"size": 4194304, "halted": true, {BRANCHES}}}"#).as_bytes()).unwrap();
        let settings = Settings { verify, ..settings(Path::new("/tmp"), Flow::Tree) };
        let outcome = run(Subject::of(plan).unwrap(), &settings, Arc::new(|_, _| {})).await.unwrap();
        assert_eq!(wrong(&outcome.report), None, "\n{outcome}");
        // Three of the four mirrors lie on what the destination has already: a mebibyte of data and more.
        assert_eq!(outcome.report.bytes_back > 3 << 20, verify, "{}", outcome.report.bytes_back);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_migrates_between_two_srs_of_one_host() {
    for flow in FLOWS {
        let plan = format!(r#"{{"size": 4194304, "guest": {{"writes_per_second": 200}}, {BRANCHES}}}"#);
        outcome(&plan, flow, true).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disks_of_several_sizes_migrate_together() {
    for flow in FLOWS {
        let plan = r#"{"disks": [1048576, 5000192, 16777216], "guest": {"writes_per_second": 200}, "steps": [
            {"disk": 1, "write": {"offset": 0, "length": 70000, "seed": 1}}, {"snapshot": "a"},
            {"disk": 0, "resize": 2097152}, {"disk": 2, "zero": {"offset": 0, "length": 1048576}},
            {"disk": 0, "write": {"offset": 1572864, "length": 65536, "seed": 2}}, {"snapshot": "b"},
            {"disk": 2, "write": {"offset": 1000, "length": 10, "seed": 3}}]}"#;
        let outcome = outcome(plan, flow, false).await;
        assert_eq!(outcome.report.nodes.len(), 9);
    }
}
