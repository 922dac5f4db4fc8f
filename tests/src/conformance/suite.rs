//! Runs the checks that a pattern selects, several at once, and tells of each in the order of the registry.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::{Check, Outcome, Subject, Tally, all_checks};

/// What came of one check.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// What the check is about.
    pub group: &'static str,
    /// The rule.
    pub title: String,
    /// `passed`, `failed` or `skipped`.
    pub outcome: &'static str,
    /// How the failure was seen, or why the check was skipped.
    pub reason: Option<String>,
    /// How long it took.
    pub seconds: f64,
}

/// What came of a run.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// How many checks came to what.
    #[serde(flatten)]
    pub tally: Tally,
    /// Every check, in the order of the registry.
    pub checks: Vec<Verdict>,
}

impl fmt::Display for Verdict {
    /// One line; where a failure needs more words they follow, indented.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { group, title, outcome, reason, .. } = self;
        write!(f, "{outcome} {group}: {title}")?;
        match (*outcome, reason) {
            ("skipped", Some(reason)) => write!(f, " ({reason})"),
            (_, Some(reason)) => reason.lines().try_for_each(|line| write!(f, "\n    {line}")),
            _ => Ok(()),
        }
    }
}

/// Finds the checks whose group or title has one of the patterns in it, whatever the case; all without a pattern.
///
/// # Errors
/// If there is none.
pub fn select(only: &[String]) -> Result<Vec<Check>> {
    let only: Vec<String> = only.iter().map(|pattern| pattern.to_lowercase()).collect();
    let mut checks = all_checks();
    checks.retain(|check| {
        let name = format!("{check:?}").to_lowercase();
        only.is_empty() || only.iter().any(|pattern| name.contains(pattern))
    });
    ensure!(!checks.is_empty(), "no check has {only:?} in its group or title");
    Ok(checks)
}

/// Runs checks, at most `jobs` at once, and tells of each.
///
/// # Errors
/// If telling fails, or a check cannot be run at all.
pub async fn run(
    subject: &Subject,
    checks: Vec<Check>,
    jobs: usize,
    mut tell: impl FnMut(&Verdict) -> Result<()>,
) -> Result<Report> {
    let jobs = Arc::new(Semaphore::new(jobs.max(1)));
    let mut running: VecDeque<JoinHandle<(Outcome, Verdict)>> = VecDeque::new();
    let mut report = Report::default();
    let mut ended = |ended: (Outcome, Verdict)| {
        let (outcome, verdict) = ended;
        report.tally.count(&outcome);
        let told = tell(&verdict);
        report.checks.push(verdict);
        told
    };
    for check in checks {
        // In their order, so that those that are over can be told of.
        let permit = Arc::clone(&jobs).acquire_owned().await?;
        while running.front().is_some_and(JoinHandle::is_finished)
            && let Some(first) = running.pop_front()
        {
            ended(first.await?)?;
        }
        let subject = subject.clone();
        running.push_back(tokio::spawn(async move {
            let start = Instant::now();
            let outcome = check.run(&subject).await;
            drop(permit);
            let seconds = (start.elapsed().as_secs_f64() * 1000.0).round() / 1000.0;
            (outcome.clone(), verdict(check, outcome, seconds))
        }));
    }
    for check in running {
        ended(check.await?)?;
    }
    Ok(report)
}

fn verdict(check: Check, outcome: Outcome, seconds: f64) -> Verdict {
    let (outcome, reason) = match outcome {
        Outcome::Passed => ("passed", None),
        Outcome::Failed(how) => ("failed", Some(how)),
        Outcome::Skipped(why) => ("skipped", Some(why)),
    };
    Verdict { group: check.group, title: check.title, outcome, reason, seconds }
}
