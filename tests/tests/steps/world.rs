//! The small SR in the middle of a history, and the one judgement of what was made of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result, bail, ensure};
use fake_xapi::disk::{RawCopy, Sr};
use serde_json::{Value, json};

use super::operation::{BLOCK, Disk, Model, Operation, SIZE};
use super::site::{GC, Outcome, Site, Strike};
use super::{History, told};

/// The guest's domain.
const GUEST: &str = "7";
/// The domain for which a volume that no guest has is written to.
const WRITER: &str = "8";
/// That of a migration.
const MIGRATION: &str = "MIR0a1b2c";
/// The pieces in which a block is looked at, in bytes.
const PART: u64 = 4096;

/// An SR with volumes, and what they are to hold.
pub struct World {
    pub site: Site,
    /// What is to be there.
    pub model: Model,
    /// The volumes' keys, by what they are called here; those that are gone included.
    keys: BTreeMap<String, String>,
}

/// Reads a case as it is told.
pub fn parse(case: &str) -> Result<(History, Operation, Strike)> {
    let mut words: Vec<&str> = case.split_whitespace().collect();
    let strike = words.pop().context("an empty case")?.parse()?;
    let mut history = words.iter().map(|word| word.parse()).collect::<Result<History>>()?;
    let last = history.pop().context("no operation")?;
    debug_assert_eq!(told(&history, last, &strike), case);
    Ok((history, last, strike))
}

impl World {
    /// Makes the small SR.
    pub fn small(site: Site) -> Result<Self> {
        let mut world = Self { site, model: Model::default(), keys: BTreeMap::new() };
        for name in ["v", "w", "p"] {
            world.add(name, Operation::Create)?;
        }
        world.fill("v", WRITER, &[(0, 1), (1, 1)])?;
        world.add("s", Operation::Snapshot)?;
        world.fill("v", WRITER, &[(1, 2), (2, 2)])?;
        world.fill("w", WRITER, &[(3, 3)])?;
        world.fill("p", WRITER, &[(3, 4), (4, 4)])?;
        world.model = Model::small();
        Ok(world)
    }

    /// Carries out the rest of a history on a copy of an SR at rest, after which so many operations were `done`; what is
    /// refused is to be refused.
    pub fn after(like: &Self, done: usize, rest: &[Operation]) -> Result<Self> {
        let mut world =
            Self { site: Site::new(Some(&like.site))?, model: like.model.clone(), keys: like.keys.clone() };
        for (place, operation) in rest.iter().enumerate() {
            world.perform(*operation, done + place, None).with_context(|| format!("{operation:?} in the history"))?;
        }
        Ok(world)
    }

    /// Sees that nothing is at work, so that the SR may be copied.
    pub fn rest(&self) -> Result<()> {
        self.site.nothing_is_left()
    }

    /// Gives what a host finds that was booted anew, with no more than `keys` known of what histories made.
    pub fn booted(site: Site, keys: &BTreeMap<String, String>) -> Self {
        Self { site, model: Model::default(), keys: keys.clone() }
    }

    /// Gives the volumes' keys by what they are called here; those that are gone included.
    pub fn keys(&self) -> &BTreeMap<String, String> {
        &self.keys
    }

    fn key(&self, name: &str) -> &str {
        // A uuid that nobody has stands for a volume that never was.
        self.keys.get(name).map_or("00000000-0000-4000-8000-000000000000", String::as_str)
    }

    fn uri(&self, name: &str) -> String {
        format!("qsd://{}/{}", self.site.sr, self.key(name))
    }

