//! Every call that changes something, after every short history, struck at each of the system calls by which it does so.
//!
//! A call is killed there, or the system call fails for want of space or with an input or output error. After that the
//! volumes are as they were before the call or as they are to be after it, and nothing else ever; the same call again is
//! carried out; and when all is closed, every byte is right, every image sound, and nothing is left over
//! ([`world::World::end`] looks at all of it).
//!
//! A few histories and strikes are tried, the same on each run; FAKE_XAPI_SEED chooses others, FAKE_XAPI_STEPS how many
//! histories, and `all` stands for every history of up to three operations and every strike. FAKE_XAPI_CASE is one case.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test ends where it fails")]

mod operation;
mod site;
mod world;

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail, ensure};

use fake_xapi::conformance::random::Random;
use operation::Operation;
use site::{Outcome, Strike};
use world::World;

/// How many histories are tried for each last operation without FAKE_XAPI_STEPS.
const HISTORIES: usize = 1;

/// How many of the strikes on the last operation of each, unless all are.
const STRIKES: usize = 5;

/// Cases that are tried at once.
const AT_ONCE: usize = 2;

/// What comes before the last operation.
type History = Vec<Operation>;

/// Chooses some of many.
fn take<T>(random: &mut Random, mut from: Vec<T>, count: usize) -> Vec<T> {
    while from.len() > count {
        from.swap_remove(random.below(from.len()));
    }
    from
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// All histories of up to two operations, one for each state that they lead to.
fn histories(small: &World) -> Vec<History> {
    let one = Operation::ALL.iter().map(|operation| vec![*operation]);
    let two = Operation::ALL.iter().flat_map(|first| Operation::ALL.iter().map(|second| vec![*first, *second]));
    let mut known = BTreeSet::new();
    let mut kept = Vec::new();
    for history in std::iter::once(Vec::new()).chain(one).chain(two) {
        let world = World::after(small, &history).unwrap();
        if known.insert(world.shape().unwrap()) {
            kept.push(history);
        }
        world.end().unwrap();
    }
    kept
}

fn told(history: &[Operation], last: Operation, strike: &Strike) -> String {
    let mut words: Vec<String> = history.iter().chain([&last]).map(|operation| format!("{operation:?}")).collect();
    words.push(strike.to_string());
    words.join(" ")
}

/// Strikes the last call of a history once.
fn struck(small: &World, history: &[Operation], last: Operation, strike: &Strike) -> Result<()> {
    let mut world = World::after(small, history)?;
    let before = world.model.clone();
    let after = last.effect(&before, history.len());
    let outcome = match strike {
        Strike::Daemon => world.write_and_kill(history.len()).map(|()| Outcome::Done)?,
        _ => world.strike(last, strike)?,
    };
    world.site.wait_for_orphans();
    let wanted = after.clone().unwrap_or_else(|| before.clone());
    let is_after = world.look(&before, &wanted)?;
    match &outcome {
        Outcome::Killed => {}
        Outcome::Done if after.is_none() => bail!("what is to be refused was done"),
        Outcome::Done => ensure!(is_after || before == wanted, "it was said to be done, and is not"),
        Outcome::Refused(code) => {
            let is_full = matches!(strike, Strike::Call { how, .. } if how == "error=ENOSPC");
            let is_right = after.is_none() || !is_full || code == "SR_BACKEND_FAILURE_44";
            ensure!(is_right, "a full file system is told as {code}");
        }
    }
    if *strike == Strike::Daemon {
        world.model = wanted;
    } else {
        // The caller has had no answer, or a wrong one, and asks again.
        world.model = if is_after { wanted } else { before };
        world.repeat(last, history.len(), is_after, &outcome).with_context(|| format!("again, after {outcome:?}"))?;
    }
    world.end()
}

/// Chooses what is tried: the histories, each with its last operation and the strikes on it.
fn chosen(small: &World) -> Vec<(History, Operation, Strike)> {
    let all = variable("FAKE_XAPI_STEPS").is_some_and(|value| value == "all");
    let count = variable("FAKE_XAPI_STEPS").and_then(|value| value.parse().ok()).unwrap_or(HISTORIES);
    let mut random = Random::from_seed(variable("FAKE_XAPI_SEED").map_or(1, |seed| seed.parse().unwrap()));
    let known = if all { histories(small) } else { Vec::new() };
    let mut chosen = Vec::new();
    for last in Operation::ALL {
        let before: Vec<History> = if all {
            known.clone()
        } else {
            let one = |random: &mut Random| *random.pick(&Operation::ALL);
            (0..count).map(|_| vec![one(&mut random), one(&mut random)]).collect()
        };
        for history in before {
            let strikes = World::strikes(small, &history, last)
                .unwrap_or_else(|error| panic!("{history:?} {last:?}: {error:#}"));
            let strikes = if all { strikes } else { take(&mut random, strikes, STRIKES) };
            chosen.extend(strikes.into_iter().map(|strike| (history.clone(), last, strike)));
        }
    }
    chosen
}

#[test]
fn a_call_struck_at_any_step_is_done_or_not_and_can_be_repeated() {
    let small = World::small().unwrap();
    let only = variable("FAKE_XAPI_CASE");
    let cases = match &only {
        Some(case) => vec![world::parse(case).unwrap()],
        None => chosen(&small),
    };
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(cases.len()) {
            scope.spawn(|| {
                while let Some((history, last, strike)) = cases.get(next.fetch_add(1, Ordering::SeqCst)) {
                    if let Err(error) = struck(&small, history, *last, strike) {
                        let told = format!("FAKE_XAPI_CASE='{}': {error:#}", told(history, *last, strike));
                        eprintln!("{told}");
                        failed.lock().unwrap().push(told);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    println!("{} cases", cases.len());
    assert!(
        failed.is_empty(),
        "{} of {} cases failed; one alone: FAKE_XAPI_CASE='<case>' cargo test -p fake-xapi --test steps\n{}",
        failed.len(),
        cases.len(),
        failed.join("\n")
    );
}
