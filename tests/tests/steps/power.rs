//! What a power cut leaves, at each flush of a history: what was told is there, and what was not told is whole.
//!
//! A history is carried out on an ext4 file system whose device notes every write and flush. Then, for moments around each
//! flush and each answer, the device is made as a disk may have it after a power cut then: all that was flushed, and of
//! the rest nothing, everything, or by chance. The host boots, mounts it, attaches the SR, and finds the volumes as the
//! last answer told them or as the call that was cut off was to make them; and all that [`super::judge`] asks.
//!
//! A few histories are tried, the same on each run. FAKE_XAPI_POWER says how many random ones are, and FAKE_XAPI_SEED
//! which; `all` stands for every moment of the few, a history for every moment of that one.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use fake_xapi::conformance::random::Random;

use super::device;
use super::image::Image;
use super::log::{Cut, Log, Unsynced};
use super::operation::{Model, Operation};
use super::recorder::Recorder;
use super::site::{Outcome, Site};
use super::world::World;
use super::{History, parsed, random, take, try_all, variable};

/// Each call once, with those in pairs that mean something together.
const CHOSEN: [&str; 4] = [
    "Activate Write Snapshot Write Deactivate Revert",
    "Create Snapshot Prune Gc Resize Write",
    "Receive Compose Clone Forget Gc",
    "Clone Activate Snapshot Deactivate Destroy Gc",
];

/// How many moments are tried of each chosen history without FAKE_XAPI_POWER.
const MOMENTS: usize = 4;

/// How many of each random one.
const MORE_MOMENTS: usize = 24;

/// How many operations a random history has.
const LENGTH: usize = 5;

/// What was true from one answer to the next.
struct Stretch {
    /// How many requests the device had answered when the call began.
    from: usize,
    operation: Operation,
    before: Model,
    after: Model,
    /// The volumes' keys before the call.
    keys: BTreeMap<String, String>,
}

/// A history that was carried out.
struct Recording {
    history: History,
    site: Site,
    log: Log,
    stretches: Vec<Stretch>,
    /// How many requests had been answered with the last call.
    end: usize,
    model: Model,
    keys: BTreeMap<String, String>,
}

impl Recording {
    /// Carries out a history on a recorded copy of an image.
    fn of(image: &Image, history: &[Operation]) -> Result<Self> {
        let recorder = Recorder::start(image)?;
        let place = recorder.place();
        let site = image.small.site.booted(place.path(), place.mounted().join("sr"))?;
        let mut world = World::booted(site, &image.small.keys);
        world.model = image.small.model.clone();
        let mut lengths = Vec::new();
        let mut stretches = Vec::new();
        for (number, operation) in history.iter().enumerate() {
            lengths.push(recorder.length()?);
            let (before, keys) = (world.model.clone(), world.keys.clone());
            world.perform(*operation, number, None).with_context(|| format!("{operation:?}"))?;
            let after = world.model.clone();
            stretches.push(Stretch { from: 0, operation: *operation, before, after, keys });
        }
        lengths.push(recorder.length()?);
        let (model, keys) = (world.model.clone(), world.keys.clone());
        world.site.halt();
        let log = recorder.end()?;
        for (stretch, length) in stretches.iter_mut().zip(&lengths) {
            stretch.from = log.answered(*length);
        }
        let end = lengths.last().map_or(0, |length| log.answered(*length));
        Ok(Self { history: history.to_vec(), site: world.site, log, stretches, end, model, keys })
    }

    /// Lists the moments at which a cut may leave something of its own: each flush, before the device has done it, and
    /// each answer; with all that may have become of what was not flushed by then.
    fn cuts(&self, random: &mut Random) -> Vec<Cut> {
        let first = self.stretches.first().map_or(self.end, |stretch| stretch.from);
        let answers = self.stretches.iter().map(|stretch| stretch.from).chain([self.end]);
        let mut moments: Vec<usize> = self.log.flushes().chain(answers).collect();
        moments.retain(|at| (first..=self.end).contains(at));
        moments.sort_unstable();
        moments.dedup();
        let mut cuts = Vec::new();
        for at in moments {
            cuts.push(Cut { at, unsynced: Unsynced::Lost });
            if self.log.has_unsynced(at) {
                cuts.push(Cut { at, unsynced: Unsynced::Kept });
                let seed = random.below(usize::MAX) as u64;
                cuts.push(Cut { at, unsynced: Unsynced::Some(seed) });
            }
        }
        cuts
    }

