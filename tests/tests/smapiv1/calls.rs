//! Every script call of a migration fails once, instead of running, after it ran, or killed in the middle, or is made
//! twice.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fake_xapi::script::{CallRecord, CallSite, Fault};
use fake_xapi::sxm::Quiet;

use crate::all;
use crate::sweep::sweep;
use crate::world::{World, refused};

/// Calls that change nothing: how they fail makes no difference.
const READERS: [&str; 3] = ["SR.stat", "SR.ls", "Volume.stat"];

/// One call of a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    pub method: &'static str,
    /// Which of the calls of this method.
    pub nth: usize,
    /// Whether xapi ignores its failure.
    pub ignored: bool,
    /// Whether the guest is suspended by then, and nobody asks any more whether the user has cancelled.
    pub late: bool,
}

impl Call {
    /// Has a fault strike this call.
    pub fn order(&self, world: &World, fault: Fault) -> Arc<Mutex<bool>> {
        let struck = Arc::new(Mutex::new(false));
        let (method, nth, told) = (self.method, self.nth, Arc::clone(&struck));
        let seen = Mutex::new(0);
        world.stage.destination.runner().faults().order(Arc::new(move |site: &CallSite<'_>| {
            if site.request.method != method {
                return None;
            }
            let mut seen = seen.lock().unwrap();
            *seen += 1;
            let mut told = told.lock().unwrap();
            (*seen == nth + 1 && !std::mem::replace(&mut *told, true)).then(|| fault.clone())
        }));
        struck
    }
}

/// The calls that an undisturbed migration makes, with how long each took.
pub async fn calls(world: &World) -> Result<Vec<(Call, Duration)>> {
    let mark = world.stage.log.len();
    let import = world.import();
    let migrated = world.migrate(&import, &Quiet).await?;
    let made = world.stage.log.since(mark);
    world.arrived(&import, migrated).await?;
    let place = |method: &str| made.iter().rposition(|call| call.method == method).context(method.to_owned());
    let (compose, end) = (place("Volume.compose")?, place("Volume.unset")?);
    // Stat, deactivate and detach of the leaf come right before.
    let suspended = compose - 3;
    ensure!(
        made[suspended..compose].iter().any(|call| call.method == "Datapath.deactivate"),
        "{:?}",
        made[suspended]
    );
    let mut counts = BTreeMap::new();
    let call = |(index, call): (usize, &CallRecord)| {
        let count: &mut usize = counts.entry(call.method).or_default();
        *count += 1;
        let ignored = (compose + 1..=end).contains(&index);
        let took = call.ended.unwrap_or(call.started).saturating_sub(call.started);
        (Call { method: call.method, nth: *count - 1, ignored, late: index >= suspended }, took)
    };
    Ok(made.iter().enumerate().map(call).collect())
}

/// Blocks while it asks an undisturbed migration.
pub fn calls_blocking() -> Vec<(Call, Duration)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let world = World::build().await.unwrap();
        let calls = calls(&world).await.unwrap();
        world.close().await.unwrap();
        calls
    })
}

#[derive(Debug, Clone, Copy)]
enum How {
    Instead,
    After,
    /// SIGKILL after so many microseconds, which is half of what the call took undisturbed.
    Killed(u64),
    Twice,
    TwiceAtOnce,
}

impl How {
    fn is_repetition(&self) -> bool {
        matches!(self, Self::Twice | Self::TwiceAtOnce)
    }
}

/// A call and what is wrong with it.
pub struct Case {
    call: Call,
    how: How,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match self.how {
            How::Instead => "instead",
            How::After => "after",
            How::Killed(_) => "killed",
            How::Twice => "twice",
            How::TwiceAtOnce => "twice at once",
        };
        write!(f, "{} {} {how}", self.call.method, self.call.nth)
    }
}

impl Case {
    pub async fn run(&self, kept: &mut Option<World>) -> Result<()> {
        if kept.is_none() {
            *kept = Some(World::build().await.context("the world")?);
        }
        let world = kept.as_ref().context("there is one")?;
        world.go_on().await;
        let fault = match self.how {
            How::Instead => Fault::FailInstead,
            How::After => Fault::FailAfter,
            How::Killed(after) => Fault::Kill(Duration::from_micros(after)),
            How::Twice => Fault::TwiceInARow,
            How::TwiceAtOnce => Fault::TwiceAtOnce,
        };
        let struck = self.call.order(world, fault);
        let import = world.import();
        let result = world.migrate(&import, &Quiet).await;
        world.stage.destination.runner().faults().clear();
        ensure!(*struck.lock().unwrap(), "no such call was made: {result:?}");
        let succeeds = match self.how {
            How::Twice | How::TwiceAtOnce => Some(true),
            How::Instead => Some(self.call.ignored),
            // What composed has done is all that the guest needs.
            How::After => Some(self.call.ignored || self.call.method == "Volume.compose"),
            How::Killed(_) => None,
        };
        match (result, succeeds) {
            (Ok(migrated), Some(true) | None) => world.arrived(&import, migrated).await.context("it went well"),
            (Err(error), Some(false) | None) => world.failed(&import).await.with_context(|| error.to_string()),
            (Err(error), Some(true)) => Err(error).context("xapi was to ignore it"),
            (result, Some(false)) => refused(result).map(drop),
        }
    }
}

/// Every way in which every call may go wrong.
pub fn every(calls: &[(Call, Duration)]) -> Vec<Case> {
    let mut cases = Vec::new();
    for (call, took) in calls {
        // One that waits, waits after its work.
        let half = Duration::from_millis(8).min(*took / 2).as_micros() as u64;
        let all = [How::Instead, How::After, How::Killed(half), How::Twice, How::TwiceAtOnce];
        let is_reader = READERS.contains(&call.method);
        let hows = all.into_iter().filter(|how| !is_reader || !matches!(how, How::After | How::Killed(_)));
        cases.extend(hows.map(|how| Case { call: call.clone(), how }));
    }
    cases
}

fn cases(wanted: fn(&How) -> bool) -> Vec<Case> {
    let mut cases = every(&calls_blocking());
    cases.retain(|case| wanted(&case.how));
    if all() { cases } else { chosen(cases) }
}

/// Keeps one case of each method, and of different methods different ones of its calls and different ways.
fn chosen(cases: Vec<Case>) -> Vec<Case> {
    let mut methods: BTreeMap<&str, Vec<Case>> = BTreeMap::new();
    let matters = |case: &Case| !case.how.is_repetition() || !READERS.contains(&case.call.method);
    for case in cases.into_iter().filter(matters) {
        methods.entry(case.call.method).or_default().push(case);
    }
    let one = |(index, mut cases): (usize, Vec<Case>)| cases.swap_remove(index * 7 % cases.len());
    methods.into_values().enumerate().map(one).collect()
}

#[test]
fn each_call_fails_once() {
    let cases = cases(|how| !how.is_repetition());
    sweep("each_call_fails_once", &cases, async |case, world| case.run(world).await);
    eprintln!("{} cases", cases.len());
}

#[test]
fn each_call_is_made_twice() {
    let cases = cases(How::is_repetition);
    sweep("each_call_is_made_twice", &cases, async |case, world| case.run(world).await);
    eprintln!("{} cases", cases.len());
}