    /// Gives the call by which an operation is asked for.
    fn call_for(&self, operation: Operation) -> (&'static str, Value) {
        let volume = |name: &str, more: Value| {
            let mut request = json!({"dbg": "", "sr": self.site.sr, "key": self.key(name)});
            request.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
            request
        };
        let path = json!({"dbg": "", "uri": self.uri("v"), "domain": GUEST});
        let nothing = json!({});
        match operation {
            Operation::Create => {
                let create = json!({"dbg": "", "sr": self.site.sr, "name": "n", "description": "", "size": SIZE, "sharable": false});
                ("Volume.create", create)
            }
            Operation::Snapshot => ("Volume.snapshot", volume("v", nothing)),
            Operation::Clone => ("Volume.clone", volume("s", nothing)),
            Operation::Revert => ("Volume.revert", volume("v", json!({"snapshot": self.key("s")}))),
            Operation::Resize => {
                let size = self.model.volumes.get("v").map_or(SIZE, |disk| disk.size) + SIZE;
                ("Volume.resize", volume("v", json!({"new_size": size})))
            }
            Operation::Prune => ("Volume.destroy", volume("s", nothing)),
            Operation::Destroy => ("Volume.destroy", volume("v", nothing)),
            Operation::Compose => ("Volume.compose", volume("w", json!({"key2": self.key("p")}))),
            // What a write needs, where no guest has the volume; it is not struck by itself.
            Operation::Activate | Operation::Write | Operation::Receive => ("Datapath.activate", path),
            Operation::Deactivate => ("Datapath.deactivate", path),
            Operation::Gc => (GC, nothing),
            Operation::Forget => ("Volume.data_destroy", volume("s", nothing)),
        }
    }

    /// Adds a volume that is called `name` from now on.
    fn add(&mut self, name: &str, operation: Operation) -> Result<()> {
        let (method, request) = self.call_for(operation);
        let answer = self.site.call(method, &request)?;
        self.keys.insert(name.to_owned(), answer["key"].as_str().context("no key")?.to_owned());
        Ok(())
    }

    fn path(&self, method: &str, name: &str, domain: &str) -> Result<()> {
        let request = json!({"dbg": "", "uri": self.uri(name), "domain": domain});
        self.site.call(&format!("Datapath.{method}"), &request).map(drop)
    }

    /// Fills blocks of a volume, as a guest that flushes, or, if that has not got it, as one who leaves the flushing to
    /// the end of the datapath.
    fn fill(&self, name: &str, domain: &str, blocks: &[(u64, u8)]) -> Result<()> {
        let mut commands: Vec<String> =
            blocks.iter().map(|(block, byte)| format!("write -P {byte} {} {BLOCK}", block * BLOCK)).collect();
        if self.model.active && name == "v" {
            commands.push("flush".to_owned());
            return self.site.io(self.key(name), "writeback", &commands);
        }
        self.path("attach", name, domain)?;
        self.path("activate", name, domain)?;
        self.site.io(self.key(name), "unsafe", &commands)?;
        self.path("deactivate", name, domain)?;
        self.path("detach", name, domain)
    }

    /// Gives what is to be there after a write, and the blocks that it fills.
    fn written(&self, operation: Operation, name: &str, place: usize) -> Option<(Model, Vec<(u64, u8)>)> {
        let after = operation.effect(&self.model, place)?;
        let before = &self.model.volumes[name].blocks;
        let blocks = after.volumes[name].blocks.iter().map(|(block, byte)| (*block, *byte));
        let new = blocks.filter(|(block, byte)| before.get(block) != Some(byte)).collect();
        Some((after, new))
    }

    /// Carries out an operation undisturbed.
    pub fn perform(&mut self, operation: Operation, place: usize, late: Option<Disk>) -> Result<()> {
        if let Some((name, domain)) = writes(operation) {
            if let Some((after, blocks)) = self.written(operation, name, place) {
                self.fill(name, domain, &blocks)?;
                self.model = after;
            }
            return Ok(());
        }
        self.make_way(operation)?;
        let after = operation.effect(&self.model, place);
        let (method, request) = self.call_for(operation);
        match (self.site.outcome(method, &request)?, after) {
            (Outcome::Done, Some(after)) => {
                if operation == Operation::Deactivate {
                    self.path("detach", "v", GUEST)?;
                }
                self.model = after;
                self.name_new(late)
            }
            (Outcome::Refused(_), None) => Ok(()),
            (outcome, after) => bail!("{method} {request}: {outcome:?}, to be {after:?}"),
        }
    }

    /// Gives what can strike an operation, before which there were so many others.
    pub fn strikes(self, last: Operation, place: usize) -> Result<Vec<Strike>> {
        let world = self;
        if last == Operation::Write {
            let is_there = world.model.volumes.contains_key("v");
            return Ok(if is_there { vec![Strike::Daemon] } else { Vec::new() });
        }
        world.make_way(last)?;
        let (method, request) = world.call_for(last);
        let (outcome, strikes) = world.site.traced(method, &request)?;
        let is_right = match last.effect(&world.model, place) {
            Some(_) => outcome == Outcome::Done,
            None => matches!(outcome, Outcome::Refused(_)),
        };
        ensure!(is_right, "{method} {request}: {outcome:?}");
        Ok(strikes)
    }

