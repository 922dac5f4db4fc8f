//! What becomes of the calls that change something when they are struck, and when the power goes.
//!
//! [`struck`] strikes calls at their system calls, [`power`] cuts the power, [`broken`] breaks the disk, [`merging`] meets
//! merges half-way; all judge what is left by [`judge`].

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test ends where it fails")]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a test talks to people")]

mod broken;
mod device;
mod faulty;
mod held;
mod image;
mod judge;
mod log;
mod merging;
mod operation;
mod place;
mod power;
mod recorder;
mod site;
mod struck;
mod world;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use fake_xapi::conformance::random::Random;
use operation::Operation;
use site::Strike;

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

/// A source of numbers that FAKE_XAPI_SEED determines.
fn random() -> Random {
    Random::from_seed(variable("FAKE_XAPI_SEED").map_or(1, |seed| seed.parse().unwrap()))
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Does the same with each of many, some of them at once, and gives the results in their order.
fn in_parallel<T: Sync, R: Send>(all: &[T], each: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(all.len()) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::SeqCst);
                    let Some(one) = all.get(index) else { break };
                    let result = each(one);
                    results.lock().unwrap().push((index, result));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap();
    results.sort_unstable_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Tries each of many cases, and gives what came of them. Fails with all that failed, each as it is told, and with how one
/// of them is tried again.
fn try_all<C: Sync, R: Send>(
    cases: &[C],
    again: &str,
    told: impl Fn(&C) -> String + Sync,
    each: impl Fn(&C) -> anyhow::Result<R> + Sync,
) -> Vec<R> {
    let began = Instant::now();
    let results = in_parallel(cases, |case| {
        each(case).map_err(|error| {
            let told = format!("{}: {error:#}", told(case));
            eprintln!("{told}");
            told
        })
    });
    println!("{} cases in {:?}", cases.len(), began.elapsed());
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(result) => done.push(result),
            Err(told) => failed.push(told),
        }
    }
    assert!(failed.is_empty(), "{} of {} cases failed; {again}\n{}", failed.len(), cases.len(), failed.join("\n"));
    done
}

/// Reads a history as it is told.
fn parsed(history: &str) -> anyhow::Result<History> {
    history.split_whitespace().map(str::parse).collect()
}

fn told(history: &[Operation], last: Operation, strike: &Strike) -> String {
    let mut words: Vec<String> = history.iter().chain([&last]).map(|operation| format!("{operation:?}")).collect();
    words.push(strike.to_string());
    words.join(" ")
}
