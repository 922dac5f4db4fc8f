//! The executable: runs a migration or the conformance suite, shows it while it runs, and says whether everything holds.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use fake_xapi::bench::{self, Scale};
use fake_xapi::conformance;
use fake_xapi::demo::{History, bars};
use fake_xapi::page;
use fake_xapi::plan::Plan;
use fake_xapi::scenario::{self, FailAt, Settings, Subject};
use fake_xapi::sxm::Flow;
use tracing_subscriber::EnvFilter;

/// Plays xapi against a SMAPIv3 plugin: migrates VMs with their snapshots and checks every byte.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Migrates the worked example: five nodes, each with a real file system of its own.
    Demo(Run),
    /// Judges a SMAPIv3 plugin: one line a rule, and the exit status says whether all are kept.
    Conformance(Judge),
    /// Measures the plugins, each figure against a reference in the same run.
    Bench(Bench),
    /// Migrates whatever tree a plan makes.
    Migrate {
        /// The plan, as JSON.
        #[arg(long, value_name = "FILE")]
        plan: PathBuf,
        #[command(flatten)]
        run: Run,
    },
}

/// Which plugin the conformance suite judges, and by what.
#[derive(Args)]
struct Judge {
    /// Where the plugins are: a directory with `volume/` and `datapath/`, or one with `usr/libexec/xapi-storage-script/`.
    #[arg(long, value_name = "DIR")]
    root: PathBuf,
    /// The volume plugin: its SR type, or its directory's name.
    #[arg(long, value_name = "NAME")]
    volume: String,
    /// The device-config of an SR, once for each key; `{dir}` in a value stands for an empty directory.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    config: Vec<(String, String)>,
    /// Makes only the checks that have this in their group or title; several times for several.
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,
    /// Where the report goes, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How many checks are made at once; for another project's plugin one, if not given.
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Runs every script by the observer, as xapi does with tracing on.
    #[arg(long)]
    traced: bool,
}

