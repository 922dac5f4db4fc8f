//! What an operation makes of a tree: pure functions, with every new identifier given from outside.
//!
//! ```text
//!  snapshot(V) as S          clone(V) as C, V idle        clone(V) as C, V written to
//!
//!     V            V            V         V  C               V           V   C
//!     │            │            │         │  │               │           │   │
//!    [N]    ──►   [O]          [N]  ──►  [N][K]             [N]   ──►   [O] [K]
//!                  │                        │                             │ │
//!              S─ [N]                  (K lies on N)                      [N]
//! ```
//!
//! An idle volume keeps its node when it is cloned; it moves to an overlay when it is next written to
//! ([`overlay`]). A volume that a guest writes to must move at once.

use std::collections::BTreeMap;

use super::tree::{Change, Intent, MAX_VIRTUAL_SIZE, Move, Node, Past, SIZE_UNIT, Scratch, Tree, Volume};
use crate::error::{Error, Result};
use crate::id::{NodeId, VolumeKey};
use crate::smapi::Keys;

/// The key of xapi's that a snapshot or clone has from its original: what kind of data the volume holds.
///
/// SMAPIv3 says that what was set on a volume is not copied. xapi sets this one again, in a call of its own; when
/// that does not come, a volume without it is mistaken for another kind at the next scan.
const INHERITED_KEY: &str = "vdi-type";

/// The key by which xapi says of which volume another is a snapshot.
const SNAPSHOT_OF: &str = "snapshot_of";

/// Rounds a size that xapi asks for up to what a volume can have.
///
/// # Errors
///
/// [`Error::InvalidSize`] for nothing, less than nothing, and more than [`MAX_VIRTUAL_SIZE`].
pub fn size(asked: i128) -> Result<u64> {
    let rounded = u64::try_from(asked).ok().and_then(|bytes| bytes.checked_next_multiple_of(SIZE_UNIT));
    match rounded {
        Some(bytes) if bytes > 0 && bytes <= MAX_VIRTUAL_SIZE => Ok(bytes),
        _ => Err(Error::InvalidSize(format!("{asked} bytes; a volume has 1 to {MAX_VIRTUAL_SIZE} bytes"))),
    }
}

/// The most nodes of a chain that is made. QEMU opens a chain, and looks at it for anybody who asks, in a time that grows
/// faster than the square of its length; its guest waits meanwhile (docs/operations.md).
pub const MAX_CHAIN: usize = 128;

/// Refuses one more node on a volume's. The overlay that a clone's original needs when it is next written to is not
/// refused: that volume could not be used any more.
fn check_room(tree: &Tree, volume: VolumeKey, node: NodeId) -> Result<()> {
    let length = tree.chain(node).len() + 1;
    if length > MAX_CHAIN {
        return Err(Error::ChainTooLong { volume: volume.to_string(), length, limit: MAX_CHAIN });
    }
    Ok(())
}

/// Plans a snapshot: it takes the volume's node, and the volume moves to a new empty overlay.
///
/// # Errors
///
/// [`Error::VolumeDoesNotExist`].
pub fn snapshot(tree: &Tree, volume: VolumeKey, snapshot: VolumeKey, new_overlay: NodeId) -> Result<Change> {
    let original = tree.volume_with_data(volume)?;
    check_room(tree, volume, original.node)?;
    let mut change = overlay(tree, volume, new_overlay, None)?;
    change.volumes = BTreeMap::from([(snapshot, copy_of(original, original.node))]);
    Ok(change)
}

/// Plans a clone: it gets a new overlay on the volume's node. With `moves_to`, the volume moves to that overlay too,
/// because a guest writes to it.
///
/// # Errors
///
/// [`Error::VolumeDoesNotExist`].
pub fn clone(
    tree: &Tree,
    volume: VolumeKey,
    clone: VolumeKey,
    clone_node: NodeId,
    moves_to: Option<NodeId>,
) -> Result<Change> {
    let original = tree.volume_with_data(volume)?;
    check_room(tree, volume, original.node)?;
    let mut change = match moves_to {
        Some(new_overlay) => overlay(tree, volume, new_overlay, None)?,
        None => Change::default(),
    };
    let virtual_size = tree.node(original.node)?.virtual_size;
    change.nodes.insert(clone_node, Node::new(Some(original.node), virtual_size));
    // A clone is the first of its own backups (xen-api `ocaml/quicktest/quicktest_cbt.ml`).
    let copied = Volume { cbt_enabled: false, ..copy_of(original, clone_node) };
    change.volumes = BTreeMap::from([(clone, copied)]);
    Ok(change)
}

