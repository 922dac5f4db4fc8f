//! Everything that can be done to a destination, in any order: nothing that is ever said of a content is untrue.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use plugin::activation;
use plugin::id::ContentId;
use plugin::mirror::{Announcement, Base};
use serde_json::{Value, json};

use super::disk::{Disk, MIRROR};
use super::support::{Bench, Guest, MIB, SPEAKING};

/// How many steps a walk has.
const STEPS: u32 = 40;

/// Numbers that are the same on every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % bound
    }

    fn is(&mut self, chance: usize) -> bool {
        self.below(chance) == 0
    }
}

/// A mirror that goes on.
struct Mirror {
    client: Guest,
    /// What it read when it came.
    announced: Option<Announcement>,
    /// What its source believes to be there.
    believed: Vec<u8>,
}

impl Mirror {
    fn write(&mut self, dice: &mut Dice) {
        for _ in 0..=dice.below(2) {
            let (pattern, at) = (u8::try_from(dice.below(255)).unwrap(), dice.below(16) * 65536);
            self.client.write(pattern, at as u64, 65536);
            let end = self.believed.len().max(at + 65536);
            self.believed.resize(end, 0);
            self.believed[at..at + 65536].fill(pattern);
        }
    }
}

/// What is known of contents to everybody together: sources that finished a mirror in a session, and the SR.
struct Walk<'a> {
    bench: &'a Bench,
    disk: Disk<'a>,
    dice: Dice,
    /// What each name stands for, without the zeroes at its end.
    contents: BTreeMap<ContentId, Vec<u8>>,
    /// A mirror that goes on, in the session that it read of.
    held: Option<Mirror>,
    /// How often something was announced, and how often the base was known.
    announced: u32,
    known: u32,
    log: Vec<String>,
}

