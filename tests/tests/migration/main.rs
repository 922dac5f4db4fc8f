//! Whole migrations by every flow: the worked example, chosen plans and random ones, each judged by its report.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, clippy::print_stdout, reason = "a test talks to people")]

#[path = "../strategy/mod.rs"]
mod strategy;

mod cancel;
mod chosen;
mod example;
mod random;
mod restart;
#[path = "../world/mod.rs"]
mod world;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fake_xapi::report::Report;
use fake_xapi::scenario::{Outcome, Settings, Subject, run};
use fake_xapi::sxm::Flow;

const FLOWS: [Flow; 3] = [Flow::Leaf, Flow::Tree, Flow::Base];

/// The executables are built beside fake-xapi itself.
fn binaries() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_fake-xapi")).parent().unwrap().to_owned()
}

async fn migrate(subject: Subject, flow: Flow, one_host: bool) -> Outcome {
    migrate_in(Path::new("/tmp"), subject, flow, one_host).await
}

async fn migrate_in(place: &Path, subject: Subject, flow: Flow, one_host: bool) -> Outcome {
    run(subject, &Settings { one_host, ..settings(place, flow) }, Arc::new(|_, _| {})).await.unwrap()
}

fn settings(place: &Path, flow: Flow) -> Settings {
    let poll = Some(Duration::from_millis(20));
    Settings {
        binaries: binaries(),
        flow,
        one_host: false,
        verify: false,
        poll,
        place: place.to_owned(),
        story: None,
        fail: None,
    }
}

/// What a report says if not everything holds.
fn wrong(report: &Report) -> Option<String> {
    (!report.ok).then(|| report.to_json().unwrap())
}
