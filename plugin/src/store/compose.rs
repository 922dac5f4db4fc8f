//! Composing: what one volume has of its own is laid onto another volume, which ends.
//!
//! ```text
//!   tree A                 tree B                tree A        tree B
//!
//!   child   snapshot       parent                snapshot      child
//!     │        │             │           ──►        │            │
//!    [C] ───► [S]           [P]                    [S]          [C] ───► [P]
//! ```
//!
//! The child's nodes move to the parent's tree, under the same names and in the same files, so that all other volumes of
//! both trees stay what they are. Nodes that have nothing of their own are left out; one that has, and that
//! others need too, is not taken from them, and composing is refused.
//!
//! Two records cannot change at once. While both trees are locked, the child's first, this is done:
//!
//! ```text
//!   A: intent ─► links to the files in B ─► B: child in, parent out ─► headers ─► symlink ─► A: child out, intent out
//!      └────────── undone ─────────────────┘└──────────────────── gone on with ──────────────────────────────────┘
//! ```
//!
//! The intent keeps everybody from the child, whose symlink leads to A, until it is known whether B has it. From the
//! moment the symlink leads to B, what A says of the child is worth nothing. Where both volumes are in one tree, one
//! record says it all, and only the headers follow.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;

use super::locked::{LoadedTree, LockedTree, node_path, read};
use super::plan::{self, MAX_CHAIN};
use super::tree::{Change, Intent, Node, Tree};
use super::{content, garbage};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::id::{ContentId, NodeId, TreeId, VolumeKey};
use crate::lock::FileLock;
use crate::record;

/// Plans which nodes a composed volume keeps, with their new parents. `is_empty` tells whether a node has nothing of
/// its own; it is not asked for the volume's own node, which is always kept.
///
/// # Errors
///
/// [`Error::Unsupported`] when the volume's own data cannot be told from, or moved without, that of others;
/// [`Error::ChainTooLong`]; [`Error::VolumeDoesNotExist`], [`Error::DataDestroyed`].
fn kept_nodes(
    tree: &Tree,
    child: VolumeKey,
    onto: &Tree,
    parent: VolumeKey,
    mut is_empty: impl FnMut(NodeId) -> Result<bool>,
) -> Result<BTreeMap<NodeId, Node>> {
    let base = onto.volume_with_data(parent)?.node;
    let base_size = onto.node(base)?.virtual_size;
    let below = onto.chain(base);
    let top = tree.volume_with_data(child)?.node;
    if tree.is_frozen(top) {
        return Err(Error::Unsupported(format!("volume {child} is to be composed, and others lie on it")));
    }
    let rest = plan::destroyed(tree, child)?;
    let is_shared = |node: &NodeId| rest.as_ref().is_some_and(|rest| rest.nodes.contains_key(node));
    let chain: Vec<NodeId> = tree.chain(top).into_iter().take_while(|node| !below.contains(node)).collect();
    let mut empty = vec![false];
    for node in chain.iter().skip(1) {
        empty.push(is_empty(*node)?);
    }
    let mut kept: Vec<NodeId> = Vec::new();
    let mut seen = u64::MAX;
    for (depth, node) in chain.iter().enumerate() {
        let size = tree.node(*node)?.virtual_size;
        let is_last = empty.iter().skip(depth + 1).all(|empty| *empty);
        // A node that is smaller than what lies on it hides the end of what it lies on.
        if empty.get(depth).copied().unwrap_or(false) && (is_last || size >= seen) {
            continue;
        }
        if is_shared(node) {
            let reason = format!("volume {child} has data that other volumes of its tree share");
            return Err(Error::Unsupported(reason));
        }
        if size < seen.min(base_size) && depth > 0 {
            let reason = format!("volume {child} was enlarged since a snapshot that it still reads through");
            return Err(Error::Unsupported(reason));
        }
        kept.push(*node);
        seen = seen.min(size);
    }
    let length = kept.len() + below.len();
    if length > MAX_CHAIN {
        return Err(Error::ChainTooLong { volume: child.to_string(), length, limit: MAX_CHAIN });
    }
    let parents = kept.iter().skip(1).copied().chain([base]);
    let node = |(id, parent): (&NodeId, NodeId)| {
        // What it lies on is exchanged, and so what it reads as has no name any more.
        Ok((*id, Node::new(Some(parent), tree.node(*id)?.virtual_size)))
    };
    kept.iter().zip(parents).map(node).collect()
}

