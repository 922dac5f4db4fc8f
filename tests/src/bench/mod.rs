//! Measures the plugins, each figure against a reference in the same run, and says which bars are reached.
//!
//! ```text
//!   Settings ── run ── a group: calls, scale, mirror, tree, snapshot, cluster
//!                        │ alternating: the thing itself, its reference, the thing, …
//!                        └ Figures: samples, reference, bar
//!   Report ── table on the terminal, JSON with every sample, charts as SVG
//! ```
//!
//! docs/performance.md says what each figure means.

mod call;
mod calls;
mod cluster;
mod crowd;
mod daemon;
mod datapath;
mod ext4;
mod figure;
mod machine;
mod many;
mod memory;
mod mirror;
mod qmp;
mod random;
mod relay;
mod report;
mod scale;
mod site;
mod snapshot;
mod sparse;
mod svg;
mod tree;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;

use crate::scenario::{Layout, Stage};

pub use figure::{Bar, Figure, Samples, Unit, Verdict};
pub use machine::Machine;
pub use report::{Chart, Measured, Report};
pub use scale::Scale;
pub use svg::well_formed;

/// What can be measured alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Single calls, calls at once, memory.
    Calls,
    /// Calls on SRs of many volumes.
    Scale,
    /// Whole mirrors.
    Mirror,
    /// The reference tree.
    Tree,
    /// Snapshots under a guest.
    Snapshot,
    /// Cluster sizes, which a choice is made by; not among those that have a bar to reach.
    Cluster,
}

impl Group {
    /// The groups with bars to reach.
    pub const ALL: [Self; 5] = [Self::Calls, Self::Scale, Self::Snapshot, Self::Mirror, Self::Tree];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Calls => "calls",
            Self::Scale => "scale",
            Self::Mirror => "mirror",
            Self::Tree => "tree",
            Self::Snapshot => "snapshot",
            Self::Cluster => "cluster",
        }
    }
}

/// What to measure, with what, and where.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The directory of the two executables.
    pub binaries: PathBuf,
    /// Where hosts and SRs are made: a directory with a short path.
    pub place: PathBuf,
    /// How much of everything.
    pub scale: Scale,
    /// What to measure.
    pub groups: Vec<Group>,
}

impl Settings {
    /// Makes the hosts, one or two, with their /run in memory where the machine has such a file system: on a real host it
    /// is.
    async fn stage(&self, one_host: bool) -> Result<Stage> {
        let memory = Some(Path::new("/dev/shm")).filter(|memory| memory.is_dir());
        let (binaries, place) = (&self.binaries, &self.place);
        Stage::laid_out(&Layout { binaries, one_host, place, memory, verify: false }).await
    }
}

/// Measures; `tell` is told each group before it begins.
///
/// A group that cannot be measured to its end says why in the report, and the others are measured all the same.
pub async fn run(settings: &Settings, mut tell: impl FnMut(Group)) -> Report {
    let began = Instant::now();
    let mut report = Report {
        machine: Machine::look(&settings.place),
        scale: settings.scale.name.to_owned(),
        seconds: 0.0,
        load_at_end: String::new(),
        groups: Vec::new(),
    };
    for group in &settings.groups {
        tell(*group);
        let began = Instant::now();
        let mut measured = Measured { group: group.name().to_owned(), ..Measured::default() };
        let result = match group {
            Group::Calls => calls::measure(settings, &mut measured).await,
            Group::Scale => many::measure(settings, &mut measured).await,
            Group::Mirror => mirror::measure(settings, &mut measured).await,
            Group::Tree => tree::measure(settings, &mut measured).await,
            Group::Snapshot => snapshot::measure(settings, &mut measured).await,
            Group::Cluster => cluster::measure(settings, &mut measured).await,
        };
        measured.failed = result.err().map(|error| format!("{error:#}"));
        measured.seconds = began.elapsed().as_secs_f64();
        report.groups.push(measured);
    }
    report.load_at_end = Machine::look(&settings.place).load;
    report.seconds = began.elapsed().as_secs_f64();
    report
}

/// Takes so many samples of two things in turn, so that whatever else the machine does meets both. A first round, which
/// finds caches cold, is thrown away, unless there is to be only one.
async fn in_turn(
    runs: usize,
    mut one: impl AsyncFnMut() -> Result<f64>,
    mut other: impl AsyncFnMut() -> Result<f64>,
) -> Result<(Vec<f64>, Vec<f64>)> {
    if runs > 1 {
        one().await?;
        other().await?;
    }
    by_turns(runs, one, other).await
}

/// The same without a first round to get warm, for what takes so long that it hardly matters.
async fn by_turns(
    runs: usize,
    mut one: impl AsyncFnMut() -> Result<f64>,
    mut other: impl AsyncFnMut() -> Result<f64>,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let (mut ones, mut others) = (Vec::with_capacity(runs), Vec::with_capacity(runs));
    for _ in 0..runs {
        ones.push(one().await?);
        others.push(other().await?);
    }
    Ok((ones, others))
}
