//! Which volume's content is based on which other volume's.

use std::collections::BTreeMap;

use super::{Links, Sr};

/// The parents of volumes; a node that no volume names is passed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    parents: BTreeMap<String, Option<String>>,
}

impl Topology {
    /// Reads the parents of all volumes from headers or from records.
    pub fn of(sr: &Sr, links: Links) -> Self {
        let mut parents = BTreeMap::new();
        for tree in sr.trees() {
            let owners: BTreeMap<&str, &str> =
                tree.volumes.iter().map(|(volume, node)| (node.as_str(), volume.as_str())).collect();
            for (volume, node) in &tree.volumes {
                let mut parent = tree.parent(node, links);
                // A circle of links would never end otherwise; no chain is longer than there are nodes.
                let mut left = tree.nodes.len();
                while let Some(hidden) = parent.filter(|node| !owners.contains_key(node) && left > 0) {
                    parent = tree.parent(hidden, links);
                    left -= 1;
                }
                let owner = parent.and_then(|node| owners.get(node)).map(|owner| (*owner).to_owned());
                parents.insert(volume.clone(), owner);
            }
        }
        Self { parents }
    }

    /// Makes one by hand, as a plan's model has it.
    pub fn new(parents: impl IntoIterator<Item = (String, Option<String>)>) -> Self {
        Self { parents: parents.into_iter().collect() }
    }

    /// The volumes and their parents.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        self.parents.iter().map(|(volume, parent)| (volume.as_str(), parent.as_deref()))
    }

    /// The volume that a volume is based on.
    pub fn parent(&self, volume: &str) -> Option<&str> {
        self.parents.get(volume)?.as_deref()
    }

    /// Whether the volume is known.
    pub fn has(&self, volume: &str) -> bool {
        self.parents.contains_key(volume)
    }

    /// The volumes based on a volume, or on none.
    pub fn children(&self, parent: Option<&str>) -> Vec<&str> {
        self.iter().filter(|(_, of)| *of == parent).map(|(volume, _)| volume).collect()
    }

    /// The same with other names; what has no other name is left out, and its children belong to whatever it is based on.
    pub fn renamed(&self, name: impl Fn(&str) -> Option<String>) -> Self {
        let mut parents = BTreeMap::new();
        for volume in self.parents.keys() {
            let Some(new) = name(volume) else { continue };
            let mut parent = self.parent(volume);
            let mut left = self.parents.len();
            while let Some(dropped) = parent.filter(|volume| name(volume).is_none() && left > 0) {
                parent = self.parent(dropped);
                left -= 1;
            }
            parents.insert(new, parent.and_then(&name));
        }
        Self { parents }
    }

    /// Where another one differs, for people; nothing if they are the same.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let tell = |parent: Option<&str>| parent.unwrap_or("nothing").to_owned();
        let mut found = Vec::new();
        for (volume, parent) in self.iter() {
            if !other.has(volume) {
                found.push(format!("{volume} is missing"));
            } else if other.parent(volume) != parent {
                let (there, here) = (tell(other.parent(volume)), tell(parent));
                found.push(format!("{volume} is based on {there}, not on {here}"));
            }
        }
        found.extend(
            other.iter().filter(|(volume, _)| !self.has(volume)).map(|(volume, _)| format!("{volume} is new")),
        );
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(parents: &[(&str, Option<&str>)]) -> Topology {
        Topology::new(parents.iter().map(|(volume, parent)| ((*volume).to_owned(), parent.map(str::to_owned))))
    }

    #[test]
    fn differences_name_what_is_missing_moved_and_new() {
        let one = topology(&[("a", None), ("b", Some("a")), ("c", Some("b"))]);
        let other = topology(&[("a", None), ("b", Some("a")), ("d", Some("b"))]);
        assert_eq!(one.differences(&one), [""; 0]);
        assert_eq!(one.differences(&other), ["c is missing", "d is new"]);
        let moved = topology(&[("a", None), ("b", Some("a")), ("c", Some("a"))]);
        assert_eq!(one.differences(&moved), ["c is based on a, not on b"]);
        assert_eq!(moved.children(Some("a")), ["b", "c"]);
    }

    #[test]
    fn renaming_contracts_what_has_no_new_name() {
        let one = topology(&[("a", None), ("b", Some("a")), ("c", Some("b"))]);
        let renamed = one.renamed(|volume| (volume != "b").then(|| volume.to_uppercase()));
        assert_eq!(renamed, topology(&[("A", None), ("C", Some("A"))]));
    }
}