/// Plans the tree in which the child has taken the parent's place; in the child's own tree, what it no longer needs
/// goes.
fn composed(
    tree: &Tree,
    child: VolumeKey,
    onto: &Tree,
    parent: VolumeKey,
    kept: &BTreeMap<NodeId, Node>,
) -> Result<Tree> {
    let mut after = onto.clone();
    let mut volume = tree.volume(child)?.clone();
    let old = tree.chain(volume.node);
    // Nobody has it open: what is left of claims is worth nothing.
    volume.active.clear();
    // With this a migration from SMAPIv1 is whole.
    volume.importing = None;
    after.volumes.remove(&parent);
    after.volumes.insert(child, volume);
    after.nodes.extend(kept.clone());
    for node in old {
        plan::prune(&mut after, node);
    }
    after.composed.extend(tree.composed.iter().filter(|(_, heir)| **heir == child));
    after.composed.insert(parent, child);
    let keys: BTreeSet<VolumeKey> = after.volumes.keys().copied().collect();
    after.composed.retain(|_, heir| keys.contains(heir));
    Ok(after)
}

impl LockedTree {
    /// Tells whether a volume that is gone was composed into one of this tree.
    pub fn was_composed(&self, child: VolumeKey, parent: VolumeKey) -> bool {
        !self.tree.volumes.contains_key(&parent) && self.tree.composed.get(&parent) == Some(&child)
    }

    /// Locks the tree of another volume as well; `None` when it is this one.
    ///
    /// # Errors
    ///
    /// As [`super::Sr::lock`].
    pub fn lock_beside(&self, host: &Host, key: VolumeKey) -> Result<Option<Self>> {
        if self.tree.volumes.contains_key(&key) {
            return Ok(None);
        }
        // A symlink that was left over: this lock would be waited for in vain.
        if self.sr().tree_of(key)? == Some(self.id) {
            return Err(Error::VolumeDoesNotExist(key.to_string()));
        }
        self.sr().lock(host, key).map(Some)
    }

    /// Lays a volume of this tree onto another one, in the tree given or in this one; that one is gone then. Nobody has
    /// either open.
    ///
    /// # Errors
    ///
    /// When it cannot be done, nothing of it is left; what was begun and cannot be undone now is finished by whoever
    /// locks the tree next.
    pub fn compose(mut self, child: VolumeKey, parent: VolumeKey, onto: Option<Self>) -> Result<()> {
        self.refuse_second_intent()?;
        self.refuse_scratch(child)?;
        onto.as_ref().unwrap_or(&self).refuse_scratch(parent)?;
        self.chain_images(child)?;
        let target: &LoadedTree = onto.as_deref().unwrap_or(&self);
        target.chain_images(parent)?;
        let is_empty = |node| self.has_nothing_of_its_own(node);
        let kept = kept_nodes(&self.tree, child, &target.tree, parent, is_empty)?;
        let after = composed(&self.tree, child, &target.tree, parent, &kept)?;
        let intent = Intent::Compose { volume: child, parent, onto: target.id };
        let Some(mut onto) = onto else {
            self.commit(plan::with_intent(&after, intent)?)?;
            return self.end_here(child, parent);
        };
        self.commit(plan::with_intent(&self.tree, intent)?)?;
        let begun = self.hand_over(kept.keys(), &mut onto, after);
        self.end_between(child, parent, begun, &onto)
    }

    /// Takes a volume that nobody has open back to what a snapshot in another tree holds, and with that to that tree; see
    /// [`plan::reverted_onto`]. What is done, and in which order, is as if the volume were composed onto the snapshot and
    /// the snapshot stayed.
    ///
    /// # Errors
    ///
    /// As [`Self::compose`].
    pub fn revert_onto(mut self, key: VolumeKey, snapshot: VolumeKey, mut onto: Self) -> Result<()> {
        self.refuse_second_intent()?;
        onto.refuse_second_intent()?;
        let overlay = NodeId::random();
        let mut after = plan::reverted_onto(&self.tree, key, &onto.tree, snapshot, overlay)?;
        let made = Change { nodes: BTreeMap::from([(overlay, after.node(overlay)?.clone())]), ..Change::default() };
        content::frozen(&mut after, &made, ContentId::random());
        self.commit(plan::with_intent(
            &self.tree,
            Intent::Compose { volume: key, parent: snapshot, onto: onto.id },
        )?)?;
        let begun = onto.prepare(&made).and_then(|()| onto.commit(after));
        self.end_between(key, snapshot, begun, &onto)
    }

