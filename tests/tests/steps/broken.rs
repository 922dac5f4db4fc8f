//! A disk that breaks below running daemons, and below calls: no write, no flush, no read, no space.
//!
//! The file system is on a device that a storage daemon serves, which can be told to fail. It fails for as long as one
//! operation takes: a call, a guest's write, the worker that brings space back. Nothing that failed may be told as done,
//! and the guest's storage daemon lives on. Then the disk is mended. Where the file system can still be written to, the
//! guest reads, goes, and the operation is asked for again; else not before the host was booted. It is booted in any case,
//! so that nothing is judged by what is only in memory.
//!
//! A few cases are tried, the same on each run. FAKE_XAPI_DISK says how many are, FAKE_XAPI_SEED which; `all` stands for
//! every one, a case for itself.

use anyhow::{Context, Result, bail, ensure};

use super::device;
use super::faulty::{Fault, Faulty};
use super::image::Image;
use super::operation::{Model, Operation};
use super::site::{GC, Outcome};
use super::world::World;
use super::{History, parsed, random, take, try_all, variable};

/// The last operation of each is the one that the disk fails.
const HISTORIES: [&str; 17] = [
    "Activate Write",
    "Activate Snapshot",
    "Activate Write Snapshot Write",
    "Activate Clone",
    "Activate Write Deactivate",
    "Activate",
    "Write",
    "Receive",
    "Create",
    "Snapshot",
    "Clone",
    "Revert",
    "Resize",
    "Prune",
    "Compose",
    "Prune Gc",
    "Forget",
];

/// How many cases are tried without FAKE_XAPI_DISK.
const CASES: usize = 8;

struct Case {
    history: History,
    fault: Fault,
}

impl Case {
    fn told(&self) -> String {
        let words: Vec<String> = self.history.iter().map(|operation| format!("{operation:?}")).collect();
        format!("{} {:?}", words.join(" "), self.fault)
    }

    /// Runs it, and tells whether the operation failed.
    fn run(&self, image: &Image) -> Result<bool> {
        let mut disk = Faulty::mount(image.copied()?)?;
        let path = disk.place().mounted().join("sr");
        let site = image.small.site.booted(disk.place().path(), path.clone())?;
        let mut world = World::booted(site, &image.small.keys);
        world.model = image.small.model.clone();
        let (last, history) = self.history.split_last().context("an empty history")?;
        for (place, operation) in history.iter().enumerate() {
            world.perform(*operation, place, None).with_context(|| format!("{operation:?}"))?;
        }
        let (before, place) = (world.model.clone(), history.len());
        let after = last.effect(&before, place).context("it is to be refused in any case")?;
        let daemon = world.daemon();

        disk.break_down(self.fault)?;
        let outcome = world.attempt(*last, place)?;
        disk.mend(self.fault)?;
        self.is_told(*last, before.active, &outcome)?;
        let has_guest = before.active && *last != Operation::Deactivate;
        ensure!(!has_guest || world.daemon() == daemon, "the guest's daemon died");
        world.site.wait_for_orphans();

        // Nobody has a disk after that.
        let off = |model: &Model| Model { active: false, ..model.clone() };
        let (before, after) = (off(&before), off(&after));
        let is_writable = disk.is_writable();
        if is_writable {
            world.leave(has_guest)?;
            self.settle(&mut world, &before, &after, *last, place, &outcome)?;
        }
        world.site.halt();
        disk.mount_again()?;
        let site = world.site.booted(disk.place().path(), path)?;
        let model = world.model.clone();
        let mut world = World::booted(site, &world.keys);
        if is_writable {
            ensure!(world.stands(&model, &model)?, "what was told is only in memory");
            world.model = model;
        } else {
            self.settle(&mut world, &before, &after, *last, place, &outcome)?;
        }
        world.end()?;
        Ok(outcome != Outcome::Done)
    }

    /// Judges what is there after the fault, and asks again.
    fn settle(
        &self,
        world: &mut World,
        before: &Model,
        after: &Model,
        last: Operation,
        place: usize,
        outcome: &Outcome,
    ) -> Result<()> {
        world.site.attach()?;
        let is_after = world.stands(before, after)?;
        ensure!(is_after || before == after || *outcome != Outcome::Done, "it was said to be done, and is not");
        world.model = if is_after { after.clone() } else { before.clone() };
        let is_done = is_after && last != Operation::Activate;
        world.repeat(last, place, is_done, &Outcome::Killed).context("again")
    }

    /// Sees that a guest hears of what was not written, and that a full file system is told as such and does not keep
    /// volumes from being destroyed.
    fn is_told(&self, last: Operation, is_active: bool, outcome: &Outcome) -> Result<()> {
        let is_guest = last == Operation::Write && is_active && self.fault != Fault::Read;
        match outcome {
            Outcome::Killed => bail!("there was no answer"),
            Outcome::Done if is_guest => bail!("the guest's write was acknowledged"),
            Outcome::Refused(code) if self.fault == Fault::Full => {
                let is_right = [GC, World::GUEST_FAILED, "SR_BACKEND_FAILURE_44"].contains(&code.as_str());
                ensure!(is_right, "a full file system is told as {code}");
                ensure!(last != Operation::Prune, "nothing can be destroyed");
            }
            Outcome::Refused(_) | Outcome::Done => {}
        }
        Ok(())
    }
}

fn chosen() -> Vec<Case> {
    let wanted = variable("FAKE_XAPI_DISK");
    let of = |history: &str, fault| Case { history: parsed(history).unwrap(), fault };
    let all: Vec<Case> = HISTORIES.iter().flat_map(|history| Fault::ALL.map(|fault| of(history, fault))).collect();
    match wanted.as_deref() {
        Some("all") => all,
        Some(case) if case.parse::<usize>().is_err() => {
            let (history, fault) = case.rsplit_once(' ').expect("a case ends with a fault");
            let fault = Fault::ALL.into_iter().find(|known| format!("{known:?}") == fault).expect("a fault");
            vec![of(history, fault)]
        }
        count => {
            let count = count.map_or(CASES, |count| count.parse().unwrap());
            take(&mut random(), all, count)
        }
    }
}

#[test]
fn a_disk_that_fails_below_a_daemon_or_a_call_takes_nothing_that_was_told() {
    if !device::can_be_made() {
        return;
    }
    let image = Image::small().unwrap();
    let cases = chosen();
    let again = "one alone: FAKE_XAPI_DISK='<case>' cargo test -p fake-xapi --test steps below";
    let told = |case: &Case| format!("FAKE_XAPI_DISK='{}'", case.told());
    let results = try_all(&cases, again, told, |case| case.run(&image));
    let refused = results.iter().filter(|is_refused| **is_refused).count();
    println!("of these {refused} were told of the fault");
}
