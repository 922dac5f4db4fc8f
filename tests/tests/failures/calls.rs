//! Every script call of a migration fails once: instead of running, after it ran, or killed in the middle.
//!
//! Of many calls of one method the first and the last are chosen, or where another flow does that the last alone;
//! FAKE_XAPI_SWEEP=all has every single one fail.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use fake_xapi::host::Host;
use fake_xapi::script::{CallRecord, CallSite, Fault};
use fake_xapi::sxm::{Flow, toolstack_restart};
use fake_xapi::wire::Request;

use crate::sweep::{ONLY, sweep};
use crate::world::{BRANCHES, CHAIN, World, told};

/// Calls that change nothing: how they fail makes no difference.
const READERS: [&str; 4] = ["SR.stat", "SR.ls", "Volume.stat", "Data.stat"];

/// Calls by which xapi cleans up behind a step that succeeded. Where one of them fails it only logs, and what the call was
/// to remove stays for a user: a copy's clone and its datapaths (ocaml/xapi/storage_smapiv3_migrate.ml, the clean-up of
/// DATA.copy2 and of a branch), the finalised receiver's (receive_finalize3), the datapath of a failed copy
/// (ocaml/xapi/xapi_vm_migrate.ml, with_new_dp), and the stat before each of these.
const CLEANERS: [&str; 6] = [
    "Volume.stat",
    "Datapath.deactivate",
    "Datapath.detach",
    "Volume.destroy",
    "Volume.unset",
    // The walk over a tree destroys the snapshots that it has made, and not one whose follow-up Volume.set failed.
    "Volume.set",
];

/// One call and how it fails.
#[derive(Debug, Clone)]
struct Case {
    flow: Flow,
    /// `source` or `destination`.
    side: &'static str,
    method: &'static str,
    /// Which of the calls of this method on this side; of Data.stat, which of those that come first after a Data.mirror.
    nth: usize,
    how: How,
}

#[derive(Debug, Clone, Copy)]
enum How {
    Instead,
    After,
    /// SIGKILL after so many microseconds, which is half of what the call took undisturbed.
    Killed(u64),
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Instead => "instead",
            Self::After => "after",
            Self::Killed(_) => "killed",
        })
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {} {}", self.flow.name(), self.side, self.method, self.nth, self.how)
    }
}

/// Counts calls by side and method, in the way that [`Case::nth`] means.
#[derive(Debug, Default)]
struct Counter(BTreeMap<(bool, String), usize>, bool);

impl Counter {
    /// The number of this call; none for a Data.stat that is not the first after its Data.mirror.
    fn count(&mut self, is_source: bool, method: &str) -> Option<usize> {
        if method == "Data.stat" && !std::mem::take(&mut self.1) {
            return None;
        }
        self.1 |= method == "Data.mirror";
        let count = self.0.entry((is_source, method.to_owned())).or_default();
        *count += 1;
        Some(*count - 1)
    }
}

/// The cases that a migration's calls make.
fn cases(flow: Flow, calls: &[CallRecord], source: &str) -> Vec<Case> {
    let mut counter = Counter::default();
    let mut cases = Vec::new();
    for call in calls {
        let is_source = call.host == source;
        let Some(nth) = counter.count(is_source, call.method) else { continue };
        let side = if is_source { "source" } else { "destination" };
        let took = call.ended.unwrap_or(call.started).saturating_sub(call.started);
        // One that waits, waits after its work.
        let half = Duration::from_millis(8).min(took / 2).as_micros() as u64;
        let all = [How::Instead, How::After, How::Killed(half)];
        let hows = if READERS.contains(&call.method) { &all[..1] } else { &all[..] };
        cases.extend(hows.iter().map(|how| Case { flow, side, method: call.method, nth, how: *how }));
    }
    cases
}

/// Keeps, of the cases that differ in nothing but which call of a method it is, the last one, by the flow `tree` the first
/// one too; all of them where FAKE_XAPI_SWEEP is `all`.
fn chosen(cases: Vec<Case>) -> Vec<Case> {
    if std::env::var("FAKE_XAPI_SWEEP").is_ok_and(|value| value == "all") || std::env::var_os(ONLY).is_some() {
        return cases;
    }
    let kind = |case: &Case| (case.side, case.method, case.how.to_string());
    let mut alike: BTreeMap<_, Vec<usize>> = BTreeMap::new();
    for (index, case) in cases.iter().enumerate() {
        alike.entry(kind(case)).or_default().push(index);
    }
    // Of flows that share most calls one is tried more closely.
    let ends = |indices: &Vec<usize>| {
        let last = *indices.last()?;
        let first = indices.first().copied().filter(|first| cases[*first].flow == Flow::Tree);
        Some([first.unwrap_or(last), last])
    };
    let kept: BTreeSet<usize> = alike.values().filter_map(ends).flatten().collect();
    cases.into_iter().enumerate().filter(|(index, _)| kept.contains(index)).map(|(_, case)| case).collect()
}