    /// Ends what was begun between two trees, however that went.
    fn end_between(&mut self, child: VolumeKey, parent: VolumeKey, begun: Result<()>, onto: &Self) -> Result<()> {
        match (begun, self.end_there(child, parent, onto)) {
            (_, Ok(true)) => Ok(()),
            (Err(first), Ok(false)) => Err(first),
            (Err(first), Err(undo)) => Err(first.undone(Err(undo))),
            (Ok(()), Ok(false)) => {
                Err(Error::Internal("a volume that went to another tree was not found".to_owned()))
            }
            (Ok(()), Err(error)) => Err(error),
        }
    }

    /// Finishes what a killed call began.
    pub(super) fn finish_compose(
        &mut self,
        host: &Host,
        child: VolumeKey,
        parent: VolumeKey,
        onto: TreeId,
    ) -> Result<()> {
        if onto == self.id {
            return self.end_here(child, parent);
        }
        if self.sr().tree_of(child)? != Some(self.id) {
            return self.leave(child);
        }
        let directory = self.sr().tree_directory(onto);
        match FileLock::acquire(&directory.join("lock"), host.settings()?.lock()) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound && !directory.exists() => {
                self.commit(plan::rolled_back(&self.tree))
            }
            Err(error) => Err(error),
            Ok(lock) => match self.sr().read_tree(onto)? {
                Some(loaded) => {
                    let onto = Self::new(self.sr().clone(), loaded, lock);
                    self.end_there(child, parent, &onto).map(drop)
                }
                None => self.commit(plan::rolled_back(&self.tree)),
            },
        }
    }

    /// Gives the other tree the files of the nodes and, by its record, the child.
    fn hand_over<'a>(&self, nodes: impl Iterator<Item = &'a NodeId>, onto: &mut Self, after: Tree) -> Result<()> {
        for node in nodes {
            let (from, to) = (node_path(&self.directory, *node), node_path(&onto.directory, *node));
            match fs::hard_link(&from, &to) {
                // Garbage of a call that was killed.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    fs::remove_file(&to).map_err(Error::on("removing", &to))?;
                    fs::hard_link(&from, &to).map_err(Error::on("linking", &to))?;
                }
                result => result.map_err(Error::on("linking", &to))?,
            }
        }
        record::sync_directory(&onto.directory)?;
        onto.commit(after)
    }

    /// Ends what was begun with another tree, as that tree's record has it: tells whether the child is there.
    fn end_there(&mut self, child: VolumeKey, parent: VolumeKey, onto: &Self) -> Result<bool> {
        // Read again: a commit whose last step failed may have put it in place.
        let found = read(&onto.directory)?.filter(|tree| tree.volumes.contains_key(&child));
        let Some(tree) = found else {
            onto.sweep([]);
            self.commit(plan::rolled_back(&self.tree))?;
            return Ok(false);
        };
        let loaded = LoadedTree { id: onto.id, directory: onto.directory.clone(), tree };
        rebase(&loaded, child, |node| self.tree.nodes.contains_key(&node), &onto.lock)?;
        self.sr().relink(child, onto.id)?;
        self.leave(child)?;
        // A snapshot that a volume was reverted to stays.
        if !loaded.tree.volumes.contains_key(&parent) {
            garbage::unlink(self.sr(), parent);
        }
        Ok(true)
    }

    /// Ends what is in this tree's record already.
    fn end_here(&mut self, child: VolumeKey, parent: VolumeKey) -> Result<()> {
        rebase(self, child, |_| true, &self.lock)?;
        self.commit(plan::rolled_back(&self.tree))?;
        self.sweep([parent]);
        Ok(())
    }

    /// Takes a volume that is in another tree by now out of this one, which goes with its last volume.
    fn leave(&mut self, child: VolumeKey) -> Result<()> {
        match plan::destroyed(&plan::rolled_back(&self.tree), child)? {
            Some(after) => {
                let after = self.without_files(after);
                self.commit(after)?;
                self.sweep([]);
                Ok(())
            }
            None => self.remove_tree(),
        }
    }
}

