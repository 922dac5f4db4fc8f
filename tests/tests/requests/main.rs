//! Requests that nobody should send, through the real executables: each is answered or refused in a well-formed way and in
//! time, and what was refused has changed nothing.
//!
//! The requests are the golden exchanges, about things that are there, mutated: types swapped, fields dropped, doubled and
//! unknown, strings long and hostile, paths that lead elsewhere, numbers of all kinds, deep nesting, bytes that are no UTF-8,
//! half of a request and none at all. `FAKE_XAPI_REQUESTS` is how many of each method, `FAKE_XAPI_SEED` chooses others. The
//! same, in the process and by the million, but of what is read alone, is `plugin/src/fuzz/request.rs`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod golden;
mod mutation;
mod picture;
mod site;

use std::collections::BTreeSet;

use fake_xapi::wire::{Failure, Json};

use mutation::Chance;
use site::{Outcome, Site};

/// How many requests of each method are tried if nothing else is asked for.
const ROUNDS: u64 = 4;

/// What an error may take, in bytes: nobody makes it grow.
const LONGEST: usize = 8000;

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |text| text.parse().expect("it is a number"))
}

#[test]
fn whatever_is_asked_is_answered_or_refused_and_what_is_refused_changes_nothing() {
    let (seed, rounds) = (number("FAKE_XAPI_SEED", 1), number("FAKE_XAPI_REQUESTS", ROUNDS));
    let codes = codes();
    let mut site = Site::new();
    let (mut wrong, mut refusals, mut answers) = (Vec::new(), 0, 0);
    let requests = golden::requests(&site.names);
    assert_eq!(requests.keys().cloned().collect::<BTreeSet<_>>(), site.methods(), "each method has a request");
    for (method, request) in &requests {
        for round in 0..rounds {
            let mut chance = Chance::new(seed, method, round);
            let others: Vec<&Json> = requests.values().collect();
            let bytes = mutation::mutated(request, &others, &mut chance);
            let outcome = site.call(method, &bytes);
            let is_refused = outcome.code != Some(0);
            if is_refused {
                refusals += 1
            } else {
                answers += 1
            }
            let judged = judge(&outcome, &codes).and_then(|()| site.settle(is_refused));
            if let Err(reason) = judged {
                let start = String::from_utf8_lossy(&bytes[..bytes.len().min(600)]).into_owned();
                let end = String::from_utf8_lossy(&outcome.stdout[..outcome.stdout.len().min(600)]).into_owned();
                wrong.push(format!("{method}, round {round}: {reason}\n  asked {start}\n  answered {end}"));
                site.restore();
            }
        }
    }
    assert!(wrong.is_empty(), "FAKE_XAPI_SEED={seed} FAKE_XAPI_REQUESTS={rounds}:\n{}", wrong.join("\n"));
    // Nearly all mutations are mistakes, and some are none.
    assert!(refusals > requests.len() && answers > 0, "{refusals} were refused, {answers} answered");
}

/// The codes of docs/errors.md.
fn codes() -> BTreeSet<&'static str> {
    let text = include_str!("../../../docs/errors.md");
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    rows.map(|(code, _)| code).collect()
}

/// Judges how a call ended: as xapi-storage-script would, and a little more strictly.
fn judge(outcome: &Outcome, codes: &BTreeSet<&str>) -> Result<(), String> {
    let said = String::from_utf8_lossy(&outcome.stderr);
    if said.contains("panicked at") {
        return Err(format!("it panicked: {said}"));
    }
    let answer = Json::parse(&outcome.stdout).map_err(|error| format!("its answer is no JSON: {error}"))?;
    match outcome.code {
        Some(0) => return Ok(()),
        Some(1) => {}
        code => return Err(format!("it ended with {code:?}, or not in time: {said}")),
    }
    let failure = Failure::decode(&answer).map_err(|error| format!("its error is malformed: {error}"))?;
    if !codes.contains(failure.code.as_str()) {
        return Err(format!("{} is no code of docs/errors.md", failure.code));
    }
    if outcome.stdout.len() > LONGEST || outcome.stderr.len() > LONGEST {
        return Err(format!("its error has {} and {} bytes", outcome.stdout.len(), outcome.stderr.len()));
    }
    Ok(())
}