    /// Does what comes before an operation's own call.
    fn make_way(&self, operation: Operation) -> Result<()> {
        match operation {
            Operation::Activate if self.model.volumes.contains_key("v") => self.path("attach", "v", GUEST),
            // Else there would be nothing to keep.
            Operation::Forget if self.model.volumes.contains_key("s") => {
                let request = json!({"dbg": "", "sr": self.site.sr, "key": self.key("s")});
                self.site.call("Volume.enable_cbt", &request).map(drop)
            }
            _ => Ok(()),
        }
    }

    /// Carries out an operation with a fault in its call.
    pub fn strike(&self, operation: Operation, strike: &Strike) -> Result<Outcome> {
        self.make_way(operation)?;
        let (method, request) = self.call_for(operation);
        self.site.struck(method, &request, strike)
    }

    /// Has a guest write and flush, and kills its daemon.
    pub fn write_and_kill(&self, place: usize) -> Result<()> {
        let (_, blocks) = self.written(Operation::Write, "v", place).context("there is nothing to write to")?;
        let &[(block, byte)] = blocks.as_slice() else { bail!("{blocks:?} are to be written") };
        if !self.model.active {
            self.path("attach", "v", GUEST)?;
            self.path("activate", "v", GUEST)?;
        }
        let commands = [format!("write -P {byte} {} {BLOCK}", block * BLOCK), "flush".to_owned()];
        self.site.io(self.key("v"), "unsafe", &commands)?;
        ensure!(self.site.kill_daemons(self.key("v")) == 1, "no daemon was killed");
        // It can be had again.
        self.path("attach", "v", GUEST)?;
        self.path("activate", "v", GUEST)?;
        self.site.io(self.key("v"), "writeback", &[format!("read -P {byte} {} {BLOCK}", block * BLOCK)])
    }

    /// Lists the volumes: their sizes by their keys.
    fn listed(&self) -> Result<BTreeMap<String, u64>> {
        let list = self.site.call("SR.ls", &json!({"dbg": "", "sr": self.site.sr}))?;
        let mut found = BTreeMap::new();
        for volume in list.as_array().context("no list")? {
            let key = volume["key"].as_str().context("no key")?.to_owned();
            let size = volume["virtual_size"].as_u64().context("no size")?;
            ensure!(found.insert(key.clone(), size).is_none(), "{key} is listed twice");
        }
        Ok(found)
    }

    /// Gives a key to each volume of the model that has none: those that are listed and have no name yet. There may be
    /// one more, `late`, of a call that was killed and then finished by the next.
    fn name_new(&mut self, late: Option<Disk>) -> Result<()> {
        let mut unknown: Vec<String> = self.listed()?.into_keys().collect();
        unknown.retain(|key| !self.keys.values().any(|known| known == key));
        let unnamed: Vec<String> =
            self.model.volumes.keys().filter(|name| !self.keys.contains_key(*name)).cloned().collect();
        if let Some(late) = late.filter(|_| unknown.len() == unnamed.len() + 1) {
            self.keys.insert("late".to_owned(), unknown.remove(0));
            self.model.volumes.insert("late".to_owned(), late);
        }
        ensure!(unknown.len() == unnamed.len(), "new are {unknown:?}, to be called {unnamed:?}");
        self.keys.extend(unnamed.into_iter().zip(unknown));
        Ok(())
    }

    /// Tells whether what is listed is what is to be after the operation, or, if that is something else, before it.
    pub fn look(&self, before: &Model, after: &Model) -> Result<bool> {
        let listed = self.listed()?;
        let is = |model: &Model| {
            let mut rest = listed.clone();
            let mut sizes: Vec<u64> = Vec::new();
            for (name, disk) in &model.volumes {
                match self.keys.get(name) {
                    Some(key) if rest.remove(key) == Some(disk.size) => {}
                    Some(_) => return false,
                    None => sizes.push(disk.size),
                }
            }
            rest.into_values().eq(sizes)
        };
        // A volume's content is no part of a list: what a revert or a compose was to do is seen at the end.
        match (is(after), is(before)) {
            (true, _) => Ok(true),
            (false, true) => Ok(false),
            (false, false) => bail!("listed are {listed:?}, before {before:?}, after {after:?}, of {:?}", self.keys),
        }
    }