/// Makes the headers of a volume's nodes say what the record says.
fn rebase(tree: &LoadedTree, volume: VolumeKey, moved: impl Fn(NodeId) -> bool, lock: &FileLock) -> Result<()> {
    for node in tree.tree.chain(tree.volume(volume)?.node) {
        if tree.tree.node(node)?.parent.is_none() || !moved(node) {
            break;
        }
        tree.relink_header(node, lock)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;
    use crate::store::Volume;

    fn one() -> Tree {
        let volume = Volume::new(String::new(), String::new());
        Tree::of_one(VolumeKey::random(), volume, 1 << 20)
    }

    /// Makes a tree by snapshots and clones of whichever volumes the indices pick.
    fn grown(steps: &[(bool, Index)]) -> Tree {
        let mut tree = one();
        for (snapshot, index) in steps {
            let key = pick(&tree, index);
            let (new, node) = (VolumeKey::random(), NodeId::random());
            let change = if *snapshot {
                plan::snapshot(&tree, key, new, node)
            } else {
                plan::clone(&tree, key, new, node, None)
            };
            tree = plan::applied(&tree, &change.unwrap());
        }
        tree
    }

    fn pick(tree: &Tree, index: &Index) -> VolumeKey {
        *index.get(&tree.volumes.keys().copied().collect::<Vec<_>>())
    }

    fn chain(tree: &Tree, key: VolumeKey) -> Vec<NodeId> {
        tree.chain(tree.volumes[&key].node)
    }

    fn steps() -> impl Strategy<Value = Vec<(bool, Index)>> {
        prop::collection::vec((any::<bool>(), any::<Index>()), 0..12)
    }

    proptest! {
        #[test]
        fn composing_changes_what_the_child_reads_and_nothing_else(
            (first, second) in (steps(), steps()),
            (child, parent) in (any::<Index>(), any::<Index>()),
            same in any::<bool>(),
            full in prop::collection::vec(any::<bool>(), 30),
        ) {
            let tree = grown(&first);
            let onto = if same { tree.clone() } else { grown(&second) };
            let (child, parent) = (pick(&tree, &child), pick(&onto, &parent));
            prop_assume!(child != parent);
            let full: BTreeSet<NodeId> =
                tree.nodes.keys().zip(full).filter(|(_, full)| *full).map(|(node, _)| *node).collect();
            let Ok(kept) = kept_nodes(&tree, child, &onto, parent, |node| Ok(!full.contains(&node))) else {
                return Ok(());
            };
            let after = composed(&tree, child, &onto, parent, &kept).unwrap();
            prop_assert_eq!(after.check(), Ok(()));
            prop_assert!(!after.volumes.contains_key(&parent));
            let (before, now) = (chain(&tree, child), chain(&after, child));
            let base = chain(&onto, parent);
            prop_assert!(now.ends_with(&base));
            prop_assert_eq!(now[0], before[0]);
            for node in before.iter().filter(|node| full.contains(node)) {
                prop_assert!(now.contains(node), "what has data is still read");
            }
            for other in onto.volumes.keys().filter(|other| **other != child && **other != parent) {
                prop_assert_eq!(chain(&after, *other), chain(&onto, *other));
            }
            if !same {
                // Nothing that is taken along is missed in the tree it comes from.
                let left = plan::destroyed(&tree, child).unwrap();
                let left = left.map(|left| left.nodes.into_keys().collect::<BTreeSet<_>>()).unwrap_or_default();
                prop_assert!(kept.keys().all(|node| !left.contains(node)));
            }
        }
    }

    #[test]
    fn a_node_that_hides_the_end_of_another_is_not_left_out() {
        let tree = one();
        let child = *tree.volumes.keys().next().unwrap();
        let bottom = tree.volumes[&child].node;
        let mut tree =
            plan::applied(&tree, &plan::snapshot(&tree, child, VolumeKey::random(), NodeId::random()).unwrap());
        let middle = tree.volumes[&child].node;
        tree = plan::applied(&tree, &plan::overlay(&tree, child, NodeId::random(), Some(1 << 21)).unwrap());
        tree.volumes.retain(|key, _| *key == child);
        let onto = one();
        let parent = *onto.volumes.keys().next().unwrap();
        let kept = |full: NodeId| kept_nodes(&tree, child, &onto, parent, |node| Ok(node != full));
        assert_eq!(kept(NodeId::random()).unwrap().len(), 1);
        assert_eq!(kept(middle).unwrap().len(), 2);
        assert_eq!(kept(bottom).unwrap().len(), 3);
        // Where the parent is larger than what hides it, that cannot be.
        let large = Tree::of_one(parent, onto.volumes[&parent].clone(), 1 << 22);
        let refused = kept_nodes(&tree, child, &large, parent, |node| Ok(node != middle));
        assert!(matches!(refused, Err(Error::Unsupported(_))));
    }
}
