//! Random plans: any sequence of raw choices becomes a valid plan, so that proptest can drop any of them when it shrinks.

use fake_xapi::plan::{Action, Extent, GuestPlan, Plan, Step};
use proptest::prelude::*;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// The most snapshots in a plan.
const SNAPSHOTS: usize = 12;
/// The largest disk, in bytes.
const LARGEST: u64 = 16 * MIB;

/// A choice that is given its meaning by the plan before it.
#[derive(Debug, Clone)]
struct Choice {
    kind: Kind,
    disk: usize,
    /// Where on the disk, or which snapshot, as a share of all.
    place: f64,
    length: u64,
    /// What offset and length are rounded to.
    grain: u64,
    seed: u64,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Write,
    ZeroOverOld,
    Zero,
    Discard,
    Resize,
    Snapshot,
    Revert,
    Destroy,
}

/// Plans of 1 to 3 disks of 1 to 16 MiB, with up to 12 snapshots.
pub fn plans() -> impl Strategy<Value = Plan> {
    let disks = prop::collection::vec(disk(), 1..=3);
    let choices = prop::collection::vec(choice(), 1..40);
    let guest = prop::option::weighted(0.5, prop_oneof![Just(None), (50u64..2000).prop_map(Some)]);
    (disks, choices, guest, prop::bool::weighted(0.25)).prop_map(|(disks, choices, guest, halted)| {
        let steps = resolve(&disks, &choices);
        let guest = guest.map(|writes_per_second| GuestPlan { writes_per_second });
        Plan { disks, steps, guest, halted }
    })
}

/// Mostly whole clusters, sometimes only whole sectors.
fn disk() -> impl Strategy<Value = u64> {
    prop_oneof![4 => (16..=256u64).prop_map(|clusters| clusters * 64 * KIB), 1 => (2048..=32768u64).prop_map(|s| s * 512)]
}

fn choice() -> impl Strategy<Value = Choice> {
    let kind = prop_oneof![
        8 => Just(Kind::Write),
        3 => Just(Kind::ZeroOverOld),
        1 => Just(Kind::Zero),
        3 => Just(Kind::Discard),
        1 => Just(Kind::Resize),
        5 => Just(Kind::Snapshot),
        2 => Just(Kind::Revert),
        1 => Just(Kind::Destroy),
    ];
    let grain = prop_oneof![3 => Just(64 * KIB), 2 => Just(4 * KIB), 1 => Just(512u64)];
    let length = prop_oneof![4 => 1..=64 * KIB, 2 => 1..=512 * KIB];
    (kind, 0..3usize, 0.0..1.0f64, length, grain, 1..1000u64)
        .prop_map(|(kind, disk, place, length, grain, seed)| Choice { kind, disk, place, length, grain, seed })
}

fn resolve(disks: &[u64], choices: &[Choice]) -> Vec<Step> {
    let mut sizes = disks.to_vec();
    let mut written: Vec<Extent> = Vec::new();
    let mut snapshots: Vec<(String, Vec<u64>)> = Vec::new();
    let mut taken = 0;
    let mut steps = Vec::new();
    for choice in choices {
        let disk = choice.disk % sizes.len();
        let size = sizes[disk];
        let range = extent(choice, size);
        let action = match choice.kind {
            Kind::Write => {
                written.push(range);
                Action::Write { range, seed: choice.seed }
            }
            Kind::Zero => Action::Zero(range),
            Kind::Discard => Action::Discard(range),
            Kind::ZeroOverOld => match written.get((choice.place * written.len() as f64) as usize) {
                Some(old) if old.end() <= size => Action::Zero(*old),
                _ => Action::Zero(range),
            },
            Kind::Resize => {
                let grown = (size + choice.length.next_multiple_of(512)).min(LARGEST);
                sizes[disk] = grown.max(size);
                Action::Resize(sizes[disk])
            }
            Kind::Snapshot if snapshots.len() < SNAPSHOTS => {
                taken += 1;
                let name = format!("snap{taken}");
                snapshots.push((name.clone(), sizes.clone()));
                steps.push(Step::Snapshot(name));
                continue;
            }
            Kind::Revert if !snapshots.is_empty() => {
                let (name, old) = &snapshots[(choice.place * snapshots.len() as f64) as usize];
                sizes.clone_from(old);
                steps.push(Step::Revert(name.clone()));
                continue;
            }
            Kind::Destroy if !snapshots.is_empty() => {
                let (name, _) = snapshots.remove((choice.place * snapshots.len() as f64) as usize);
                steps.push(Step::Destroy(name));
                continue;
            }
            Kind::Snapshot | Kind::Revert | Kind::Destroy => continue,
        };
        steps.push(Step::Disk { disk, action });
    }
    steps
}

/// Some bytes inside a disk, in the choice's grain where it fits.
fn extent(choice: &Choice, size: u64) -> Extent {
    let length = choice.length.next_multiple_of(choice.grain).min(size);
    let offset = ((size - length) as f64 * choice.place) as u64;
    Extent { offset: offset - offset % choice.grain, length }
}
