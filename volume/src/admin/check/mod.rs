//! `check`: what in an SR does not agree, and what can be put right of it.
//!
//! ```text
//!   records, files, symlinks      plugin::store        settled under each tree's lock
//!   claims, daemons               claims, runtime      of this host
//!   images                        images               by qemu-img, where nobody writes
//! ```
//!
//! A repair is followed by a second examination: what that does not find any more was repaired, whatever the repair says
//! of itself.

mod claims;
mod images;
mod report;
mod runtime;

use std::path::Path;

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::store::{Finding, Severity, Sr};

use crate::arguments::Options;
use crate::place;
use report::Report;

/// Everything that was found, and what was looked at.
#[derive(Debug, Default)]
struct Findings {
    list: Vec<Finding>,
    trees: usize,
    images: usize,
    /// Images that somebody may write to, which were not looked into.
    passed_over: usize,
}

/// Checks an SR and, where it is asked for, repairs it. Gives the report, and whether all is well in the end.
///
/// # Errors
///
/// When there is nothing that could be an SR, or this host itself cannot be asked.
pub fn execute(host: &Host, sr: &Path, options: Options) -> Result<(String, bool)> {
    let path = place::path_of(host, sr)?;
    let mut done = Vec::new();
    let mut before = examine(host, &path, options)?;
    let report = if options.repair && before.list.iter().any(|finding| finding.is_repairable) {
        repair(host, &path, options, &before, &mut done);
        let after = examine(host, &path, options)?;
        before.list.sort_by(order);
        Report::of_repair(&path, before, after, done)
    } else {
        before.list.sort_by(order);
        Report::of(&path, before)
    };
    let is_well = report.is_well();
    Ok((if options.json { report.json()? } else { report.text() }, is_well))
}

/// The worst first, and then by place.
fn order(one: &Finding, other: &Finding) -> std::cmp::Ordering {
    (other.severity, &one.place, &one.what).cmp(&(one.severity, &other.place, &other.what))
}

/// Finds what is wrong now.
fn examine(host: &Host, path: &Path, options: Options) -> Result<Findings> {
    let mut found = Findings::default();
    let sr = match Sr::open(path) {
        Ok(sr) => sr,
        Err(error) => {
            found.list.push(without_record(host, path, error)?);
            return Ok(found);
        }
    };
    let examined = match sr.examine(host) {
        Ok(examined) => examined,
        Err(error @ Error::SrUnavailable { .. }) => {
            let remedy = "mount the right file system, or put the directory back from a backup";
            found.list.push(Finding::new(Severity::Error, path, error.chain(), remedy));
            return Ok(found);
        }
        Err(error) => return Err(error),
    };
    found.trees = examined.trees.len() + examined.unreadable.len();
    found.list.extend(examined.findings);
    claims::examine(host, &sr, &examined.trees, &mut found.list)?;
    runtime::examine(host, &sr, &examined.trees, examined.unreadable.is_empty(), &mut found.list)?;
    if !options.fast {
        images::examine(host, &sr, &examined.trees, &mut found)?;
    }
    Ok(found)
}

/// Says what is wrong with a directory that has no record of an SR that can be read.
fn without_record(host: &Host, path: &Path, error: Error) -> Result<Finding> {
    let record = path.join("sr.json");
    let what = match &error {
        Error::SrUnavailable { reason, .. } | Error::DamagedRecord { reason, .. } => reason.clone(),
        error => error.chain(),
    };
    Ok(match error {
        Error::NewerFormat { .. } => {
            Finding::new(Severity::Error, &record, what, "install the version that wrote it")
        }
        Error::DamagedRecord { .. } | Error::SrUnavailable { .. } if Sr::remembered(host, path)?.is_some() => {
            let repair = "made anew from what this host attached; what is there now is kept as sr.json.damaged";
            Finding::repairable(Severity::Error, &record, what, repair)
        }
        Error::DamagedRecord { .. } | Error::SrUnavailable { .. } => {
            let remedy = "mount the file system if it is not mounted; if the file was lost, check on a host that has the SR attached, or write it by hand (docs/commands.md)";
            Finding::new(Severity::Error, &record, what, remedy)
        }
        _ => Finding::new(Severity::Error, &record, what, "see the kernel's log for the file system's errors"),
    })
}

/// Puts right what leaves no doubt. What fails is said in `done`, and found again by the next examination.
fn repair(host: &Host, path: &Path, options: Options, before: &Findings, done: &mut Vec<String>) {
    let mut failed = |what: &str, result: Result<()>| {
        if let Err(error) = result {
            done.push(format!("{what}: {}", error.chain()));
        }
    };
    let sr = match Sr::open(path).or_else(|_| Sr::restore(host, path)) {
        Ok(sr) => sr,
        Err(error) => return failed("sr.json", Err(error)),
    };
    let examined = match sr.examine(host) {
        Ok(examined) => examined,
        Err(error) => return failed("the SR", Err(error)),
    };
    let mut rebuilt = Vec::new();
    for id in &examined.unreadable {
        match sr.rebuild_tree(host, *id) {
            Ok(Some(made)) => rebuilt.push((*id, made)),
            Ok(None) => {}
            Err(error) => failed(&format!("tree {id}"), Err(error)),
        }
    }
    for id in examined.mendable.iter().chain(rebuilt.iter().map(|(id, _)| id)) {
        failed(&format!("tree {id}"), sr.mend_tree(host, *id));
    }
    // The symlinks of volumes whose trees have nothing else wrong.
    failed("the symlinks", relink(host, &sr, &examined.trees));
    failed("what is left over", sr.mend_rest(host));
    failed("claims", claims::repair(host, &sr));
    failed("this host's records", runtime::repair(host, &sr));
    // A header is changed only where no volume is active, which claims that are taken back by now may have said.
    for id in &examined.mendable {
        failed(&format!("tree {id}"), sr.mend_tree(host, *id));
    }
    if !options.fast {
        failed("images", images::repair(host, &sr, &before.list));
    }
    done.dedup();
    for (id, made) in rebuilt {
        done.push(report::of_rebuilt(id, &made));
    }
}

/// Makes symlinks lead to their trees where they do not.
fn relink(host: &Host, sr: &Sr, trees: &[plugin::store::LoadedTree]) -> Result<()> {
    for loaded in trees.iter().filter(|loaded| !sr.has_links(loaded)) {
        sr.mend_tree(host, loaded.id)?;
    }
    Ok(())
}