    /// Tells whether all that the SR holds, every byte included, is what is to be there after an operation, or, if that is
    /// something else, before it. Of what was being written, each byte may be one or the other.
    pub fn stands(&self, before: &Model, after: &Model) -> Result<bool> {
        let is_after = self.look(before, after)?;
        let sr = Sr::read(&self.site.path)?;
        let listed = self.listed()?;
        let mut held = BTreeMap::new();
        for key in listed.keys() {
            let tree = sr.tree_of(key).context("a volume of no tree")?;
            if !tree.without_data.contains(key) {
                held.insert(key.as_str(), Held::of(&sr, key)?);
            }
        }
        let wrong = |model: &Model| -> Option<String> {
            let mut new: BTreeMap<_, _> =
                held.iter().filter(|(key, _)| !self.keys.values().any(|k| k == *key)).collect();
            for (name, disk) in &model.volumes {
                let found = match self.keys.get(name) {
                    Some(key) => held.get(key.as_str()),
                    None => new.pop_first().map(|(_, held)| held),
                };
                match found {
                    None if disk.is_forgotten => {}
                    Some(held) if !disk.is_forgotten && held.is(&[disk]) => {}
                    _ => return Some(format!("{name} holds {found:?}, not {disk:?}")),
                }
            }
            None
        };
        let (not_after, not_before) = (wrong(after), wrong(before));
        match (not_after, not_before) {
            (None, _) if is_after => return Ok(true),
            (_, None) => return Ok(false),
            (not_after, not_before) => {
                let both = |name: &str| [before.volumes.get(name), after.volumes.get(name)];
                let written = before.volumes.keys().all(|name| {
                    let [Some(old), Some(new)] = both(name) else { return false };
                    let held = self.keys.get(name).and_then(|key| held.get(key.as_str()));
                    held.map_or(old.is_forgotten, |held| held.is(&[old, new]))
                });
                ensure!(written, "it is not after: {not_after:?}, and not before: {not_before:?}");
            }
        }
        Ok(false)
    }

    /// Stands for a code where it was the guest that was told.
    pub const GUEST_FAILED: &str = "guest";

    /// Carries out an operation that may fail; what it did is not taken note of. A write is over as soon as a part of it
    /// fails.
    pub fn attempt(&self, operation: Operation, place: usize) -> Result<Outcome> {
        let Some((name, domain)) = writes(operation) else {
            let made = self.make_way(operation);
            let (method, request) = self.call_for(operation);
            let outcome = self.site.outcome(method, &request)?;
            return if outcome == Outcome::Done { made.map(|()| outcome) } else { Ok(outcome) };
        };
        let (_, blocks) = self.written(operation, name, place).context("there is nothing to write to")?;
        let mut commands: Vec<String> =
            blocks.iter().map(|(block, byte)| format!("write -P {byte} {} {BLOCK}", block * BLOCK)).collect();
        let io = |cache: &str, commands: &[String]| match self.site.io(self.key(name), cache, commands) {
            Ok(()) => Outcome::Done,
            Err(_) => Outcome::Refused(Self::GUEST_FAILED.to_owned()),
        };
        if self.model.active && name == "v" {
            commands.push("flush".to_owned());
            return Ok(io("writeback", &commands));
        }
        let path = |method: &str| {
            let request = json!({"dbg": "", "uri": self.uri(name), "domain": domain});
            self.site.outcome(&format!("Datapath.{method}"), &request)
        };
        let mut outcome = Outcome::Done;
        for method in ["attach", "activate"] {
            if outcome == Outcome::Done {
                outcome = path(method)?;
            }
        }
        if outcome == Outcome::Done {
            outcome = io("unsafe", &commands);
        }
        // It goes in any case.
        for method in ["deactivate", "detach"] {
            let ended = path(method)?;
            if outcome == Outcome::Done {
                outcome = ended;
            }
        }
        Ok(outcome)
    }

