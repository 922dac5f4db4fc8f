//! A tree's record, made anew when it is lost or torn: from the headers of its files, and from what else still tells.
//!
//! ```text
//!   headers of <node>.qcow2 ──► nodes, parents, sizes
//!   daemons of this host    ──┐
//!   the torn record         ──┼► which volume is on which node, its name, its keys, who has it active
//!   the copy beside it      ──┘
//!   symlinks in volumes/    ──► which volumes there are
//! ```
//!
//! Where the copy agrees with all files and symlinks it is the record. Else it is of a moment before: a volume whose node
//! has a child since has moved to that, as a volume does in every operation that adds one. A node that nothing tells
//! anything of becomes a volume of its own, which says so by its name; also where others lie on it, for it may be a
//! snapshot, and a node that is nobody's is merged into another sooner or later. No file of a node is touched.

use std::collections::{BTreeMap, BTreeSet};

use serde::de::DeserializeOwned;

use super::tree::{Node, Tree, Volume};
use crate::id::{NodeId, VolumeKey};

/// What the name of a volume begins with of which only the data was found.
pub const RECOVERED: &str = "recovered";

/// What is left of a tree.
#[derive(Clone, Debug, Default)]
pub(super) struct Remains {
    /// The nodes whose files have a header that can be read.
    pub nodes: BTreeMap<NodeId, Node>,
    /// The nodes whose files are there, and cannot be read.
    pub unreadable: BTreeSet<NodeId>,
    /// The nodes of which there is a record of changes.
    pub pasts: BTreeSet<NodeId>,
    /// The volumes whose symlinks lead to the tree.
    pub linked: BTreeSet<VolumeKey>,
    /// The node that a daemon of this host writes a volume's data to.
    pub open: BTreeMap<VolumeKey, NodeId>,
    /// The volumes that a torn record still tells of.
    pub torn: BTreeMap<VolumeKey, Volume>,
    /// The copy of the record.
    pub copy: Option<Tree>,
}

/// A tree that was made anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rebuilt {
    /// The record.
    pub tree: Tree,
    /// Whether the copy was found to be the record: then nothing is guessed.
    pub is_exact: bool,
    /// Volumes that were made for data of which it is not known whose it is.
    pub recovered: BTreeSet<VolumeKey>,
    /// Volumes that there were, and of which no data was found.
    pub lost: BTreeSet<VolumeKey>,
}

/// Makes a tree of what is left of it.
///
/// # Errors
///
/// Why there can be none, in words.
pub(super) fn rebuild(remains: &Remains) -> Result<Rebuilt, String> {
    if let Some(copy) = remains.copy.as_ref().filter(|copy| agrees(copy, remains)) {
        return Ok(Rebuilt { tree: copy.clone(), is_exact: true, recovered: BTreeSet::new(), lost: BTreeSet::new() });
    }
    let mut nodes = remains.nodes.clone();
    for id in &remains.unreadable {
        let known = remains.copy.as_ref().and_then(|copy| copy.nodes.get(id));
        let node = known.ok_or_else(|| format!("the file of node {id} cannot be read"))?;
        nodes.insert(*id, Node::new(node.parent, node.virtual_size));
    }
    let orphan = nodes.iter().find_map(|(id, node)| Some((id, node.parent.filter(|p| !nodes.contains_key(p))?)));
    if let Some((id, parent)) = orphan {
        return Err(format!("node {id} lies on node {parent}, whose file is not there"));
    }
    let Some(some_node) = nodes.keys().next().copied() else {
        return Err("it has no file of any node".to_owned());
    };
    let mut tree = Tree::of_one(VolumeKey::random(), Volume { node: some_node, ..unknown("", "") }, 1);
    tree.volumes.clear();
    tree.nodes = nodes;
    place_volumes(&mut tree, remains);
    let recovered = name_the_rest(&mut tree, remains.copy.as_ref());
    if let Some(copy) = &remains.copy {
        keep_what_fits(&mut tree, copy, remains);
    }
    tree.format = tree.needed_format();
    tree.check()?;
    let known = remains.linked.iter().chain(remains.torn.keys());
    let lost = known.copied().filter(|key| !tree.volumes.contains_key(key)).collect();
    Ok(Rebuilt { tree, is_exact: false, recovered, lost })
}