/// Plans a new empty overlay under a volume, which its node's children need before it is written to; as large as
/// its node, or larger where a size is given.
///
/// # Errors
///
/// [`Error::VolumeDoesNotExist`].
pub fn overlay(tree: &Tree, volume: VolumeKey, overlay: NodeId, virtual_size: Option<u64>) -> Result<Change> {
    let below = tree.volume_with_data(volume)?.node;
    let virtual_size = virtual_size.unwrap_or(tree.node(below)?.virtual_size);
    Ok(Change {
        nodes: BTreeMap::from([(overlay, Node::new(Some(below), virtual_size))]),
        volumes: BTreeMap::new(),
        moves: Some(Move { volume, overlay }),
    })
}

/// Makes the record of a volume's copy on a node of another tree.
///
/// # Errors
///
/// [`Error::VolumeDoesNotExist`], [`Error::DataDestroyed`].
pub fn copy(tree: &Tree, key: VolumeKey, node: NodeId) -> Result<Volume> {
    Ok(Volume { cbt_enabled: false, ..copy_of(tree.volume_with_data(key)?, node) })
}

/// Plans the copy of a volume with its whole chain: a tree of new nodes, and these in the order of the chain.
///
/// # Errors
///
/// As [`copy`].
pub fn copied_chain(tree: &Tree, key: VolumeKey, copied: VolumeKey) -> Result<(Tree, Vec<NodeId>)> {
    let chain = tree.chain(tree.volume_with_data(key)?.node);
    let new: Vec<NodeId> = chain.iter().map(|_| NodeId::random()).collect();
    let Some(top) = new.first() else {
        return Err(Error::Internal(format!("volume {key} has no node")));
    };
    let mut after = Tree::of_one(copied, copy(tree, key, *top)?, tree.virtual_size(chain[0])?);
    after.nodes.clear();
    for (at, old) in chain.iter().enumerate() {
        let virtual_size = tree.node(*old)?.virtual_size;
        after.nodes.insert(new[at], Node::new(new.get(at + 1).copied(), virtual_size));
    }
    Ok((after, new))
}

/// Makes a copied volume's record: nobody uses it yet, and xapi's keys are not its.
fn copy_of(original: &Volume, node: NodeId) -> Volume {
    let keys: Keys =
        original.keys.iter().filter(|(key, _)| *key == INHERITED_KEY).map(|(k, v)| (k.clone(), v.clone())).collect();
    Volume {
        node,
        name: original.name.clone(),
        description: original.description.clone(),
        // A snapshot is not reported read-only: xapi could not import a VM with one (xen-api #7268).
        read_write: true,
        sharable: original.sharable,
        cbt_enabled: original.cbt_enabled,
        data_destroyed: false,
        importing: None,
        keys,
        active: Vec::new(),
    }
}

/// Applies a change at once.
pub fn applied(tree: &Tree, change: &Change) -> Tree {
    let mut after = tree.clone();
    after.add(change);
    after
}

/// Writes an intent down.
///
/// # Errors
///
/// [`Error::Internal`] when there is one already.
pub fn with_intent(tree: &Tree, intent: Intent) -> Result<Tree> {
    if tree.intent.is_some() {
        return Err(Error::Internal("an operation was begun before another was finished".to_owned()));
    }
    Ok(Tree { intent: Some(intent), ..tree.clone() })
}

/// Ends an intent whose effect took place.
pub fn rolled_forward(tree: &Tree) -> Tree {
    let mut after = tree.clone();
    match after.intent.take() {
        None => {}
        Some(Intent::Switch(change)) => after.add(&change),
        Some(Intent::Resize { node, virtual_size, .. }) => {
            if let Some(node) = after.nodes.get_mut(&node) {
                node.virtual_size = virtual_size;
            }
        }
        // What it changes here was in the record when it was begun, or is in the other tree's.
        Some(Intent::Compose { .. }) => {}
        // The record has it already, and only the headers follow.
        Some(Intent::Relink { .. }) => {}
    }
    after
}

