//! What is there, held against what is to be there: the one judgement of all that is done to an SR here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result, bail, ensure};
use fake_xapi::disk::{Links, Sr};
use serde_json::json;

use super::held::Held;
use super::operation::{Disk, Model};
use super::world::{GUEST, WRITER, World};

impl World {
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
    pub fn name_new(&mut self, late: Option<Disk>) -> Result<()> {
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
                    next = tree.parent(node, Links::Records);
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
