//! docs/errors.md against the plugins: each row's condition is made, and the answer has its code and parameters.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod conditions;
mod mount;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use fake_xapi::conformance::{Bench, Subject};
use fake_xapi::wire::Failure;

/// One row of the table.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Row {
    code: String,
    parameters: String,
    when: String,
    remedy: String,
}

fn rows() -> Vec<Row> {
    let text = include_str!("../../../docs/errors.md");
    let table = text.lines().skip_while(|line| !line.starts_with("| code |")).skip(2);
    let row = |line: &str| {
        let cells: Vec<&str> =
            line.trim_matches('|').split(" | ").map(|cell| cell.trim_matches([' ', '|'])).collect();
        let cell = |at: usize| cells.get(at).copied().unwrap_or_default().to_owned();
        Row { code: cell(0).replace('`', ""), parameters: cell(1), when: cell(2), remedy: cell(3) }
    };
    table.take_while(|line| line.starts_with('|')).map(row).collect()
}

/// Sees that parameters are those of a cell: a text in quotes or backticks as it is, words for anything.
fn same_parameters(cell: &str, parameters: &[String]) -> bool {
    let expected: Vec<&str> = cell.split(", ").collect();
    expected.len() == parameters.len()
        && expected.iter().zip(parameters).all(|(expected, found)| match expected.trim() {
            "\"\"" => found.is_empty(),
            exact if exact.starts_with('`') => exact.trim_matches('`') == found,
            _ => !found.is_empty(),
        })
}

/// Tells whether a message says what to do, in the words of a cell, with anything where it has `<…>`.
fn says(message: &str, remedy: &str) -> bool {
    let words = remedy.split('<').enumerate().map(|(at, part)| match part.split_once('>') {
        Some((_, rest)) if at > 0 => rest,
        _ => part,
    });
    let mut rest = message;
    !remedy.is_empty()
        && words.into_iter().all(|words| {
            let found = rest.find(words);
            rest = found.map_or("", |at| &rest[at + words.len()..]);
            found.is_some()
        })
}

#[test]
fn a_message_is_held_against_the_words_of_its_cell() {
    assert!(says("disk x is full; free space, or ask", "free space"));
    assert!(says("wrong: see 'check /sr' first", "see 'check <sr>' first"));
    assert!(!says("wrong: see 'check /sr'", "see 'check <sr>' first"));
    assert!(!says("first see 'check /sr'", "see 'check <sr>' first"));
    assert!(!says("anything", ""));
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

async fn subject() -> Result<Subject> {
    let own = Path::new(env!("CARGO_BIN_EXE_fake-xapi")).parent().context("it is in a directory")?;
    Subject::ours(own.to_owned()).await
}

#[test]
fn every_row_has_a_condition_and_every_condition_a_row() {
    let rows: BTreeSet<String> = rows().into_iter().map(|row| row.when).collect();
    let conditions: BTreeSet<String> = conditions::all().iter().map(|condition| condition.when.to_owned()).collect();
    assert_eq!(rows, conditions);
    assert!(rows.len() > 25, "the table was not found");
}

#[test]
fn every_condition_gives_the_code_and_parameters_of_its_row() {
    let failed: Vec<String> = runtime().block_on(async {
        let subject = subject().await.unwrap();
        let mut running = Vec::new();
        for condition in conditions::all() {
            let subject = subject.clone();
            running.push(tokio::spawn(async move {
                let outcome = one(&subject, &condition).await;
                outcome.err().map(|error| format!("{}: {error:#}", condition.when))
            }));
        }
        let mut failed = Vec::new();
        for condition in running {
            failed.extend(condition.await.unwrap());
        }
        failed
    });
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

async fn one(subject: &Subject, condition: &conditions::Condition) -> Result<()> {
    if condition.mounts && !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let bench = Arc::new(Bench::new(subject).await?);
    let failure: Result<Failure> = (condition.make)(Arc::clone(&bench)).await;
    bench.end_what_is_left().await;
    let failure = failure?;
    let rows = rows();
    let row = rows.iter().find(|row| row.when == condition.when).context("the condition has no row")?;
    ensure!(failure.code == row.code, "the answer is {failure}, the row says {}", row.code);
    ensure!(same_parameters(&row.parameters, &failure.params), "the answer is {failure}, the row {}", row.parameters);
    if row.parameters.contains("the message") {
        let message = failure.params.join("");
        ensure!(says(&message, &row.remedy), "{message:?} does not say: {}", row.remedy);
    }
    Ok(())
}