impl Walk<'_> {
    fn note(&mut self, text: impl Into<String>) {
        self.log.push(text.into());
    }

    /// Gives what the export reads as.
    fn exported(&self) -> Vec<u8> {
        let path = self.bench.path.join("../exported");
        convert(&["-f", "raw", &self.disk.nbd()], path.to_str().unwrap())
    }

    /// Holds a name against what it stands for, or learns what that is.
    fn hold(&mut self, name: ContentId, found: Vec<u8>, who: &str) {
        let log = self.log.join("\n");
        let known = self.contents.entry(name).or_insert_with(|| found.clone());
        assert!(*known == found, "{who} is said to hold {name}, and does not, after\n{log}");
    }

    /// Holds every name in the SR against what its node reads as.
    fn check_names(&mut self) {
        let trees: Vec<_> =
            fs::read_dir(self.bench.path.join("trees")).unwrap().map(|tree| tree.unwrap().path()).collect();
        for directory in trees {
            let tree: Value = serde_json::from_slice(&fs::read(directory.join("tree.json")).unwrap()).unwrap();
            for (node, record) in tree["nodes"].as_object().unwrap() {
                let Some(name) = record["content"].as_str() else { continue };
                let file = directory.join(format!("{node}.qcow2"));
                let path = self.bench.path.join("../node");
                let found = convert(&["-U", "-f", "qcow2", file.to_str().unwrap()], path.to_str().unwrap());
                self.hold(name.parse().unwrap(), found, node);
            }
        }
    }

    /// Connects as a mirror's source does, which believes what the export says.
    fn come(&mut self) -> Mirror {
        self.disk.attach(MIRROR);
        let announced = self.disk.announced();
        let believed = self.exported();
        if let Some(announcement) = announced {
            self.note(format!("  {announcement}"));
            self.announced += 1;
            match announcement.base {
                Base::Unknown => {}
                Base::Blank => assert!(believed.is_empty(), "it is not blank, after\n{}", self.log.join("\n")),
                Base::Content(name) => {
                    self.known += u32::from(self.contents.contains_key(&name));
                    self.hold(name, believed.clone(), "the export");
                }
            }
            // A mirror is begun in it: what was known of the session does not hold any more.
            self.contents.remove(&announcement.session);
        }
        Mirror { client: self.disk.client(), announced, believed }
    }

    /// Connects a guest and writes.
    fn guest(&mut self) -> Guest {
        self.disk.activate("7");
        let mut client = self.disk.client();
        client.write(u8::try_from(self.dice.below(255)).unwrap(), self.dice.below(16) as u64 * 65536, 65536);
        client
    }

    /// One mirror: to its end, or broken off.
    fn mirror(&mut self) {
        self.let_go(true);
        let mut mirror = self.come();
        if !self.dice.is(5) {
            mirror.write(&mut self.dice);
        }
        self.held = Some(mirror);
        if !self.dice.is(3) {
            let is_complete = !self.dice.is(4);
            self.let_go(is_complete);
        }
    }

    /// Ends the mirror that goes on, if any. When it is complete its source remembers what it sent.
    fn let_go(&mut self, is_complete: bool) {
        let Some(mut mirror) = self.held.take() else { return };
        self.note(format!("  ends, complete: {is_complete}"));
        if mirror.client.is_cut_off() {
            mirror.client.abandon();
        } else {
            mirror.write(&mut self.dice);
            if is_complete && let Some(announced) = mirror.announced {
                trim(&mut mirror.believed);
                self.contents.insert(announced.session, mirror.believed);
            }
            mirror.client.disconnect();
        }
        self.disk.wait_for_clients();
    }

    /// Goes on with another volume, or a new one.
    fn move_on(&mut self, key: &str) {
        self.let_go(true);
        self.disk.release(MIRROR);
        self.disk.release("7");
        activation::close(&self.disk.host, self.disk.uri).unwrap();
        self.disk = Disk::of(self.bench, key);
        self.disk.plug();
    }

    fn another(&mut self) -> String {
        let keys = self.bench.keys();
        keys[self.dice.below(keys.len())].clone()
    }

    /// Makes a call about the volume, which is killed in the middle once in a while; it may be refused.
    fn call(&mut self, method: &str, more: Value) {
        let mut request = self.bench.request(json!({"key": self.disk.key}));
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        if self.dice.is(2) {
            let at = u32::try_from(self.dice.below(60)).unwrap() + 1;
            self.note(format!("  killed at {at}"));
            self.bench.host.kill_at(method, &request, SPEAKING, at);
        } else {
            let _ = self.bench.host.try_call(method, request);
        }
    }

    fn step(&mut self) {
        let choice = self.dice.below(15);
        let name = [
            "mirror",
            "mirror",
            "mirror",
            "mirror again",
            "snapshot",
            "snapshot",
            "clone",
            "reopen",
            "guest",
            "guest stays",
            "crash",
            "revert",
            "resize",
            "forgetful",
            "clone of this",
        ][choice];
        self.note(name);
        match name {
            "mirror" => self.mirror(),
            "mirror again" => {
                self.mirror();
                self.let_go(true);
                self.mirror();
            }
            "snapshot" => self.call("Volume.snapshot", json!({})),
            "clone" => {
                let from = self.another();
                let clone = self.bench.clone_of(&from);
                self.move_on(&clone);
            }
            "clone of this" => self.call("Volume.clone", json!({})),
            "reopen" => {
                self.let_go(true);
                self.disk.deactivate(MIRROR);
                if self.dice.is(2) {
                    self.disk.release(MIRROR);
                }
                self.check_names();
                if self.dice.is(2) {
                    self.disk.activate_readonly(MIRROR);
                    self.disk.deactivate(MIRROR);
                }
                self.disk.plug();
            }
            "guest" | "guest stays" => {
                let mut client = self.guest();
                if name == "guest" {
                    client.disconnect();
                    self.disk.release("7");
                } else {
                    self.call("Volume.snapshot", json!({}));
                    client.write(7, 0, 65536);
                    self.disk.release("7");
                    client.abandon();
                }
                self.disk.activate(MIRROR);
            }
            "crash" => {
                if let Some(mirror) = self.held.take() {
                    mirror.client.abandon();
                }
                self.disk.kill_daemon();
                if self.dice.is(2) {
                    self.disk.release(MIRROR);
                }
                self.disk.plug();
            }
            "revert" => {
                let snapshot = self.another();
                self.let_go(true);
                self.disk.release(MIRROR);
                self.call("Volume.revert", json!({"snapshot": snapshot}));
                self.disk.plug();
            }
            "resize" => {
                if self.dice.is(2) {
                    self.let_go(true);
                }
                let size = self.bench.call("Volume.stat", json!({"key": self.disk.key}))["virtual_size"].as_u64();
                self.call("Volume.resize", json!({"new_size": size.unwrap() + 65536}));
            }
            _ => {
                self.let_go(true);
                self.disk.release(MIRROR);
                activation::open(&self.disk.host, self.disk.uri, self.dice.is(3)).unwrap();
                self.disk.plug();
                self.disk.write(9, 0, 65536);
                self.call("Volume.snapshot", json!({}));
                self.disk.release(MIRROR);
                activation::close(&self.disk.host, self.disk.uri).unwrap();
                self.disk.plug();
            }
        }
    }
}

/// Reads an image whole, without the zeroes at its end.
fn convert(from: &[&str], to: &str) -> Vec<u8> {
    let output = Command::new("qemu-img").arg("convert").args(from).args(["-O", "raw", to]).output().unwrap();
    assert!(output.status.success(), "{from:?}: {output:?}");
    let mut bytes = fs::read(to).unwrap();
    trim(&mut bytes);
    bytes
}

/// Takes the zeroes at the end away.
fn trim(bytes: &mut Vec<u8>) {
    let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    bytes.truncate(end);
}

/// Walks, and gives how often something was announced and how often the base was known.
fn walk(seed: u64) -> (u32, u32) {
    let bench = Bench::new();
    let disk = Disk::of(&bench, &bench.create(MIB));
    disk.plug();
    let dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut walk = Walk {
        bench: &bench,
        disk,
        dice,
        contents: BTreeMap::new(),
        held: None,
        announced: 0,
        known: 0,
        log: Vec::new(),
    };
    for step in 0..STEPS {
        walk.step();
        if step % 8 == 0 {
            walk.check_names();
        }
    }
    walk.let_go(true);
    walk.disk.release(MIRROR);
    walk.check_names();
    (walk.announced, walk.known)
}

#[test]
fn a_walk_never_meets_an_untrue_promise() {
    let first = std::env::var("CONTENT_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let walks = std::env::var("CONTENT_WALKS").ok().and_then(|text| text.parse().ok()).unwrap_or(3);
    let (mut announced, mut known) = (0, 0);
    for seed in first..first + walks {
        let met = walk(seed);
        announced += met.0;
        known += met.1;
    }
    assert!(announced > 10 && known > 3, "{announced} and {known} are too few to show anything");
}