/// Tells whether a copy of the record is what the files and symlinks say, and the daemons and the torn record too.
fn agrees(copy: &Tree, remains: &Remains) -> bool {
    let files: BTreeSet<NodeId> = remains.nodes.keys().chain(&remains.unreadable).copied().collect();
    let same = |(id, node): (&NodeId, &Node)| match remains.nodes.get(id) {
        Some(found) => (found.parent, found.virtual_size) == (node.parent, node.virtual_size),
        None => remains.unreadable.contains(id),
    };
    // A resize that was begun may have been done.
    let nodes = files == copy.referenced_nodes() && (copy.intent.is_some() || copy.nodes.iter().all(same));
    let open = remains.open.iter().all(|(key, node)| {
        let scratch = copy.scratch.get(key).and_then(|scratch| scratch.node);
        copy.volumes.get(key).is_some_and(|volume| scratch.unwrap_or(volume.node) == *node) || copy.intent.is_some()
    });
    nodes
        && open
        && remains.linked == copy.referenced_volumes()
        && remains.torn.iter().all(|(key, volume)| copy.volumes.get(key) == Some(volume))
        && copy.history.keys().all(|id| remains.pasts.contains(id))
}

/// Puts the volumes that are known on their nodes.
fn place_volumes(tree: &mut Tree, remains: &Remains) {
    let copied = remains.copy.as_ref().map(|copy| copy.volumes.clone()).unwrap_or_default();
    let scratch = |key| remains.copy.as_ref().is_some_and(|copy| copy.scratch.contains_key(key));
    // What is surest comes first: nobody else gets its node.
    for (key, node) in &remains.open {
        if scratch(key) {
            continue;
        }
        let known = remains.torn.get(key).or(copied.get(key)).cloned();
        let volume = known.unwrap_or_else(|| unknown(RECOVERED, &format!("volume {key}, found active")));
        place(tree, *key, Volume { node: *node, ..volume });
    }
    for (key, volume) in &remains.torn {
        place(tree, *key, volume.clone());
    }
    // One that was reverted has left no node behind: the new one is on that of its snapshot, which did not move.
    let is_reverted = |(key, volume): (&VolumeKey, &Volume)| {
        remains.linked.contains(key) && !volume.data_destroyed && !tree.nodes.contains_key(&volume.node)
    };
    let may_have_moved = !copied.iter().any(is_reverted);
    let mut vacated = Vec::new();
    for (key, volume) in copied.iter().filter(|(key, _)| !remains.torn.contains_key(key)) {
        let is_new =
            |id: &NodeId| may_have_moved && remains.copy.as_ref().is_some_and(|copy| !copy.nodes.contains_key(id));
        let mut node = volume.node;
        // Each other operation that adds a node moves the volume to it, or leaves both to read the same.
        while let [only] = tree.children(node).filter(is_new).collect::<Vec<_>>()[..] {
            node = only;
        }
        if place(tree, *key, Volume { node, ..volume.clone() }) && node != volume.node {
            vacated.push(volume.node);
        }
    }
    keep_scratch(tree, remains);
    let missing: Vec<VolumeKey> =
        remains.linked.iter().copied().filter(|key| !tree.volumes.contains_key(key)).collect();
    vacated.retain(|node| !tree.is_named(*node));
    let leaves: Vec<NodeId> = unnamed(tree).into_iter().filter(|node| !tree.is_frozen(*node)).collect();
    // One volume and one place for it: a snapshot has the node that its volume has left, another volume a leaf.
    if let [key] = missing[..]
        && let ([node], _) | ([], [node]) = (&vacated[..], &leaves[..])
    {
        let known = copied.get(&key).cloned();
        let volume = known.unwrap_or_else(|| unknown(RECOVERED, &format!("volume {key}, whose name was lost")));
        place(tree, key, Volume { node: *node, ..volume });
    }
}

/// Puts a volume on its node, unless that is not there or another's; tells whether it was.
fn place(tree: &mut Tree, key: VolumeKey, volume: Volume) -> bool {
    let is_free =
        tree.nodes.contains_key(&volume.node) && !tree.volumes.contains_key(&key) && !tree.is_named(volume.node);
    if is_free {
        tree.volumes.insert(key, Volume { data_destroyed: false, ..volume });
    }
    is_free
}

/// Keeps the nodes that take what guests write and is to be thrown away: they are nobody's data.
fn keep_scratch(tree: &mut Tree, remains: &Remains) {
    let Some(copy) = &remains.copy else { return };
    for (key, scratch) in &copy.scratch {
        let is_free = |node| tree.nodes.contains_key(&node) && !tree.is_named(node);
        if tree.volumes.contains_key(key) && scratch.node.is_none_or(is_free) {
            tree.scratch.insert(*key, *scratch);
        }
    }
}

