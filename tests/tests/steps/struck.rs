//! Every call that changes something, after every short history, struck at each of the system calls by which it does so.
//!
//! A call is killed there, or the system call fails for want of space or with an input or output error. After that the
//! volumes are as they were before the call or as they are to be after it, and nothing else ever; the same call again is
//! carried out; and when all is closed, every byte is right, every image sound, and nothing is left over
//! ([`super::judge`] looks at all of it).
//!
//! A few histories and strikes are tried, the same on each run; FAKE_XAPI_SEED chooses others, FAKE_XAPI_STEPS how many
//! histories, and `all` stands for every history of up to three operations and every strike; with FAKE_XAPI_SHARE=`i/n`
//! for the i-th of n parts of that. FAKE_XAPI_CASE is one case.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use super::operation::Operation;
use super::site::{GC, Outcome, Site, Strike};
use super::world::{self, World};
use super::{History, in_parallel, random, take, told, try_all, variable};

/// How many histories are tried for each last operation without FAKE_XAPI_STEPS.
const HISTORIES: usize = 1;

/// How many of the strikes on the last operation of each, unless all are.
const STRIKES: usize = 5;

/// SRs at rest from which histories go on, by the histories that led to them.
struct Prepared(BTreeMap<History, World>);

impl Prepared {
    fn new() -> Result<Self> {
        Ok(Self(BTreeMap::from([(Vec::new(), World::small(Site::new(None)?)?)])))
    }

    /// Carries out a history, as far as it is not there already.
    fn after(&self, history: &[Operation]) -> Result<World> {
        let done = (0..=history.len()).rev().find(|done| self.0.contains_key(&history[..*done]));
        let done = done.context("there is no small SR")?;
        World::after(&self.0[&history[..done]], done, &history[done..])
    }

    /// Gives all histories of up to two operations, one for each state that they lead to, and keeps those that end at rest.
    fn histories(&mut self) -> Result<Vec<History>> {
        let mut known = BTreeSet::new();
        let mut kept: Vec<History> = Vec::new();
        let mut longest = vec![Vec::new()];
        for length in 0..=2 {
            let found = in_parallel(&longest, |history| -> Result<_> {
                let world = self.after(history)?;
                Ok((world.shape()?, (!world.model.active).then_some(world)))
            });
            let mut new = Vec::new();
            for (history, found) in longest.into_iter().zip(found) {
                let (shape, world) = found.with_context(|| format!("{history:?}"))?;
                if !known.insert(shape) {
                    continue;
                }
                if let Some(world) = world.filter(|_| !history.is_empty()) {
                    world.rest()?;
                    self.0.insert(history.clone(), world);
                }
                new.push(history);
            }
            kept.extend(new.iter().cloned());
            let longer = |history: &History| Operation::ALL.map(|last| [history.as_slice(), &[last]].concat());
            longest = if length < 2 { new.iter().flat_map(longer).collect() } else { Vec::new() };
        }
        Ok(kept)
    }
}

/// Strikes the last call of a history once.
fn struck(prepared: &Prepared, history: &[Operation], last: Operation, strike: &Strike) -> Result<()> {
    let mut world = prepared.after(history)?;
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
            let is_right = after.is_none() || !is_full || code == GC || code == "SR_BACKEND_FAILURE_44";
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

/// What is tried: a history, its last operation, and what strikes that.
type Case = (History, Operation, Strike);

/// Gives the strikes on each of several operations after their histories.
fn strikes(prepared: &Prepared, of: &[(History, Operation)]) -> Vec<(History, Operation, Vec<Strike>)> {
    let found = in_parallel(of, |(history, last)| prepared.after(history)?.strikes(*last, history.len()));
    let told = |((history, last), strikes): (&(History, Operation), Result<_>)| {
        let strikes = strikes.unwrap_or_else(|error| panic!("{history:?} {last:?}: {error:#}"));
        (history.clone(), *last, strikes)
    };
    of.iter().zip(found).map(told).collect()
}

/// Chooses histories, each with its last operation, and some of the strikes on that.
fn some(prepared: &Prepared) -> Vec<Case> {
    let count = variable("FAKE_XAPI_STEPS").and_then(|value| value.parse().ok()).unwrap_or(HISTORIES);
    let mut random = random();
    let mut one = || *random.pick(&Operation::ALL);
    let lasts = Operation::ALL.into_iter().flat_map(|last| vec![last; count]);
    let of: Vec<_> = lasts.map(|last| (vec![one(), one()], last)).collect();
    let all = strikes(prepared, &of).into_iter();
    all.flat_map(|(history, last, strikes)| {
        take(&mut random, strikes, STRIKES).into_iter().map(move |strike| (history.clone(), last, strike))
    })
    .collect()
}

/// Gives a share of all there is: every history with each last operation, and every strike on that.
fn all(prepared: &mut Prepared, share: usize, shares: usize) -> Vec<Case> {
    let began = Instant::now();
    let known = prepared.histories().unwrap();
    let pairs = known.iter().flat_map(|history| Operation::ALL.map(|last| (history.clone(), last)));
    let of: Vec<_> = pairs.enumerate().filter(|(index, _)| index % shares == share).map(|(_, pair)| pair).collect();
    println!(
        "{} histories with {} last operations each, of which {} are tried here; found in {:?}",
        known.len(),
        Operation::ALL.len(),
        of.len(),
        began.elapsed()
    );
    let found = strikes(prepared, &of).into_iter();
    let one = |(history, last, strikes): (History, Operation, Vec<Strike>)| {
        strikes.into_iter().map(move |strike| (history.clone(), last, strike))
    };
    let all: Vec<Case> = found.flat_map(one).collect();
    println!("{} strikes on these", all.len());
    all
}

/// Chooses what is tried.
fn chosen(prepared: &mut Prepared) -> Vec<Case> {
    if let Some(case) = variable("FAKE_XAPI_CASE") {
        return vec![world::parse(&case).unwrap()];
    }
    if variable("FAKE_XAPI_STEPS").is_none_or(|value| value != "all") {
        return some(prepared);
    }
    let share = variable("FAKE_XAPI_SHARE").unwrap_or("0/1".to_owned());
    let (share, shares) = share.split_once('/').expect("FAKE_XAPI_SHARE is i/n");
    let [share, shares]: [usize; 2] = [share, shares].map(|number| number.parse().unwrap());
    all(prepared, share % shares, shares)
}

#[test]
fn a_call_struck_at_any_step_is_done_or_not_and_can_be_repeated() {
    let mut prepared = Prepared::new().unwrap();
    let cases = chosen(&mut prepared);
    let again = "one alone: FAKE_XAPI_CASE='<case>' cargo test -p fake-xapi --test steps";
    try_all(
        &cases,
        again,
        |(history, last, strike)| format!("FAKE_XAPI_CASE='{}'", told(history, *last, strike)),
        |(history, last, strike)| struck(&prepared, history, *last, strike),
    );
}