    /// Boots the host after a power cut, and judges what it finds.
    fn judge(&self, image: &Image, cut: Cut) -> Result<()> {
        let place = image.after(&self.log, cut).context("the file system after the cut")?;
        let site = self.site.booted(place.path(), place.mounted().join("sr")).context("after the cut")?;
        let at = self.stretches.partition_point(|stretch| stretch.from <= cut.at);
        // Nobody has a disk after a cut.
        let off = |model: &Model| Model { active: false, ..model.clone() };
        let Some((number, stretch)) = (cut.at < self.end).then(|| at - 1).map(|at| (at, &self.stretches[at])) else {
            let mut world = World::booted(site, &self.keys);
            let model = off(&self.model);
            ensure!(world.stands(&model, &model)?, "what was told is not there");
            world.model = model;
            return world.end();
        };
        let (before, after) = (off(&stretch.before), off(&stretch.after));
        let mut world = World::booted(site, &stretch.keys);
        let is_after = world.stands(&before, &after)?;
        world.model = if is_after { after } else { before };
        // An attachment is gone with the boot, so that the guest's disk is not had by asking again for what was done.
        let is_done = is_after && stretch.operation != Operation::Activate;
        world.repeat(stretch.operation, number, is_done, &Outcome::Killed).context("again")?;
        world.end()
    }

    fn told(&self, cut: Cut) -> String {
        let words: Vec<String> = self.history.iter().map(|operation| format!("{operation:?}")).collect();
        format!("FAKE_XAPI_POWER='{}' at {} of {}, {:?}", words.join(" "), cut.at, self.end, cut.unsynced)
    }
}

/// Chooses histories, and how many moments of each are tried.
fn chosen(random: &mut Random) -> (Vec<History>, usize) {
    let few = || CHOSEN.iter().map(|history| parsed(history).unwrap()).collect();
    let Some(wanted) = variable("FAKE_XAPI_POWER") else { return (few(), MOMENTS) };
    if wanted == "all" {
        return (few(), usize::MAX);
    }
    let Ok(count) = wanted.parse::<usize>() else { return (vec![parsed(&wanted).unwrap()], usize::MAX) };
    let all: Vec<Operation> = Operation::ALL.into_iter().chain(Operation::MORE).collect();
    let histories = (0..count).map(|_| (0..LENGTH).map(|_| *random.pick(&all)).collect()).collect();
    (histories, MORE_MOMENTS)
}

#[test]
fn a_power_cut_takes_nothing_that_was_told_and_leaves_nothing_half_done() {
    if !device::can_be_made() {
        return;
    }
    let mut random = random();
    let (histories, moments) = chosen(&mut random);
    let image = Image::small().unwrap();
    let (mut recordings, mut cases) = (Vec::new(), Vec::new());
    for (index, history) in histories.iter().enumerate() {
        let recording = Recording::of(&image, history).unwrap_or_else(|error| panic!("{history:?}: {error:#}"));
        let cuts = recording.cuts(&mut random);
        let count = cuts.len();
        let cuts = take(&mut random, cuts, moments);
        println!("{history:?}: {} of {count} moments", cuts.len());
        cases.extend(cuts.into_iter().map(|cut| (index, cut)));
        recordings.push(recording);
    }
    let again = "all of one history: FAKE_XAPI_POWER='<history>' cargo test -p fake-xapi --test steps power";
    let told = |(index, cut): &(usize, _)| recordings[*index].told(*cut);
    try_all(&cases, again, told, |(index, cut)| recordings[*index].judge(&image, *cut));
}