    /// Gives the process of the guest's storage daemon.
    pub fn daemon(&self) -> Option<i32> {
        let processes = self.site.processes().into_iter();
        let mut ours = processes.filter(|(_, command)| command.contains(self.key("v")));
        ours.next().map(|(pid, _)| pid)
    }

    /// Has the guest read once more, if there is one, and go, as whoever else has a disk.
    pub fn leave(&mut self, has_guest: bool) -> Result<()> {
        if has_guest {
            let read =
                format!("read -P {} 0 {BLOCK}", self.model.volumes["v"].blocks.get(&0).copied().unwrap_or_default());
            self.site.io(self.key("v"), "writeback", &[read]).context("the guest reads")?;
        }
        for (name, domain) in [("v", GUEST), ("v", WRITER), ("w", MIGRATION)] {
            for method in ["deactivate", "detach"] {
                let request = json!({"dbg": "", "uri": self.uri(name), "domain": domain});
                let outcome = self.site.outcome(&format!("Datapath.{method}"), &request)?;
                // What could not be flushed is told until the end.
                ensure!(outcome == Outcome::Done || method == "deactivate", "{method} {name}: {outcome:?}");
            }
        }
        self.model.active = false;
        Ok(())
    }

    /// Asks for an operation again, undisturbed, and takes note of what there is then. The same request finishes what was
    /// begun, if that was killed.
    pub fn repeat(&mut self, operation: Operation, place: usize, was_done: bool, outcome: &Outcome) -> Result<()> {
        // What was done already is not done once more, but for what makes a volume each time.
        if was_done && !operation.adds() {
            let (method, request) = self.request_again(operation);
            let outcome = self.site.outcome(method, &request)?;
            let is_refused = matches!(outcome, Outcome::Refused(_));
            let may_be = operation.effect(&self.model, place).is_none();
            ensure!(outcome == Outcome::Done || (is_refused && may_be), "{method} {request}: {outcome:?}");
            return Ok(());
        }
        self.name_new(None)?;
        let is_unsure = *outcome == Outcome::Killed && operation.adds();
        let made =
            operation.effect(&self.model, place).and_then(|after| after.volumes.get(&format!("new{place}")).cloned());
        self.perform(operation, if was_done { place + 1 } else { place }, made.filter(|_| is_unsure))
    }

    /// Gives the same request once more: a resize names the size that the volume has by now.
    fn request_again(&self, operation: Operation) -> (&'static str, Value) {
        let (method, mut request) = self.call_for(operation);
        if operation == Operation::Resize {
            request["new_size"] = self.model.volumes.get("v").map_or(SIZE, |disk| disk.size).into();
        }
        (method, request)
    }

    /// Closes everything and judges it: what is listed, every byte, every image, every record; and then removes it all.
    pub fn end(mut self) -> Result<()> {
        for domain in [GUEST, WRITER] {
            self.path("deactivate", "v", domain)?;
            self.path("detach", "v", domain)?;
        }
        self.model.active = false;
        self.site.attach().context("SR.attach at the end")?;
        self.name_new(None)?;
        let listed = self.listed()?;
        ensure!(listed.len() == self.model.volumes.len(), "listed are {listed:?}, to be {:?}", self.model);
        let sr = Sr::read(&self.site.path)?;
        ensure!(sr.contradictions()?.is_empty(), "{:?}", sr.contradictions()?);
        ensure!(sr.check()?.is_empty(), "{:?}", sr.check()?);
        for (name, disk) in &self.model.volumes {
            let size = listed.get(self.key(name));
            ensure!(size == Some(&disk.size), "{name} has {size:?} bytes, not {}", disk.size);
            if !disk.is_forgotten {
                let held = Held::of(&sr, self.key(name)).with_context(|| name.clone())?;
                ensure!(held.is(&[disk]), "{name} holds {held:?}, not {disk:?}");
            }
        }
        self.site.nothing_is_left()?;
        for key in listed.keys() {
            let request = json!({"dbg": "", "sr": self.site.sr, "key": key});
            self.site.call("Volume.destroy", &request)?;
        }
        for directory in ["volumes", "trees"] {
            let left: Vec<_> =
                fs::read_dir(self.site.path.join(directory))?.flatten().map(|entry| entry.path()).collect();
            ensure!(left.is_empty(), "left over: {left:?}");
        }
        self.site.call("SR.detach", &json!({"dbg": "", "sr": self.site.sr}))?;
        self.site.nothing_is_left()
    }