/// Ends an intent whose effect did not take place.
pub fn rolled_back(tree: &Tree) -> Tree {
    Tree { intent: None, ..tree.clone() }
}

/// Plans a volume's return to what a snapshot holds: the volume, with all that xapi knows of it, moves to the new
/// empty node `overlay` on the snapshot's node and has the snapshot's size. What only the old state needed goes.
///
/// # Errors
///
/// [`Error::VolumeDoesNotExist`], [`Error::DataDestroyed`], [`Error::ChainTooLong`]; [`Error::BadRequest`] for the volume
/// itself.
pub fn reverted(tree: &Tree, key: VolumeKey, snapshot: VolumeKey, overlay: NodeId) -> Result<Tree> {
    if key == snapshot {
        return Err(Error::BadRequest(format!("volume {key} cannot be reverted to itself")));
    }
    let old = tree.volume_with_data(key)?.node;
    let node = reverted_node(tree, snapshot)?;
    let mut after = tree.clone();
    after.nodes.insert(overlay, node);
    after.volume_mut(key)?.node = overlay;
    prune(&mut after, old);
    Ok(after)
}

/// Plans the same where the snapshot is in another tree, `onto`: gives that tree with the volume in it. A tree has one
/// root, but the snapshots of a disk may have several: those that only data without a name had in common before a
/// migration.
///
/// # Errors
///
/// As [`reverted`]; [`Error::Unsupported`] for a volume that xapi does not call a snapshot of this one. xapi then reverts by
/// a clone (xen-api `ocaml/xapi/xapi_vm_snapshot.ml`).
pub fn reverted_onto(tree: &Tree, key: VolumeKey, onto: &Tree, snapshot: VolumeKey, overlay: NodeId) -> Result<Tree> {
    let mut volume = tree.volume_with_data(key)?.clone();
    if onto.volume(snapshot)?.keys.get(SNAPSHOT_OF) != Some(&key.to_string()) {
        return Err(Error::Unsupported(format!(
            "reverting volume {key} to {snapshot}, which is of another disk; clone the snapshot instead"
        )));
    }
    let node = reverted_node(onto, snapshot)?;
    volume.node = overlay;
    // Nobody has it open: what is left of claims is worth nothing.
    volume.active.clear();
    let mut after = onto.clone();
    after.nodes.insert(overlay, node);
    after.volumes.insert(key, volume);
    // What its guest writes is thrown away there as well.
    after.scratch.extend(tree.scratch.contains_key(&key).then(|| (key, Scratch::default())));
    after.composed.extend(tree.composed.iter().filter(|(_, heir)| **heir == key));
    Ok(after)
}

/// Gives the empty node by which a volume is to read as a snapshot does.
fn reverted_node(tree: &Tree, snapshot: VolumeKey) -> Result<Node> {
    let kept = tree.volume_with_data(snapshot)?.node;
    check_room(tree, snapshot, kept)?;
    Ok(Node::new(Some(kept), tree.node(kept)?.virtual_size))
}

/// Plans a volume's end: it goes, and with it every node that then has neither volume nor children. `None` when it
/// is the last volume, and the whole tree goes.
///
/// # Errors
///
/// [`Error::VolumeDoesNotExist`].
pub fn destroyed(tree: &Tree, key: VolumeKey) -> Result<Option<Tree>> {
    let mut after = tree.clone();
    let node = tree.volume(key)?.node;
    after.volumes.remove(&key);
    let scratch = after.scratch.remove(&key).and_then(|scratch| scratch.node);
    if after.volumes.is_empty() {
        return Ok(None);
    }
    if let Some(scratch) = scratch {
        prune(&mut after, scratch);
    }
    prune(&mut after, node);
    Ok(Some(after))
}

