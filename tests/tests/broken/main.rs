//! Every check can fail: plugins that break one rule each, and the check that is meant to catch it does.
//!
//! A broken plugin is this workspace's behind a wrapper, which is this very executable called by a method's name: it reads
//! the request, runs the plugin's executable, and changes what its fault says. A check has to fail, and for the fault's
//! reason.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod answers;
mod compose;
mod copies;
mod datapaths;
mod faults;
mod srs;
mod volumes;
mod wrapper;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use fake_xapi::conformance::{Check, Outcome, Subject, all_checks};
use fake_xapi::host::PluginSource;
use libtest_mimic::{Arguments, Failed, Trial};

use faults::Fault;

/// The executables, and the directories that their links are in.
const PLUGINS: [(&str, &str); 2] = [
    ("xapi-storage-qcow2-volume", "volume/org.xen.xapi.storage.qcow2"),
    ("xapi-storage-qcow2-datapath", "datapath/qsd"),
];

fn main() -> Result<ExitCode> {
    let own_name = std::env::args_os().next().context("there is no argv[0]")?;
    if let Some(code) = wrapper::called_as(Path::new(&own_name))? {
        return Ok(code);
    }
    let arguments = Arguments::from_args();
    let mut trials = vec![
        Trial::test("there are at least forty broken plugins, and each breaks something of its own", forty),
        Trial::test("the wrapper alone breaks nothing", || expect(None).map_err(failed)),
    ];
    for fault in faults::all() {
        trials.push(Trial::test(fault.breaks, move || expect(Some(&fault)).map_err(failed)));
    }
    Ok(libtest_mimic::run(&arguments, trials).exit_code())
}

fn failed(error: anyhow::Error) -> Failed {
    Failed::from(format!("{error:#}"))
}

fn forty() -> Result<(), Failed> {
    let faults = faults::all();
    let names: BTreeSet<_> = faults.iter().map(|fault| fault.breaks).collect();
    if names.len() < 40 || names.len() != faults.len() {
        return Err(Failed::from(format!("{} faults with {} names", faults.len(), names.len())));
    }
    Ok(())
}

/// Sees that a broken plugin is caught by its check, or that the wrapper without a fault passes a check of each kind.
fn expect(fault: Option<&Fault>) -> Result<()> {
    let directory = tempfile::Builder::new().prefix("fx-").tempdir_in("/tmp")?;
    install(directory.path(), fault)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let config = vec![("uri".to_owned(), "file://{dir}".to_owned())];
        let plugins = PluginSource::Existing(directory.path().to_owned());
        let subject = Subject::discover(plugins, "qcow2", config, true).await?;
        let Some(fault) = fault else {
            for title in [faults::CREATE, faults::ISOLATION, faults::UNKNOWN, faults::SAME_ANSWER] {
                let outcome = check(title)?.run(&subject).await;
                ensure!(outcome == Outcome::Passed, "{title}: {outcome:?}");
            }
            return Ok(());
        };
        match check(fault.check)?.run(&subject).await {
            Outcome::Failed(how) if how.contains(fault.sign) => Ok(()),
            Outcome::Failed(how) => bail!("it was caught, but {:?} is not in the reason: {how}", fault.sign),
            outcome => bail!("it was not caught by {:?}: {outcome:?}", fault.check),
        }
    })
}

fn check(name: &str) -> Result<Check> {
    let found = all_checks().into_iter().find(|check| format!("{check:?}") == name);
    found.with_context(|| format!("there is no check {name:?}"))
}

/// Makes a root whose scripts are all this executable.
fn install(root: &Path, fault: Option<&Fault>) -> Result<()> {
    let own = std::env::current_exe()?;
    let binaries = own.parent().and_then(Path::parent).context("a test is built into target/<profile>/deps")?;
    for (binary, directory) in PLUGINS {
        let binary = binaries.join(binary);
        let directory = root.join(directory);
        std::fs::create_dir_all(&directory)?;
        let listed = Command::new(&binary).arg("--list-methods").output();
        let listed = listed.with_context(|| format!("cannot run {}: build the workspace", binary.display()))?;
        for method in String::from_utf8(listed.stdout)?.lines() {
            if fault.is_none_or(|fault| fault.without != method) {
                std::os::unix::fs::symlink(&own, directory.join(method))?;
            }
        }
        std::fs::write(directory.join("observer.py"), include_str!("../../../packaging/observer.py"))?;
    }
    let notes: PathBuf = root.join("notes");
    std::fs::create_dir(&notes)?;
    wrapper::Settings {
        fault: fault.map_or("", |fault| fault.breaks).to_owned(),
        binaries: binaries.to_owned(),
        notes,
    }
    .write(root)
}
