//! The executable: runs a migration, shows it while it runs, and says whether everything holds.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use fake_xapi::demo::{History, bars};
use fake_xapi::plan::Plan;
use fake_xapi::scenario::{self, Settings, Subject};
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
    /// Migrates whatever tree a plan makes.
    Migrate {
        /// The plan, as JSON.
        #[arg(long, value_name = "FILE")]
        plan: PathBuf,
        #[command(flatten)]
        run: Run,
    },
}

#[derive(Args)]
struct Run {
    /// How snapshots travel.
    #[arg(long, value_enum, default_value = "tree")]
    flow: FlowName,
    /// Where the report goes, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Source and destination are two SRs of one host.
    #[arg(long)]
    one_host: bool,
    /// The directory of the plugins' executables; that of this one if not given.
    #[arg(long, value_name = "DIR")]
    binaries: Option<PathBuf>,
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
    perform(Subject::Example(history), run).await
}

async fn migrate(plan: &PathBuf, run: &Run) -> Result<bool> {
    let json = std::fs::read(plan).with_context(|| format!("cannot read {}", plan.display()))?;
    let plan = Plan::parse(&json).with_context(|| plan.display().to_string())?;
    perform(Subject::of(plan)?, run).await
}

/// Runs, tells people on standard output, writes the report; true if everything holds.
async fn perform(subject: Subject, run: &Run) -> Result<bool> {
    let settings = Settings {
        binaries: binaries(run)?,
        flow: run.flow.into(),
        one_host: run.one_host,
        poll: None,
        place: "/tmp".into(),
    };
    let outcome = scenario::run(subject, &settings, bars()).await?;
    writeln!(std::io::stdout(), "{outcome}").context("cannot write to standard output")?;
    if let Some(path) = &run.json {
        std::fs::write(path, outcome.report.to_json()?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(outcome.report.ok)
}

fn binaries(run: &Run) -> Result<PathBuf> {
    let directory = match &run.binaries {
        Some(directory) => directory.clone(),
        None => std::env::current_exe()?.parent().context("this executable is nowhere")?.to_owned(),
    };
    for name in ["xapi-storage-qcow2-volume", "xapi-storage-qcow2-datapath"] {
        let path = directory.join(name);
        ensure!(path.exists(), "{} is missing: build the workspace, or say --binaries", path.display());
    }
    Ok(directory)
}