    /// Describes what the record files say, without any name that differs from run to run.
    pub fn shape(&self) -> Result<String> {
        let sr = Sr::read(&self.site.path)?;
        let name_of = |key: &str| self.keys.iter().find(|(_, known)| *known == key).map_or("?", |(name, _)| name);
        let mut trees = Vec::new();
        for tree in sr.trees() {
            let mut of_node: BTreeMap<&str, &str> = BTreeMap::new();
            for (volume, node) in &tree.volumes {
                // Which of the new ones it is does not matter.
                of_node.insert(node, name_of(volume).trim_end_matches(char::is_numeric));
            }
            let describe = |node: &str| {
                let mut words = Vec::new();
                let mut next = Some(node);
                while let Some(node) = next {
                    words.push(of_node.get(node).copied().unwrap_or("-").to_owned());
                    next = tree.parent(node, fake_xapi::disk::Links::Records);
                }
                words.join("<")
            };
            let mut nodes: Vec<String> = tree.nodes.keys().map(|node| describe(node)).collect();
            nodes.sort();
            let sizes: BTreeSet<u64> = tree.nodes.values().map(|node| node.virtual_size).collect();
            trees.push(format!("{} of {sizes:?}", nodes.join(" ")));
        }
        trees.sort();
        // A merge does other things where there is data.
        let small = Model::small();
        let is_other = |name: &str| {
            let blocks = |model: &Model| model.volumes.get(name).map(|disk| disk.blocks.clone());
            blocks(&self.model) != blocks(&small)
        };
        let changed: Vec<&str> = ["v", "s", "w"].into_iter().filter(|name| is_other(name)).collect();
        Ok(format!("{} {} {changed:?}", self.model.active, trees.join("; ")))
    }
}

/// Tells which operations are writes: to which volume, for which domain.
fn writes(operation: Operation) -> Option<(&'static str, &'static str)> {
    match operation {
        Operation::Write => Some(("v", WRITER)),
        Operation::Receive => Some(("w", MIGRATION)),
        _ => None,
    }
}

/// What a volume was found to hold.
#[derive(Debug)]
struct Held {
    size: u64,
    /// The bytes in each block, where they are not all zeroes.
    blocks: BTreeMap<u64, BTreeSet<u8>>,
}

impl Held {
    fn of(sr: &Sr, key: &str) -> Result<Self> {
        let raw = RawCopy::of(&sr.node_of(key)?.image)?;
        let mut blocks: BTreeMap<u64, BTreeSet<u8>> = BTreeMap::new();
        let mut seen: BTreeMap<u64, u64> = BTreeMap::new();
        raw.each_piece(|offset, data| {
            for (index, part) in data.chunks(PART as usize).enumerate() {
                let block = (offset + index as u64 * PART) / BLOCK;
                let bytes: BTreeSet<u8> = part.iter().copied().collect();
                blocks.entry(block).or_default().extend(bytes);
                *seen.entry(block).or_default() += part.len() as u64;
            }
            Ok(())
        })?;
        for (block, bytes) in &mut blocks {
            // The rest is a hole.
            if seen[block] < BLOCK {
                bytes.insert(0);
            }
        }
        blocks.retain(|_, bytes| bytes.iter().any(|byte| *byte != 0));
        Ok(Self { size: raw.size(), blocks })
    }

    /// Tells whether each byte is that of one of the disks.
    fn is(&self, disks: &[&Disk]) -> bool {
        let numbers: BTreeSet<&u64> =
            self.blocks.keys().chain(disks.iter().flat_map(|disk| disk.blocks.keys())).collect();
        let zero = BTreeSet::from([0]);
        let of = |disk: &Disk, number| disk.blocks.get(number).copied().unwrap_or_default();
        disks.iter().any(|disk| disk.size == self.size)
            && numbers.into_iter().all(|number| {
                let may: BTreeSet<u8> = disks.iter().map(|disk| of(disk, number)).collect();
                self.blocks.get(number).unwrap_or(&zero).is_subset(&may)
            })
    }
}