/// Gives the nodes that are no volume's.
fn unnamed(tree: &Tree) -> Vec<NodeId> {
    tree.nodes.keys().copied().filter(|id| !tree.is_named(*id)).collect()
}

/// Makes volumes for the nodes of which it is not known whose they are. One that the copy knows as nobody's is that.
fn name_the_rest(tree: &mut Tree, copy: Option<&Tree>) -> BTreeSet<VolumeKey> {
    let is_hidden = |id: NodeId| copy.is_some_and(|copy| copy.nodes.contains_key(&id) && !copy.is_named(id));
    let mut recovered = BTreeSet::new();
    let unknown_nodes = unnamed(tree).into_iter().filter(|node| !(tree.is_frozen(*node) && is_hidden(*node)));
    for node in unknown_nodes.collect::<Vec<_>>() {
        let key = VolumeKey::random();
        let volume = unknown(&format!("{RECOVERED} {node}"), "data of which it is not known whose it is");
        tree.volumes.insert(key, Volume { node, ..volume });
        recovered.insert(key);
    }
    recovered
}

/// Takes over what else an older copy tells and the files still bear out.
fn keep_what_fits(tree: &mut Tree, copy: &Tree, remains: &Remains) {
    let mut with_history = tree.clone();
    with_history.history = copy
        .history
        .iter()
        .filter(|(id, _)| remains.pasts.contains(id))
        .map(|(id, past)| (*id, past.clone()))
        .collect();
    for (key, volume) in &copy.volumes {
        let is_past = volume.data_destroyed && with_history.history.contains_key(&volume.node);
        if is_past && !with_history.volumes.values().any(|other| other.node == volume.node) {
            with_history.volumes.entry(*key).or_insert_with(|| volume.clone());
        } else if let Some(found) = with_history.volumes.get_mut(key).filter(|found| found.node == volume.node) {
            found.data_destroyed = volume.data_destroyed;
        }
    }
    if with_history.check().is_ok() {
        *tree = with_history;
    }
    let heirs = copy
        .composed
        .iter()
        .filter(|(gone, heir)| tree.volumes.contains_key(heir) && !tree.volumes.contains_key(gone));
    tree.composed = heirs.map(|(gone, heir)| (*gone, *heir)).collect();
}

/// Makes the record of a volume of which nothing is known but its data.
fn unknown(name: &str, description: &str) -> Volume {
    Volume::new(name.to_owned(), description.to_owned())
}

/// Finds the volumes that the bytes of a torn record still tell of, each as a whole.
pub(super) fn volumes_of_torn(bytes: &[u8]) -> BTreeMap<VolumeKey, Volume> {
    const START: &[u8] = b"\"volumes\":{";
    let mut volumes = BTreeMap::new();
    // The first is the tree's own: a name that looks so has its quotes escaped.
    let Some(at) = bytes.windows(START.len()).position(|window| window == START) else { return volumes };
    let mut rest = &bytes[at + START.len()..];
    while let Some((key, after)) = value::<VolumeKey>(rest) {
        let Some((volume, after)) = after.strip_prefix(b":").and_then(value::<Volume>) else { break };
        volumes.insert(key, volume);
        let Some(after) = after.strip_prefix(b",") else { break };
        rest = after;
    }
    volumes
}

/// Finds the format that the bytes of a torn record begin with.
pub(super) fn format_of_torn(bytes: &[u8]) -> Option<u64> {
    let digits = bytes.strip_prefix(b"{\"format\":")?;
    let length = digits.iter().position(|byte| !byte.is_ascii_digit())?;
    std::str::from_utf8(&digits[..length]).ok()?.parse().ok()
}

