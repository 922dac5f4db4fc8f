//! The user cancels, or the toolstack of the source is restarted, before and after every call; and at shares of the copy.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fake_xapi::script::{Action, Fault};
use fake_xapi::smapiv2::Error;
use fake_xapi::sxm::{Event, Quiet};
use tokio::sync::Notify;

use crate::all;
use crate::calls::{Call, calls_blocking};
use crate::sweep::sweep;
use crate::world::{At, SIZE, World, refused};

/// Bytes a second, so that a share can be met.
const LINK: u64 = 4 << 20;
/// Of all moments of calls, one of so many is tried.
const STRIDE: usize = 31;

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum What {
    Cancelled,
    Restarted,
}

#[derive(Debug)]
enum When {
    Before(Call),
    After(Call),
    /// So many percent of what is copied.
    Share(u64),
}

/// A moment and what happens then.
pub struct Case {
    what: What,
    when: When,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.when {
            When::Before(call) => write!(f, "{:?} before {} {}", self.what, call.method, call.nth),
            When::After(call) => write!(f, "{:?} after {} {}", self.what, call.method, call.nth),
            When::Share(percent) => write!(f, "{:?} at {percent} %", self.what),
        }
    }
}

impl Case {
    pub async fn run(&self, kept: &mut Option<World>) -> Result<()> {
        if kept.is_none() {
            *kept = Some(World::build().await.context("the world")?);
        }
        let world = kept.as_ref().context("there is one")?;
        world.go_on().await;
        match (&self.when, self.what) {
            (When::Share(percent), what) => at_share(world, *percent, what).await,
            (When::Before(call), What::Cancelled) => cancelled(world, call, false).await,
            (When::After(call), What::Cancelled) => cancelled(world, call, true).await,
            (When::Before(call), What::Restarted) => restarted(world, call, false).await,
            (When::After(call), What::Restarted) => restarted(world, call, true).await,
        }
    }
}

async fn cancelled(world: &World, call: &Call, after: bool) -> Result<()> {
    let import = world.import();
    let cancel = import.cancel.clone();
    let ask: Action = Arc::new(move |_| cancel.ask());
    let struck = call.order(world, if after { Fault::After(ask) } else { Fault::Before(ask) });
    let result = world.migrate(&import, &Quiet).await;
    ensure!(*struck.lock().unwrap(), "no such call was made: {result:?}");
    if call.late {
        return world.arrived(&import, result.context("too late to be cancelled")?).await;
    }
    let error = refused(result)?;
    ensure!(matches!(error, Error::Cancelled), "{error:?}");
    world.failed(&import).await
}

/// Leaves a migration where it is, as a process that was killed leaves it, and restarts the toolstack.
async fn restarted(world: &World, call: &Call, after: bool) -> Result<()> {
    let import = world.import();
    let told = Arc::new(Notify::new());
    call.order(world, Fault::Lost { after, told: Arc::clone(&told) });
    tokio::select! {
        ended = world.migrate(&import, &Quiet) => anyhow::bail!("the migration ended: {ended:?}"),
        () = told.notified() => {}
    }
    world.failed(&import).await
}

async fn at_share(world: &World, percent: u64, what: What) -> Result<()> {
    let import = world.import();
    let told = Arc::new(Notify::new());
    let (cancel, wires, wire) =
        (import.cancel.clone(), world.stage.source.wires(), world.stage.source.wires().all().len());
    let now = {
        let told = Arc::clone(&told);
        move || match what {
            What::Cancelled => cancel.ask(),
            What::Restarted => told.notify_one(),
        }
    };
    // What of the disk is written is sent, and what is not is told as zeroes.
    let bytes = SIZE * 6 / 16 * percent / 100;
    let observer = At(|event: &Event| match event {
        Event::Started { .. } if percent == 0 => now(),
        Event::Complete { .. } if percent == 100 => now(),
        Event::Started { .. } if percent < 100 => {
            let (now, wires) = (now.clone(), wires.clone());
            tokio::spawn(async move {
                while wires.all().get(wire).is_none_or(|wire| wire.to_destination() < bytes) {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                now();
            });
        }
        _ => {}
    });
    wires.limit(Some(LINK));
    let ended = tokio::select! {
        ended = world.migrate(&import, &observer) => Some(ended),
        () = told.notified() => None,
    };
    wires.limit(None);
    match (what, ended) {
        (What::Cancelled, Some(result)) => {
            let error = refused(result)?;
            ensure!(matches!(error, Error::Cancelled), "{error:?}");
        }
        (What::Restarted, None) => {}
        (_, ended) => anyhow::bail!("the migration ended: {ended:?}"),
    }
    world.failed(&import).await
}

/// The moments before and after every call.
pub fn of_calls(what: What, calls: &[(Call, Duration)]) -> Vec<Case> {
    let both = |(call, _): &(Call, _)| [When::Before(call.clone()), When::After(call.clone())];
    let mut moments: Vec<When> = calls.iter().flat_map(both).collect();
    if what == What::Restarted {
        // After the last call the VM runs at the destination.
        moments.pop();
    }
    moments.into_iter().map(|when| Case { what, when }).collect()
}

/// Of the moments of calls, where not all are wanted, every so manieth from one on; and shares of the copy.
fn moments(what: What, first: usize) -> Vec<Case> {
    let mut moments = of_calls(what, &calls_blocking());
    let mut shares = vec![0, 1, 50, 99, 100];
    if !all() {
        moments = moments.into_iter().skip(first).step_by(STRIDE).collect();
        shares.retain(|percent| *percent == 50);
    }
    moments.extend(shares.into_iter().map(|percent| Case { what, when: When::Share(percent) }));
    moments
}

#[test]
fn a_migration_that_is_cancelled_leaves_nothing_and_succeeds_later() {
    let cases = moments(What::Cancelled, 5);
    sweep("a_migration_that_is_cancelled", &cases, async |case, world| case.run(world).await);
    eprintln!("{} cases", cases.len());
}

#[test]
fn a_toolstack_restart_cancels_a_migration_that_succeeds_later() {
    let cases = moments(What::Restarted, 2);
    sweep("a_toolstack_restart_cancels", &cases, async |case, world| case.run(world).await);
    eprintln!("{} cases", cases.len());
}
