//! A suite that judges a SMAPIv3 plugin: one check a rule of the contract, run through the strict script runner.
//!
//! ```text
//! Subject::discover ── which methods and features the plugin has
//!    └─ all_checks() ── title, group, needs, async fn
//!          └─ Check::run ── a host and an SR of its own (Bench) ─► the check ─► everything destroyed, nothing left over
//! ```
//!
//! A check that needs a method or a feature which the plugin does not have is skipped. Where a plugin's SRs have this
//! project's layout on disk, qemu-img judges the files as well.

mod answer;
mod bad_input;
mod bad_size;
mod bench;
mod cbt;
mod compose;
mod copy;
mod crowd;
mod data;
mod features;
mod golden;
mod import;
mod invariant;
mod live;
mod mirror;
mod mirror_end;
mod nonpersistent;
mod order;
mod own_layout;
mod plugin;
mod process;
mod quicktest;
pub mod random;
mod raw;
mod relay;
mod request;
mod self_test;
mod sr;
mod sr_faults;
mod subject;
pub mod suite;
mod task;
mod twice;
mod volume;
mod volume_copy;
mod xcp_ng;

use std::fmt;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use serde::Serialize;

pub use bench::{AttachedSr, Bench, DBG, MIB, refused, uri_of};
pub use subject::Subject;

use crate::wire::Failure;

/// What a check needs to make sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// A script of the volume or the datapath plugin.
    Method(&'static str),
    /// A feature that xapi believes in.
    Feature(&'static str),
    /// An SR whose files are as this project lays them out, and a host whose files are below a root.
    OwnLayout,
    /// The rights to mount a file system.
    Root,
    /// Scripts beside which the module lies that runs them when tracing is on, and Python to run it.
    Observer,
}

type Run = Arc<dyn Fn(Arc<Bench>) -> Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>> + Send + Sync>;

/// One rule of the contract and how to see whether a plugin keeps it.
#[derive(Clone)]
pub struct Check {
    /// What it is about.
    pub group: &'static str,
    /// The rule, as a sentence.
    pub title: String,
    /// What it needs.
    pub needs: Vec<Need>,
    run: Run,
}

impl fmt::Debug for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.group, self.title)
    }
}

/// What came of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The rule is kept.
    Passed,
    /// It is not; how that was seen.
    Failed(String),
    /// It could not be seen; why.
    Skipped(String),
}

/// How many checks came to what.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Rules that are kept.
    pub passed: usize,
    /// Rules that are not.
    pub failed: usize,
    /// Rules that could not be looked at.
    pub skipped: usize,
}

impl Tally {
    /// Counts one outcome.
    pub fn count(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Passed => self.passed += 1,
            Outcome::Failed(_) => self.failed += 1,
            Outcome::Skipped(_) => self.skipped += 1,
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

impl Check {
    /// Why the check cannot be made with this plugin, if it cannot.
    #[must_use]
    pub fn obstacle(&self, subject: &Subject) -> Option<String> {
        self.needs.iter().find_map(|need| subject.lacks(*need))
    }

    /// Makes the check on a host and an SR of its own, and then sees that everything can be destroyed without a trace.
    pub async fn run(&self, subject: &Subject) -> Outcome {
        if let Some(obstacle) = self.obstacle(subject) {
            return Outcome::Skipped(obstacle);
        }
        let bench = match Bench::new(subject).await {
            Ok(bench) => Arc::new(bench),
            Err(error) => return Outcome::Failed(format!("there is no SR to check with: {error:#}")),
        };
        let checked = (self.run)(Arc::clone(&bench)).await;
        let cleaned = match &checked {
            Ok(()) => bench.finish().await,
            Err(_) => {
                bench.tidy().await;
                Ok(())
            }
        };
        let reasons = bench.mirror_reasons();
        bench.end_what_is_left().await;
        match (checked, cleaned) {
            (Ok(()), Ok(())) => Outcome::Passed,
            (Err(error), _) => match lacking(subject, &error) {
                Some(what) => Outcome::Skipped(what),
                None => Outcome::Failed(format!("{error:#}{reasons}")),
            },
            (Ok(()), Err(error)) => Outcome::Failed(format!("cleaning up afterwards: {error:#}")),
        }
    }
}

/// What a check went without that a plugin need not have; none if it found something wrong.
fn lacking(subject: &Subject, error: &anyhow::Error) -> Option<String> {
    if let Some(one) = error.downcast_ref::<bench::OneSrOnly>() {
        return Some(one.to_string());
    }
    if let Some(none) = error.downcast_ref::<bench::NoDatapath>() {
        return Some(none.to_string());
    }
    if let Some(none) = error.downcast_ref::<bench::NoNbd>() {
        // Who can be mirrored to is written to by NBD.
        return subject.lacks(Need::Feature("VDI_MIRROR_IN")).map(|_| none.to_string());
    }
    // Also where a check went through what xapi makes of the script.
    let failure = error.chain().find_map(|cause| cause.downcast_ref::<Failure>());
    let missing = failure.filter(|failure| failure.code == "SCRIPT_MISSING")?;
    let script = Path::new(missing.params.first()?).file_name()?.to_str()?;
    subject.lacks_script(script)
}

/// Collects the checks of one group.
struct Group<'a> {
    name: &'static str,
    checks: &'a mut Vec<Check>,
}

impl Group<'_> {
    fn add<F, R>(&mut self, title: impl Into<String>, needs: &[Need], run: F)
    where
        F: Fn(Arc<Bench>) -> R + Send + Sync + 'static,
        R: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        self.checks.push(Check {
            group: self.name,
            title: title.into(),
            needs: needs.to_vec(),
            run: Arc::new(move |bench| Box::pin(run(bench))),
        });
    }
}

/// Adds the checks of a group.
type Collect = fn(&mut Group<'_>);

/// Every check there is.
#[must_use]
pub fn all_checks() -> Vec<Check> {
    let groups: &[(&'static str, Collect)] = &[
        ("golden", golden::checks),
        ("plugin", plugin::checks),
        ("features", features::checks),
        ("sr", sr::checks),
        ("sr faults", sr_faults::checks),
        ("volume", volume::checks),
        ("volume copy", volume_copy::checks),
        ("twice", twice::checks),
        ("order", order::checks),
        ("crowd", crowd::checks),
        ("data", data::checks),
        ("compose", compose::checks),
        ("nonpersistent", nonpersistent::checks),
        ("live", live::checks),
        ("changed blocks", cbt::checks),
        ("mirror", mirror::checks),
        ("mirror's end", mirror_end::checks),
        ("copy", copy::checks),
        ("task", task::checks),
        ("import", import::checks),
        ("process", process::checks),
        ("bad input", bad_input::checks),
        ("size", bad_size::checks),
        ("layout", own_layout::checks),
        ("self-test", self_test::checks),
        ("quicktest", quicktest::checks),
        ("xcp-ng-tests", xcp_ng::checks),
    ];
    let mut checks = Vec::new();
    for &(name, collect) in groups {
        collect(&mut Group { name, checks: &mut checks });
    }
    checks
}
