//! The small SR in the middle of a history: operations carried out, struck, tried and repeated.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::operation::{BLOCK, Disk, Model, Operation, SIZE};
use super::site::{GC, Outcome, Site, Strike};
use super::{History, told};

/// The guest's domain.
pub const GUEST: &str = "7";
/// The domain for which a volume that no guest has is written to.
pub const WRITER: &str = "8";
/// That of a migration.
pub const MIGRATION: &str = "MIR0a1b2c";

/// An SR with volumes, and what they are to hold.
pub struct World {
    pub site: Site,
    /// What is to be there.
    pub model: Model,
    /// The volumes' keys, by what they are called here; those that are gone included.
    pub keys: BTreeMap<String, String>,
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

    /// Gives a volume's key.
    pub fn key(&self, name: &str) -> &str {
        // A uuid that nobody has stands for a volume that never was.
        self.keys.get(name).map_or("00000000-0000-4000-8000-000000000000", String::as_str)
    }

    /// Gives the URI of a volume's datapath.
    pub fn uri(&self, name: &str) -> String {
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

    /// Makes a call about a datapath.
    pub fn path(&self, method: &str, name: &str, domain: &str) -> Result<()> {
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
        self.site.processes().iter().find(|process| process.is_told(self.key("v"))).map(|process| process.pid)
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
}

/// Tells which operations are writes: to which volume, for which domain.
fn writes(operation: Operation) -> Option<(&'static str, &'static str)> {
    match operation {
        Operation::Write => Some(("v", WRITER)),
        Operation::Receive => Some(("w", MIGRATION)),
        _ => None,
    }
}