/// What is measured, and where it is told.
#[derive(Args)]
struct Bench {
    /// What to measure.
    #[arg(value_enum, default_value = "all")]
    group: GroupName,
    /// Where all samples and the machine's facts go, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where the charts go, as SVG.
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
    /// How much of everything; figures of the small scale mean nothing.
    #[arg(long, value_enum, default_value = "full")]
    scale: ScaleName,
    /// Where hosts and SRs are made: a directory with a short path.
    #[arg(long, value_name = "DIR", default_value = "/tmp")]
    place: PathBuf,
    /// The directory of the plugins' executables; that of this one if not given.
    #[arg(long, value_name = "DIR")]
    binaries: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum ScaleName {
    /// Enough for figures: about ten minutes.
    Full,
    /// Enough to see that everything works.
    Small,
}

#[derive(Clone, Copy, ValueEnum)]
enum GroupName {
    /// Single calls, calls at once, memory.
    Calls,
    /// Whole mirrors.
    Mirror,
    /// The reference tree.
    Tree,
    /// Snapshots under a guest.
    Snapshot,
    /// SRs of many volumes.
    Scale,
    /// Cluster sizes; not among all.
    Cluster,
    /// All that has a bar to reach.
    All,
}

impl GroupName {
    fn groups(self) -> Vec<bench::Group> {
        vec![match self {
            Self::Calls => bench::Group::Calls,
            Self::Mirror => bench::Group::Mirror,
            Self::Tree => bench::Group::Tree,
            Self::Snapshot => bench::Group::Snapshot,
            Self::Scale => bench::Group::Scale,
            Self::Cluster => bench::Group::Cluster,
            Self::All => return bench::Group::ALL.to_vec(),
        }]
    }
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("it has no =")?;
    Ok((key.to_owned(), value.to_owned()))
}

#[derive(Args)]
struct Run {
    /// How snapshots travel.
    #[arg(long, value_enum, default_value = "tree")]
    flow: FlowName,
    /// Where the report goes, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where a page goes that shows what happened, as one file of HTML.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Makes one script call fail: SIDE:METHOD[:N], like `destination:Volume.snapshot:2`.
    #[arg(long, value_name = "CALL")]
    fail: Option<FailAt>,
    /// Source and destination are two SRs of one host.
    #[arg(long)]
    one_host: bool,
    /// Has the plugins compare source and destination after each mirror that sent only a difference.
    #[arg(long)]
    verify: bool,
    /// The directory of the plugins' executables; that of this one if not given.
    #[arg(long, value_name = "DIR")]
    binaries: Option<PathBuf>,
    /// Where the plugins are installed, as for `conformance`.
    #[arg(long, value_name = "DIR", conflicts_with = "binaries")]
    root: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum FlowName {
    /// The live leaf is mirrored, each snapshot copied alone.
    Leaf,
    /// The tree is walked depth first.
    Tree,
    /// Each volume is copied into a clone of its parent's copy.
    Base,
}

impl From<FlowName> for Flow {
    fn from(name: FlowName) -> Self {
        match name {
            FlowName::Leaf => Flow::Leaf,
            FlowName::Tree => Flow::Tree,
            FlowName::Base => Flow::Base,
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let result = match Cli::parse().command {
        Command::Demo(run) => demo(&run).await,
        Command::Conformance(judge) => conformance(&judge).await,
        Command::Bench(bench) => measure(&bench).await,
        Command::Migrate { plan, run } => migrate(&plan, &run).await,
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "fake-xapi: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn demo(run: &Run) -> Result<bool> {
    let history = tokio::task::spawn_blocking(History::make).await?.context("the example's file systems")?;
    perform(Subject::Example(history), "the worked example", run).await
}

async fn conformance(judge: &Judge) -> Result<bool> {
    let mut subject = conformance::Subject::at(&judge.root, &judge.volume, judge.config.clone()).await?;
    subject.traced = judge.traced;
    let jobs = match judge.jobs {
        Some(jobs) => jobs,
        // What one check leaves running may disturb another, unless each has a host of its own.
        None if subject.own_layout => std::thread::available_parallelism().map_or(1, usize::from),
        None => 1,
    };
    let mut stdout = std::io::stdout();
    let mut tell =
        |line: &dyn std::fmt::Display| writeln!(stdout, "{line}").context("cannot write to standard output");
    let checks = conformance::suite::select(&judge.only)?;
    let report = conformance::suite::run(&subject, checks, jobs, |verdict| tell(verdict)).await?;
    if let Some(path) = &judge.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    tell(&report.tally)?;
    Ok(report.tally.failed == 0)
}

/// Measures, tells, writes; true if everything could be measured, whatever the figures are.
async fn measure(args: &Bench) -> Result<bool> {
    let settings = bench::Settings {
        binaries: binaries(args.binaries.as_deref())?,
        place: args.place.clone(),
        scale: match args.scale {
            ScaleName::Full => Scale::full(),
            ScaleName::Small => Scale::small(),
        },
        groups: args.group.groups(),
    };
    let run = bench::run(&settings, |group| {
        // Only to be seen while it runs.
        let _ = writeln!(std::io::stderr(), "measuring {} …", group.name());
    });
    let report = tokio::select! {
        report = run => report,
        // What is dropped here takes its processes and mounts with it.
        _ = tokio::signal::ctrl_c() => bail!("interrupted"),
    };
    writeln!(std::io::stdout(), "{report}").context("cannot write to standard output")?;
    if let Some(file) = &args.json {
        report.save(file)?;
    }
    if let Some(directory) = &args.plot {
        report.plot(directory)?;
    }
    Ok(report.complete())
}

async fn migrate(plan: &PathBuf, run: &Run) -> Result<bool> {
    let json = std::fs::read(plan).with_context(|| format!("cannot read {}", plan.display()))?;
    let title = plan.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let plan = Plan::parse(&json).with_context(|| plan.display().to_string())?;
    perform(Subject::of(plan)?, &title, run).await
}

/// Runs, tells people on standard output, writes the report; true if everything holds.
async fn perform(subject: Subject, title: &str, run: &Run) -> Result<bool> {
    let settings = Settings {
        binaries: match &run.root {
            Some(root) => std::path::absolute(root)?,
            None => binaries(run.binaries.as_deref())?,
        },
        flow: run.flow.into(),
        one_host: run.one_host,
        verify: run.verify,
        poll: None,
        place: "/tmp".into(),
        story: run.report.as_ref().map(|_| title.to_owned()),
        fail: run.fail.clone(),
    };
    let outcome = scenario::run(subject, &settings, bars()).await?;
    writeln!(std::io::stdout(), "{outcome}").context("cannot write to standard output")?;
    if let Some(path) = &run.json {
        std::fs::write(path, outcome.report.to_json()?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let (Some(path), Some(story)) = (&run.report, &outcome.story) {
        std::fs::write(path, page::render(&outcome.report, story))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(outcome.report.ok)
}

fn binaries(directory: Option<&Path>) -> Result<PathBuf> {
    let directory = match directory {
        Some(directory) => directory.to_owned(),
        None => std::env::current_exe()?.parent().context("this executable is nowhere")?.to_owned(),
    };
    for name in ["xapi-storage-qcow2-volume", "xapi-storage-qcow2-datapath"] {
        let path = directory.join(name);
        ensure!(path.exists(), "{} is missing: build the workspace, or say --binaries", path.display());
    }
    Ok(directory)
}
