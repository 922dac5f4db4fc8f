//! The conformance suite against this workspace's plugin: every check is a test of its own.
//!
//! `cargo test --test conformance` runs it; any part of a check's group or title selects it, `--list` names them all. The
//! plugin's two executables have to be built before. `CONFORMANCE_SEED` repeats random choices.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use fake_xapi::conformance::{Outcome, Subject, all_checks};
use libtest_mimic::{Arguments, Failed, Trial};

fn main() -> Result<ExitCode> {
    let arguments = Arguments::from_args();
    let subject = Arc::new(runtime()?.block_on(Subject::ours(executables()?))?);
    let mut trials = Vec::new();
    for check in all_checks() {
        let obstacle = check.obstacle(&subject);
        let subject = Arc::clone(&subject);
        let mut name = format!("{}: {}", check.group, check.title);
        if let Some(obstacle) = &obstacle {
            name = format!("{name} (skipped: {obstacle})");
        }
        let run = move || match runtime()?.block_on(check.run(&subject)) {
            Outcome::Passed | Outcome::Skipped(_) => Ok(()),
            Outcome::Failed(how) => Err(Failed::from(how)),
        };
        trials.push(Trial::test(name, run).with_ignored_flag(obstacle.is_some()));
    }
    Ok(libtest_mimic::run(&arguments, trials).exit_code())
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// The target directory's profile that this test itself was built into.
fn executables() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let profile = own.parent().and_then(Path::parent).context("a test is built into target/<profile>/deps")?;
    Ok(profile.to_owned())
}