impl Case {
    fn host<'a>(&self, world: &'a World) -> &'a Arc<Host> {
        if self.side == "source" { &world.stage.source } else { &world.stage.destination }
    }

    /// Orders the fault; answers the request that it has struck.
    fn order(&self, world: &World) -> Arc<Mutex<Option<Request>>> {
        let struck = Arc::new(Mutex::new(None));
        let (case, told) = (self.clone(), Arc::clone(&struck));
        let counter = Mutex::new(Counter::default());
        let fault = match self.how {
            How::Instead => Fault::FailInstead,
            How::After => Fault::FailAfter,
            How::Killed(after) => Fault::Kill(Duration::from_micros(after)),
        };
        let is_source = self.side == "source";
        self.host(world).runner().faults().order(Arc::new(move |site: &CallSite<'_>| {
            let nth = counter.lock().unwrap().count(is_source, site.request.method)?;
            let is_this = site.request.method == case.method && nth == case.nth;
            (is_this && told.lock().unwrap().replace(site.request.clone()).is_none()).then(|| fault.clone())
        }));
        struck
    }

    /// Breaks a migration by the fault, and then migrates undisturbed.
    async fn run(&self, plan: &str, kept: &mut Option<World>) -> Result<()> {
        if kept.is_none() {
            *kept = Some(World::build(plan, self.flow).await.context("the world")?);
        }
        let world = kept.as_mut().unwrap();
        let struck = self.order(world);
        let host = Arc::clone(self.host(world));
        let result = world.migrate().await;
        host.runner().faults().clear();
        let struck = struck.lock().unwrap().take().context("no such call was made")?;
        match result {
            Err(failed) => {
                let told = told(&failed);
                self.well(world).await.context(told)?;
                world.migrate_well().await.context("the same migration once more")?;
            }
            Ok(_) => {
                // xapi has only logged it, or asked again. What it remembers of the mirror makes its next start cancel a
                // migration that is over: the VM's disk is in use by then, and must survive that.
                let sender = Arc::clone(&world.stage.source);
                world.change_sides();
                toolstack_restart(&sender).await;
                if let (How::Killed(_), "Volume.destroy") = (self.how, self.method) {
                    // A request is delivered again after a crash. That the volume is gone does not mean that all of it is:
                    // the records of its mirrors go last.
                    let plugin =
                        host.root().join("usr/libexec/xapi-storage-script/volume/org.xen.xapi.storage.qcow2");
                    host.runner().call(&plugin, &struck).await.context("Volume.destroy once more")?;
                }
                self.well(world).await.context("the migration succeeded all the same")?;
            }
        }
        Ok(())
    }

    /// Everything as it should be, if need be after a user has done what xapi only logged.
    async fn well(&self, world: &World) -> Result<()> {
        let Err(first) = world.all_is_well().await else { return Ok(()) };
        // The copy of a snapshot in the flow leaf does not detach what it could not attach
        // (ocaml/xapi/storage_smapiv1_migrate.ml, with_activated_disk).
        let half_attached = (self.flow, self.side, self.method) == (Flow::Leaf, "source", "Datapath.attach");
        if !half_attached && !CLEANERS.contains(&self.method) {
            return Err(first);
        }
        world.clean_by_hand().await.with_context(|| format!("cleaning by hand: {first:#}"))?;
        world.player.go_on().await.ok();
        world.all_is_well().await.with_context(|| format!("cleaned by hand because of: {first:#}"))
    }
}

fn each_call_fails(flow: Flow, plan: &str, test: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let cases = runtime.block_on(async {
        let mut world = World::build(plan, flow).await.unwrap();
        let (mark, source) = (world.stage.log.len(), world.stage.source.name().to_owned());
        world.migrate().await.unwrap();
        let calls = world.stage.log.since(mark);
        world.change_sides();
        world.all_is_well().await.unwrap();
        world.close().await.unwrap();
        chosen(cases(flow, &calls, &source))
    });
    let count = AtomicUsize::new(0);
    sweep(test, &cases, async |case, world| {
        count.fetch_add(1, Ordering::Relaxed);
        case.run(plan, world).await
    });
    eprintln!("{test}: {} cases", count.into_inner());
}

#[test]
fn each_call_fails_once_in_the_flow_leaf() {
    each_call_fails(Flow::Leaf, CHAIN, "each_call_fails_once_in_the_flow_leaf");
}

#[test]
fn each_call_fails_once_in_the_flow_tree() {
    each_call_fails(Flow::Tree, BRANCHES, "each_call_fails_once_in_the_flow_tree");
}

#[test]
fn each_call_fails_once_in_the_flow_base() {
    each_call_fails(Flow::Base, CHAIN, "each_call_fails_once_in_the_flow_base");
}