/// Plans the end of a volume's data; what it changed stays known.
///
/// # Errors
///
/// [`Error::VolumeDoesNotExist`].
pub fn data_destroyed(tree: &Tree, key: VolumeKey) -> Result<Tree> {
    let mut after = tree.clone();
    after.volume_mut(key)?.data_destroyed = true;
    if let Some(scratch) = after.scratch.remove(&key).and_then(|scratch| scratch.node) {
        prune(&mut after, scratch);
    }
    Ok(after)
}

/// Finds a node whose file nothing needs any more, but what it changed does.
pub fn next_past(tree: &Tree) -> Option<NodeId> {
    tree.nodes.keys().copied().find(|id| !tree.has_needed_data(*id))
}

/// Takes a node's file out of the tree, whose changes are recorded apart from it from then on.
///
/// # Errors
///
/// [`Error::Internal`] for a node of another tree.
pub fn only_past(tree: &Tree, id: NodeId) -> Result<Tree> {
    let mut after = tree.clone();
    let missing = || Error::Internal(format!("node {id} is not in this tree"));
    let Node { parent, virtual_size, .. } = after.nodes.remove(&id).ok_or_else(missing)?;
    after.history.entry(id).or_insert(Past { parent, virtual_size });
    Ok(after)
}

/// Removes a node that neither a volume nor another node needs, and then those below it likewise.
pub(super) fn prune(tree: &mut Tree, from: NodeId) {
    let mut next = vec![from];
    while let Some(id) = next.pop() {
        if tree.is_frozen(id) || tree.volumes.values().any(|volume| volume.node == id) {
            continue;
        }
        next.extend(tree.history.remove(&id).and_then(|past| past.parent));
        next.extend(tree.nodes.remove(&id).and_then(|removed| removed.parent));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    /// One operation on whichever volume the index picks.
    #[derive(Clone, Debug)]
    enum Step {
        Snapshot,
        Clone { moves: bool },
        Overlay,
        SwitchForward,
        SwitchBack,
        Resize,
        Revert,
        Destroy,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => Just(Step::Snapshot),
            2 => any::<bool>().prop_map(|moves| Step::Clone { moves }),
            1 => Just(Step::Overlay),
            1 => Just(Step::SwitchForward),
            1 => Just(Step::SwitchBack),
            1 => Just(Step::Resize),
            2 => Just(Step::Revert),
            3 => Just(Step::Destroy),
        ]
    }

    fn one() -> Tree {
        let volume = Volume::new("n".to_owned(), "d".to_owned());
        Tree::of_one(VolumeKey::random(), volume, 1 << 20)
    }

    /// Gives what a volume reads through.
    fn chain(tree: &Tree, key: VolumeKey) -> Vec<NodeId> {
        tree.chain(tree.volumes[&key].node)
    }

    fn carried_out(tree: &Tree, key: VolumeKey, step: &Step) -> Option<Tree> {
        let new_snapshot = || snapshot(tree, key, VolumeKey::random(), NodeId::random()).unwrap();
        Some(match step {
            Step::Snapshot => applied(tree, &new_snapshot()),
            Step::Clone { moves } => {
                let moves_to = moves.then(NodeId::random);
                applied(tree, &clone(tree, key, VolumeKey::random(), NodeId::random(), moves_to).unwrap())
            }
            Step::Overlay => applied(tree, &overlay(tree, key, NodeId::random(), None).unwrap()),
            Step::SwitchForward => {
                let begun = with_intent(tree, Intent::Switch(new_snapshot())).unwrap();
                assert_eq!(begun.check(), Ok(()));
                rolled_forward(&begun)
            }
            Step::SwitchBack => {
                let begun = with_intent(tree, Intent::Switch(new_snapshot())).unwrap();
                assert_eq!(rolled_back(&begun), *tree);
                rolled_back(&begun)
            }
            Step::Resize => {
                let node = tree.volumes[&key].node;
                let virtual_size = tree.nodes[&node].virtual_size + SIZE_UNIT;
                rolled_forward(&with_intent(tree, Intent::Resize { volume: key, node, virtual_size }).unwrap())
            }
            Step::Revert => match tree.volumes.keys().find(|other| **other != key) {
                Some(other) => {
                    let after = reverted(tree, key, *other, NodeId::random()).unwrap();
                    assert_eq!(chain(&after, key)[1..], chain(tree, *other));
                    after
                }
                None => tree.clone(),
            },
            Step::Destroy => return destroyed(tree, key).unwrap(),
        })
    }

    proptest! {
        #[test]
        fn no_operation_leaves_a_wrong_tree_or_touches_what_other_volumes_read(
            steps in prop::collection::vec((step(), any::<Index>()), 1..40)
        ) {
            let mut tree = one();
            for (step, index) in steps {
                let keys: Vec<VolumeKey> = tree.volumes.keys().copied().collect();
                let key = *index.get(&keys);
                let Some(after) = carried_out(&tree, key, &step) else {
                    prop_assert_eq!(keys.len(), 1, "only the last volume takes the tree");
                    break;
                };
                prop_assert_eq!(after.check(), Ok(()), "{:?}", step);
                for other in keys.into_iter().filter(|other| *other != key) {
                    prop_assert_eq!(chain(&after, other), chain(&tree, other), "{:?}", step);
                }
                if after.volumes.contains_key(&key) && !matches!(step, Step::Revert) {
                    let (before, now) = (chain(&tree, key), chain(&after, key));
                    prop_assert!(now.ends_with(&before) && now.len() <= before.len() + 1, "{:?}", step);
                }
                for (new, volume) in after.volumes.iter().filter(|(new, _)| !tree.volumes.contains_key(new)) {
                    prop_assert!(chain(&after, *new).ends_with(&chain(&tree, key)));
                    prop_assert!(volume.active.is_empty());
                }
                let leaves = after.nodes.keys().filter(|id| !after.is_frozen(**id));
                for leaf in leaves {
                    prop_assert!(after.volumes.values().any(|volume| volume.node == *leaf), "{:?}", step);
                }
                tree = after;
            }
        }

        #[test]
        fn a_size_is_rounded_up_by_less_than_a_unit(asked in 1..=i128::from(MAX_VIRTUAL_SIZE)) {
            let size = size(asked).unwrap();
            prop_assert!(size.is_multiple_of(SIZE_UNIT));
            prop_assert!((0..i128::from(SIZE_UNIT)).contains(&(i128::from(size) - asked)));
        }

        #[test]
        fn a_record_reads_back_whatever_text_is_in_it(name in any::<String>(), k in any::<String>()) {
            let mut tree = one();
            for volume in tree.volumes.values_mut() {
                volume.name.clone_from(&name);
                volume.keys.insert(k.clone(), name.clone());
            }
            let text = serde_json::to_string(&tree).unwrap();
            prop_assert_eq!(serde_json::from_str::<Tree>(&text).unwrap(), tree);
        }
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for asked in [0, -1, i128::from(MAX_VIRTUAL_SIZE) + 1, 1 << 63, 1 << 64] {
            assert!(matches!(size(asked), Err(Error::InvalidSize(_))), "{asked}");
        }
    }

    #[test]
    fn a_snapshot_lies_between_its_volume_and_the_one_before() {
        let tree = one();
        let key = *tree.volumes.keys().next().unwrap();
        let (first, second) = (VolumeKey::random(), VolumeKey::random());
        let tree = applied(&tree, &snapshot(&tree, key, first, NodeId::random()).unwrap());
        let tree = applied(&tree, &snapshot(&tree, key, second, NodeId::random()).unwrap());
        let nodes = [key, second, first].map(|key| tree.volumes[&key].node);
        assert_eq!(chain(&tree, key), nodes);
    }

    #[test]
    fn a_node_that_an_unfinished_operation_lies_on_is_kept() {
        let tree = one();
        let key = *tree.volumes.keys().next().unwrap();
        let other = VolumeKey::random();
        let tree = applied(&tree, &clone(&tree, key, other, NodeId::random(), None).unwrap());
        let begun = with_intent(
            &tree,
            Intent::Switch(snapshot(&tree, other, VolumeKey::random(), NodeId::random()).unwrap()),
        )
        .unwrap();
        let after = destroyed(&begun, key).unwrap().unwrap();
        assert_eq!(after.check(), Ok(()));
        assert!(with_intent(&begun, begun.intent.clone().unwrap()).is_err());
    }
}