/// Decodes one value from the start of bytes that may end or go wrong behind it.
fn value<T: DeserializeOwned>(bytes: &[u8]) -> Option<(T, &[u8])> {
    let mut values = serde_json::Deserializer::from_slice(bytes).into_iter::<T>();
    let value = values.next()?.ok()?;
    Some((value, bytes.get(values.byte_offset()..)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;
    use proptest::strategy::ValueTree;

    use super::super::plan;
    use super::*;
    use crate::record;

    /// Makes a tree by snapshots, clones and destructions of whichever volumes the indices pick.
    fn grown(steps: &[(u8, Index)]) -> Tree {
        let key = VolumeKey::random();
        let mut tree = Tree::of_one(key, Volume::new("v\"olumes\":{".to_owned(), String::new()), 1 << 20);
        for (step, index) in steps {
            let key = *index.get(&tree.volumes.keys().copied().collect::<Vec<_>>());
            let (new, node) = (VolumeKey::random(), NodeId::random());
            let change = match step {
                0 => plan::clone(&tree, key, new, node, None),
                1 => {
                    tree = plan::destroyed(&tree, key).unwrap().unwrap_or(tree);
                    continue;
                }
                _ => plan::snapshot(&tree, key, new, node),
            };
            tree = plan::applied(&tree, &change.unwrap());
        }
        tree
    }

    fn steps() -> impl Strategy<Value = Vec<(u8, Index)>> {
        prop::collection::vec((0_u8..4, any::<Index>()), 0..12)
    }

    /// Gives what is left of a tree whose record is lost.
    fn remains(tree: &Tree) -> Remains {
        Remains { nodes: tree.nodes.clone(), linked: tree.referenced_volumes(), ..Remains::default() }
    }

    proptest! {
        #[test]
        fn a_copy_that_agrees_is_the_record(steps in steps()) {
            let tree = grown(&steps);
            let rebuilt = rebuild(&Remains { copy: Some(tree.clone()), ..remains(&tree) }).unwrap();
            prop_assert!(rebuilt.is_exact);
            prop_assert_eq!(rebuilt.tree, tree);
        }

        #[test]
        fn whatever_is_left_no_node_is_lost_and_what_is_told_is_kept(
            (before, after) in (steps(), steps()),
            length in any::<Index>(),
            with_copy in any::<bool>(),
        ) {
            let older = grown(&before);
            let mut tree = older.clone();
            for (_, index) in &after {
                let key = *index.get(&tree.volumes.keys().copied().collect::<Vec<_>>());
                let change = plan::snapshot(&tree, key, VolumeKey::random(), NodeId::random()).unwrap();
                tree = plan::applied(&tree, &change);
            }
            let bytes = record::encode(&tree).unwrap();
            let torn = volumes_of_torn(&bytes[..length.index(bytes.len())]);
            for (key, volume) in &torn {
                prop_assert_eq!(Some(volume), tree.volumes.get(key), "what a torn record tells is what it said");
            }
            let copy = with_copy.then_some(older);
            let rebuilt = rebuild(&Remains { torn: torn.clone(), copy, ..remains(&tree) }).unwrap();
            prop_assert_eq!(&rebuilt.tree.nodes, &tree.nodes);
            prop_assert_eq!(rebuilt.tree.check(), Ok(()));
            for (key, volume) in &torn {
                prop_assert_eq!(rebuilt.tree.volumes.get(key), Some(volume));
            }
            for (key, volume) in &tree.volumes {
                prop_assert!(rebuilt.tree.is_named(volume.node), "the data of volume {key} has one");
                prop_assert!(rebuilt.tree.volumes.contains_key(key) || rebuilt.lost.contains(key));
            }
            for key in &rebuilt.recovered {
                prop_assert!(rebuilt.tree.volumes[key].name.starts_with(RECOVERED));
            }
        }
    }

    #[test]
    fn the_format_of_a_torn_record_is_known_from_its_first_bytes() {
        assert_eq!(format_of_torn(b"{\"format\":12,\"nod"), Some(12));
        for unknown in [&b"{\"format\":12"[..], b"{\"format\":", b"{", b"", b"{\"format\":x,"] {
            assert_eq!(format_of_torn(unknown), None);
        }
    }

    #[test]
    fn a_volume_that_was_reverted_is_found_on_the_new_node() {
        let tree = grown(&[(2, any_index()), (2, any_index())]);
        let keys: Vec<VolumeKey> = tree.volumes.keys().copied().collect();
        for volume in keys.iter().filter(|key| !tree.is_frozen(tree.volumes[*key].node)) {
            for snapshot in keys.iter().filter(|key| *key != volume) {
                let after = plan::reverted(&tree, *volume, *snapshot, NodeId::random()).unwrap();
                let rebuilt = rebuild(&Remains { copy: Some(tree.clone()), ..remains(&after) }).unwrap();
                assert_eq!(rebuilt.tree.volumes, after.volumes);
            }
        }
    }

    fn any_index() -> Index {
        any::<Index>().new_tree(&mut proptest::test_runner::TestRunner::deterministic()).unwrap().current()
    }
}
