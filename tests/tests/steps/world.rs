//! The small SR in the middle of a history, and the one judgement of what was made of it.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, bail, ensure};
use fake_xapi::disk::{RawCopy, Sr};
use serde_json::{Value, json};

use super::operation::{BLOCK, Disk, Model, Operation, SIZE};
use super::site::{Outcome, Site, Strike};
use super::{History, told};

/// The guest's domain.
const GUEST: &str = "7";
/// The domain for which a volume that no guest has is written to.
const WRITER: &str = "8";

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
    let operation = |word: &&str| {
        let found = Operation::ALL.into_iter().find(|operation| format!("{operation:?}") == *word);
        found.with_context(|| format!("{word} is no operation"))
    };
    let mut history = words.iter().map(operation).collect::<Result<History>>()?;
    let last = history.pop().context("no operation")?;
    debug_assert_eq!(told(&history, last, &strike), case);
    Ok((history, last, strike))
}

impl World {
    /// Makes the small SR.
    pub fn small() -> Result<Self> {
        let mut world = Self { site: Site::new(None)?, model: Model::default(), keys: BTreeMap::new() };
        for name in ["v", "w", "p"] {
            world.add(name, Operation::Create)?;
        }
        world.fill("v", &[(0, 1), (1, 1)])?;
        world.add("s", Operation::Snapshot)?;
        world.fill("v", &[(1, 2), (2, 2)])?;
        world.fill("w", &[(3, 3)])?;
        world.fill("p", &[(3, 4), (4, 4)])?;
        world.model = Model::small();
        Ok(world)
    }

    /// Carries out a history on a copy of the small SR; what is refused is to be refused.
    pub fn after(small: &Self, history: &[Operation]) -> Result<Self> {
        let mut world =
            Self { site: Site::new(Some(&small.site))?, model: small.model.clone(), keys: small.keys.clone() };
        for (place, operation) in history.iter().enumerate() {
            world.perform(*operation, place, None).with_context(|| format!("{operation:?} in the history"))?;
        }
        Ok(world)
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
            Operation::Activate | Operation::Write => ("Datapath.activate", path),
            Operation::Deactivate => ("Datapath.deactivate", path),
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

    /// Fills blocks of a volume as a guest does, who flushes.
    fn fill(&self, name: &str, blocks: &[(u64, u8)]) -> Result<()> {
        let mut commands: Vec<String> =
            blocks.iter().map(|(block, byte)| format!("write -P {byte} {} {BLOCK}", block * BLOCK)).collect();
        commands.push("flush".to_owned());
        if self.model.active && name == "v" {
            return self.site.io(self.key(name), &commands);
        }
        self.path("attach", name, WRITER)?;
        self.path("activate", name, WRITER)?;
        self.site.io(self.key(name), &commands)?;
        self.path("deactivate", name, WRITER)?;
        self.path("detach", name, WRITER)
    }

    fn written(&self, place: usize) -> Result<Option<(Model, u64, u8)>> {
        let Some(after) = Operation::Write.effect(&self.model, place) else { return Ok(None) };
        let block = 5 + place as u64;
        let byte = *after.volumes["v"].blocks.get(&block).context("nothing is written")?;
        Ok(Some((after, block, byte)))
    }

    /// Carries out an operation undisturbed.
    fn perform(&mut self, operation: Operation, place: usize, late: Option<Disk>) -> Result<()> {
        if operation == Operation::Write {
            if let Some((after, block, byte)) = self.written(place)? {
                self.fill("v", &[(block, byte)])?;
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

    /// Gives what can strike the last operation of a history.
    pub fn strikes(small: &Self, history: &[Operation], last: Operation) -> Result<Vec<Strike>> {
        let world = Self::after(small, history)?;
        if last == Operation::Write {
            let is_there = world.model.volumes.contains_key("v");
            return Ok(if is_there { vec![Strike::Daemon] } else { Vec::new() });
        }
        world.make_way(last)?;
        let (method, request) = world.call_for(last);
        let (outcome, strikes) = world.site.traced(method, &request)?;
        let is_right = match last.effect(&world.model, history.len()) {
            Some(_) => outcome == Outcome::Done,
            None => matches!(outcome, Outcome::Refused(_)),
        };
        ensure!(is_right, "{method} {request}: {outcome:?}");
        Ok(strikes)
    }

    /// Does what comes before an operation's own call.
    fn make_way(&self, operation: Operation) -> Result<()> {
        if operation == Operation::Activate && self.model.volumes.contains_key("v") {
            return self.path("attach", "v", GUEST);
        }
        Ok(())
    }

    /// Carries out an operation with a fault in its call.
    pub fn strike(&self, operation: Operation, strike: &Strike) -> Result<Outcome> {
        self.make_way(operation)?;
        let (method, request) = self.call_for(operation);
        self.site.struck(method, &request, strike)
    }

    /// Has a guest write and flush, and kills its daemon.
    pub fn write_and_kill(&self, place: usize) -> Result<()> {
        let (_, block, byte) = self.written(place)?.context("there is nothing to write to")?;
        if !self.model.active {
            self.path("attach", "v", GUEST)?;
            self.path("activate", "v", GUEST)?;
        }
        let commands = [format!("write -P {byte} {} {BLOCK}", block * BLOCK), "flush".to_owned()];
        self.site.io(self.key("v"), &commands)?;
        ensure!(self.site.kill_daemons(self.key("v")) == 1, "no daemon was killed");
        // It can be had again.
        self.path("attach", "v", GUEST)?;
        self.path("activate", "v", GUEST)?;
        self.site.io(self.key("v"), &[format!("read -P {byte} {} {BLOCK}", block * BLOCK)])
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
            compare(&sr, self.key(name), disk).with_context(|| name.clone())?;
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
            trees.push(nodes.join(" "));
        }
        trees.sort();
        Ok(format!("{} {}", self.model.active, trees.join("; ")))
    }
}

/// Compares a volume with what it is to hold.
fn compare(sr: &Sr, key: &str, disk: &Disk) -> Result<()> {
    let raw = RawCopy::of(&sr.node_of(key)?.image)?;
    ensure!(raw.size() == disk.size, "it reads as {} bytes, not {}", raw.size(), disk.size);
    let mut rest = disk.blocks.clone();
    let mut wrong = Vec::new();
    raw.each_piece(|offset, data| {
        for (index, block) in data.chunks(BLOCK as usize).enumerate() {
            let number = offset / BLOCK + index as u64;
            let byte = rest.remove(&number).unwrap_or_default();
            if block.iter().any(|read| *read != byte) {
                wrong.push(number);
            }
        }
        Ok(())
    })?;
    ensure!(wrong.is_empty() && rest.is_empty(), "blocks {wrong:?} are wrong, {rest:?} are missing");
    Ok(())
}
