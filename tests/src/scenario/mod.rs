//! A whole run: two hosts, a VM whose disks get a history, guests that write, a migration, and the judgement of it.
//!
//! ```text
//! Stage (hosts, SRs) ── Subject played on a VM ── guests write ── sxm::migrate ── what was left ── Report
//!                                                                    │ suspend: guests drain
//!                                                                    └ resume:  judged, then guests go on
//! ```
//!
//! Source and destination are held against each other while both are there: after the switch, before the guests go on, and
//! before the source's volumes are destroyed. The time that takes is not counted as downtime.

mod aftermath;
mod failing;
mod machine;
mod stage;
mod subject;
mod summary;
mod telling;
mod verdict;
mod witness;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

pub use failing::FailAt;
pub use machine::OnXapi;
pub use stage::{Layout, Stage, place_with};
pub use subject::Subject;
pub use verdict::Judged;
pub use witness::Witness;

use crate::report::Report;
use crate::script::{CallLog, CallRecord};
use crate::story::Story;
use crate::sxm::{self, Event, Flow, Migration};
use telling::Telling;

/// How many calls are told of a run that failed.
const CALLS_TOLD: usize = 6;
/// How many characters of each answer.
const ANSWER_TOLD: usize = 600;

/// Told what happens and the name of the volume that it happens to, to show it.
pub type Show = Arc<dyn Fn(&Event, &str) + Send + Sync>;

/// How to run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The directory of the two executables, or where they are installed ([`crate::host::PluginSource::at`]).
    pub binaries: PathBuf,
    /// The flow.
    pub flow: Flow,
    /// Whether source and destination are one host.
    pub one_host: bool,
    /// Whether the plugins are told to compare source and destination after each mirror that sent only a difference.
    pub verify: bool,
    /// How often the flow asks how far a mirror is; xapi's own pace if not given.
    pub poll: Option<Duration>,
    /// Where the hosts and their SRs are made: a directory with a short path.
    pub place: PathBuf,
    /// Whether the story is told too, under this title; that takes a few looks at all images.
    pub story: Option<String>,
    /// A call that is made to fail.
    pub fail: Option<FailAt>,
}

/// What came of a run.
#[derive(Debug)]
pub struct Outcome {
    /// The report.
    pub report: Report,
    /// Source and destination as they were at the switch, drawn side by side; nothing if it never came to it.
    pub drawing: String,
    /// If not everything holds, the last script calls: host, request, answer and time of each; and what the
    /// plugins say of themselves.
    pub calls: Vec<String>,
    /// What happened when, if that was asked for.
    pub story: Option<Story>,
}

/// Runs a subject from its first write to the last check. That something does not hold is in the report.
///
/// # Errors
/// If there was nothing to migrate: hosts, SRs, VM or its history could not be made.
pub async fn run(subject: Subject, settings: &Settings, show: Show) -> Result<Outcome> {
    let Settings { binaries, one_host, verify, place, .. } = settings;
    let stage =
        Stage::laid_out(&Layout { binaries, one_host: *one_host, place, memory: None, verify: *verify }).await?;
    let outcome = on(&stage, subject, settings, show).await;
    stage.close().await;
    outcome
}

async fn on(stage: &Stage, subject: Subject, settings: &Settings, show: Show) -> Result<Outcome> {
    let mut report = Report { flow: settings.flow.name().to_owned(), ..Report::default() };
    let began = Instant::now();
    show(&Event::Phase("history"), "");
    let vm = stage.xapi.vm_create("vm", &stage.source, &stage.source_sr, &subject.sizes()).await?;
    let halted = subject.halted();
    let mut machine = OnXapi::new(&stage.xapi, vm, halted);
    subject.play(&mut machine, &show).await.context("the VM's history could not be made")?;
    let disks = if halted {
        machine.halt().await?;
        Vec::new()
    } else {
        machine.running().await?
    };
    report.seconds.add("history", began.elapsed().as_secs_f64());

    let witness = Witness::new(stage, vm, subject, settings.flow, show)?;
    let mut telling = settings.story.as_ref().map(|title| Telling::begin(title, stage, &witness)).transpose()?;
    witness.start_guests(&disks).await?;
    let mut migration = Migration::new(vm, &stage.destination, &stage.destination_sr, settings.flow);
    if let Some(poll) = settings.poll {
        migration.poll = poll;
    }
    let mut drawing = String::new();
    let struck = settings.fail.as_ref().map(|fail| fail.order(stage));
    let migrated = {
        let _running = telling.as_mut().map(Telling::migrating);
        sxm::migrate(&stage.xapi, &migration, &witness).await
    };
    if struck.is_some_and(|struck| !struck.is_over()) {
        report.problems.push("the call that was to fail was never made".to_owned());
    }
    let wires = match &migrated {
        Ok(migrated) => migrated.wires.clone(),
        Err(failed) => failed.wires.clone(),
    };
    if let (Some(telling), Err(failed)) = (&mut telling, &migrated) {
        telling.failed(failed);
    }
    let looked = match migrated {
        Ok(migrated) => aftermath::of_success(stage, &witness, vm, &migrated, &mut report).await,
        Err(failed) => aftermath::of_failure(stage, &witness, vm, *failed, &mut report).await.map(|()| String::new()),
    };
    match looked {
        Ok(drawn) => drawing = drawn,
        Err(error) => report.problems.push(format!("{error:#}")),
    }
    report.guests = witness.accounts();
    report.ok = report.problems.is_empty() && report.properties.all();
    let story = match telling {
        Some(telling) => Some(telling.end(stage, &witness, &wires, &report).await),
        None => None,
    };
    let mut calls = if report.ok { Vec::new() } else { last_calls(&stage.log) };
    if !report.ok {
        calls.extend(stage.source.diagnostics().await);
        calls.extend(stage.destination.diagnostics().await);
    }
    Ok(Outcome { report, drawing, calls, story })
}

/// The last calls that failed, and the very last ones.
fn last_calls(log: &CallLog) -> Vec<String> {
    let calls = log.calls();
    let failed: Vec<&CallRecord> = calls.iter().filter(|call| !matches!(call.answer, Some(Ok(_)))).collect();
    let end = |count: usize| count.saturating_sub(CALLS_TOLD);
    let last = &calls[end(calls.len())..];
    failed[end(failed.len())..].iter().copied().chain(last).map(tell).collect()
}

fn tell(call: &CallRecord) -> String {
    let (host, method, began, request) = (&call.host, call.method, call.started.as_secs_f64(), &call.request);
    let took = call.ended.map_or(0.0, |ended| ended.saturating_sub(call.started).as_secs_f64());
    let mut answer = match &call.answer {
        None => "no answer yet".to_owned(),
        Some(Ok(answer)) => answer.to_string(),
        Some(Err(failure)) => failure.to_string(),
    };
    if let Some((end, _)) = answer.char_indices().nth(ANSWER_TOLD) {
        answer.truncate(end);
        answer.push('…');
    }
    format!("{began:8.3} s  {host} {method} {request}\n  {took:8.3} s: {answer}")
}
