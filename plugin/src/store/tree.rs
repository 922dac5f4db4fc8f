//! A tree's record: the nodes that share a root, and the volumes on them.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::id::{ContentId, Domain, NodeId, TreeId, VolumeKey};
use crate::record::Record;
use crate::smapi::Keys;

/// The unit of virtual sizes in bytes: a size asked for is rounded up to a multiple of it, so that a volume copied
/// between two SRs has the same size on both, whatever block size is underneath.
pub const SIZE_UNIT: u64 = 4096;

/// The largest virtual size in bytes, 64 TiB.
pub const MAX_VIRTUAL_SIZE: u64 = 64 << 40;

/// The record of a tree, `tree.json`: the truth about what nodes and volumes there are.
///
/// Format 1 is an object of `format`, `nodes`, `volumes` and, while an operation is under way, `intent`. Format 2 may
/// have `composed`, `scratch`, a `history`, volumes whose data was destroyed and an intent to compose. In format 3 nodes
/// may have a `content`, in format 4 volumes an `importing`. In format 5 there may be a `merge`, and an intent to relink,
/// which in format 6 may be of nodes that a guest has open. A tree is written in the oldest format that can hold it. A field that is not known is an error: whatever adds one
/// raises the format.
/// What [`Self::check`] asks for holds of every tree that was loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tree {
    /// The format of the record.
    pub format: u64,
    /// The nodes; `<node>.qcow2` beside the record holds each one's data.
    pub nodes: BTreeMap<NodeId, Node>,
    /// The volumes, by xapi's key.
    pub volumes: BTreeMap<VolumeKey, Volume>,
    /// Volumes that ended here by being composed, each with the volume that has its data since: by this a call that
    /// is repeated is known.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub composed: BTreeMap<VolumeKey, VolumeKey>,
    /// The volumes whose guests' writes are thrown away.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub scratch: BTreeMap<VolumeKey, Scratch>,
    /// What changed from node to node where the nodes' files no longer tell.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub history: BTreeMap<NodeId, Past>,
    /// Two nodes whose data is being merged, or was when a host died. See [`super::coalesce`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merge: Option<Merge>,
    /// An operation that was begun and whose end is not recorded; whoever locks the tree next finishes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intent: Option<Intent>,
}

/// Two nodes of which one is to take the other's data. While this stands both are in the tree, and every volume reads
/// the same however far the copying has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Merge {
    /// The hidden node.
    pub lower: NodeId,
    /// The only node on it.
    pub upper: NodeId,
    /// Which of the two takes the other's data.
    pub direction: Direction,
}

/// Where data goes in a [`Merge`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// The lower node takes what the upper one has, and then its place.
    Down,
    /// The upper node takes what the lower one has and it has not itself, and then lies on what that lay on.
    Up,
}

/// One qcow2 file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// The node below it, whose data shows where this one has none; none for the root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<NodeId>,
    /// The size that a guest sees, in bytes; the same as in the file's header.
    pub virtual_size: u64,
    /// What the node and those below it read as, where that has a name. A node that is written to has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<ContentId>,
}

impl Node {
    /// Makes the record of a new node, whose content has no name.
    pub fn new(parent: Option<NodeId>, virtual_size: u64) -> Self {
        Self { parent, virtual_size, content: None }
    }
}

/// What a node changed, kept apart from its file: `<node>.changed.json` beside the record lists the blocks that it had
/// of its own above `parent`.
///
/// A node that is only here has no file any more. One that is among the nodes too has a file that says something
/// else: another node was merged into it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Past {
    /// The node that was below it, which has a file or a past.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<NodeId>,
    /// The size that a guest saw, in bytes.
    pub virtual_size: u64,
}

/// What xapi sees: a name for one node, with all that xapi stores about it.
///
/// Snapshots are volumes like others. A volume whose node has children is not written to: before that it moves to
/// an overlay ([`super::plan::overlay`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// The node that holds its data; no other volume names it.
    pub node: NodeId,
    /// The name for people, any text.
    pub name: String,
    /// The description for people, any text.
    pub description: String,
    /// Whether a guest may write to it.
    pub read_write: bool,
    /// Whether several guests may write to it at once.
    pub sharable: bool,
    /// Whether changed blocks are tracked.
    pub cbt_enabled: bool,
    /// Whether its data was destroyed: only what changed in it is still known.
    #[serde(default, skip_serializing_if = "is_false")]
    pub data_destroyed: bool,
    /// The domain for which a migration from SMAPIv1 writes to it, or wrote. What the migration copied is in another
    /// volume until this one is composed with it; before that a guest would find a disk without most of its data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub importing: Option<Domain>,
    /// The keys that xapi set, any text.
    #[serde(default, skip_serializing_if = "Keys::is_empty")]
    pub keys: Keys,
    /// Who has its datapath active: at most one record a host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub active: Vec<Activation>,
}

impl Volume {
    /// Makes the record of a new volume on a node of its own, which nobody uses yet.
    pub fn new(name: String, description: String) -> Self {
        Self {
            node: NodeId::random(),
            name,
            description,
            read_write: true,
            sharable: false,
            cbt_enabled: false,
            data_destroyed: false,
            importing: None,
            keys: Keys::new(),
            active: Vec::new(),
        }
    }
}

/// What a volume's guest writes, which is thrown away. See [`super::Tree::scratch`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scratch {
    /// The node that takes the writes, from the first activation for writing on; its parent was the volume's node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    /// Whether the volume was closed while somebody had it open: the last one to go throws the writes away.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ended: bool,
}

/// A host's claim on a volume, which stands until that host takes it back or is seen to have booted since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Activation {
    /// The host.
    pub host: Uuid,
    /// The boot of that host: a record of this host with another boot id is stale.
    pub boot_id: Uuid,
    /// What the host may do.
    pub mode: Mode,
}

/// What an activated volume is open for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Mode {
    /// Reading.
    #[serde(rename = "ro")]
    ReadOnly,
    /// Reading and writing.
    #[serde(rename = "rw")]
    ReadWrite,
}

/// What an operation adds to a tree: nodes, volumes, and at most one volume that moves to one of the new nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// The nodes that are added; their files are made before anything names them.
    pub nodes: BTreeMap<NodeId, Node>,
    /// The volumes that are added.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub volumes: BTreeMap<VolumeKey, Volume>,
    /// The volume that moves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moves: Option<Move>,
}

/// A volume's move from its node to an overlay on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Move {
    /// The volume.
    pub volume: VolumeKey,
    /// The overlay, whose parent is the volume's node.
    pub overlay: NodeId,
}

/// An operation whose effect is partly outside the record, written down before that part is done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Intent {
    /// The running daemon of [`Move::volume`] is being switched to the overlay; then the change becomes part of the
    /// tree. Undone by removing the overlay, but only where the daemon is known not to write to it.
    Switch(Change),
    /// A node's file is being grown to `virtual_size`; the file's header says whether it was.
    Resize {
        /// The volume that is resized.
        volume: VolumeKey,
        /// The volume's node.
        node: NodeId,
        /// The new size in bytes.
        virtual_size: u64,
    },
    /// A volume is being laid onto another one, which ends, or reverted to a snapshot in another tree, which stays. See
    /// [`super::compose`].
    Compose {
        /// The volume that is laid onto the other.
        volume: VolumeKey,
        /// The other one.
        parent: VolumeKey,
        /// The tree of the other volume; where it is this tree, its record has the result already, and only the
        /// files' headers may not.
        onto: TreeId,
    },
    /// Two nodes were merged: nodes have another parent since, and their files' headers are to say so. Nobody has any of
    /// them open before that is done, but for the one volume that is named where there is one.
    Relink {
        /// The nodes whose parent is another one.
        nodes: BTreeSet<NodeId>,
        /// Who has the nodes open, and is to read the one that is left instead of the two.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        open: Option<OpenMerge>,
    },
}

/// Two nodes that were merged while a volume's daemon had them open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenMerge {
    /// The volume.
    pub volume: VolumeKey,
    /// The node that has taken the other's data.
    pub kept: NodeId,
    /// The other one, whose file stays until the daemon has let go of it.
    pub dropped: NodeId,
}

impl Intent {
    /// Gives the volume whose daemon the operation concerns, where there is one.
    pub fn volume(&self) -> Option<VolumeKey> {
        match self {
            Self::Switch(change) => change.moves.map(|moves| moves.volume),
            Self::Resize { volume, .. } | Self::Compose { volume, .. } => Some(*volume),
            Self::Relink { open, .. } => open.map(|open| open.volume),
        }
    }
}

impl Record for Tree {
    const FORMAT: u64 = 6;
}

/// The format of a tree in which no nodes are merged that are open.
const FIFTH_FORMAT: u64 = 5;

/// The format of a tree in which no nodes are merged.
const FOURTH_FORMAT: u64 = 4;

/// The format of a tree that nothing is imported to.
const THIRD_FORMAT: u64 = 3;

/// The format of a tree without the names of contents.
const SECOND_FORMAT: u64 = 2;

/// The format of a tree that has nothing newer.
const FIRST_FORMAT: u64 = 1;

impl Tree {
    /// Makes the tree of one volume on one empty node.
    pub fn of_one(key: VolumeKey, volume: Volume, virtual_size: u64) -> Self {
        Self {
            format: FIRST_FORMAT,
            nodes: BTreeMap::from([(volume.node, Node::new(None, virtual_size))]),
            volumes: BTreeMap::from([(key, volume)]),
            composed: BTreeMap::new(),
            scratch: BTreeMap::new(),
            history: BTreeMap::new(),
            merge: None,
            intent: None,
        }
    }

    /// Finds a volume.
    ///
    /// # Errors
    ///
    /// [`Error::VolumeDoesNotExist`].
    pub fn volume(&self, key: VolumeKey) -> Result<&Volume> {
        self.volumes.get(&key).ok_or_else(|| Error::VolumeDoesNotExist(key.to_string()))
    }

    /// Finds a volume, to change it.
    ///
    /// # Errors
    ///
    /// [`Error::VolumeDoesNotExist`].
    pub fn volume_mut(&mut self, key: VolumeKey) -> Result<&mut Volume> {
        self.volumes.get_mut(&key).ok_or_else(|| Error::VolumeDoesNotExist(key.to_string()))
    }

    /// Finds a volume that has data.
    ///
    /// # Errors
    ///
    /// [`Error::VolumeDoesNotExist`], [`Error::DataDestroyed`].
    pub fn volume_with_data(&self, key: VolumeKey) -> Result<&Volume> {
        match self.volume(key)? {
            volume if volume.data_destroyed => Err(Error::DataDestroyed(key.to_string())),
            volume => Ok(volume),
        }
    }

    /// Gives the oldest format in which the tree can be written: programs that know no newer one can go on with it.
    pub fn needed_format(&self) -> u64 {
        match self.intent {
            Some(Intent::Relink { open: Some(_), .. }) => return Self::FORMAT,
            Some(Intent::Relink { open: None, .. }) => return FIFTH_FORMAT,
            _ if self.merge.is_some() => return FIFTH_FORMAT,
            _ => {}
        }
        if self.volumes.values().any(|volume| volume.importing.is_some()) {
            return FOURTH_FORMAT;
        }
        if self.nodes.values().any(|node| node.content.is_some()) {
            return THIRD_FORMAT;
        }
        let plain = self.composed.is_empty()
            && self.scratch.is_empty()
            && self.history.is_empty()
            && !self.volumes.values().any(|volume| volume.data_destroyed)
            && !matches!(self.intent, Some(Intent::Compose { .. }));
        if plain { FIRST_FORMAT } else { SECOND_FORMAT }
    }

    /// Finds a node that the tree is known to have.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] for a node of another tree.
    pub fn node(&self, id: NodeId) -> Result<&Node> {
        self.nodes.get(&id).ok_or_else(|| Error::Internal(format!("node {id} is not in this tree")))
    }

    /// Gives a node and all below it, down to the root: what a guest on that node reads.
    pub fn chain(&self, node: NodeId) -> Vec<NodeId> {
        // Bounded by the number of nodes, so that it ends on a record that was not checked.
        let parent = |id: &NodeId| self.nodes.get(id).and_then(|node| node.parent);
        std::iter::successors(Some(node), parent).take(self.nodes.len()).collect()
    }

    /// Gives a node and all whose changes led to it, down to the first: its chain, and nodes that have only a past.
    pub fn lineage(&self, node: NodeId) -> Vec<NodeId> {
        // Bounded, so that it ends on a record that was not checked, and long enough to show that it goes round.
        let before = |id: &NodeId| match self.history.get(id) {
            Some(past) => past.parent,
            None => self.nodes.get(id).and_then(|node| node.parent),
        };
        std::iter::successors(Some(node), before).take(self.nodes.len() + self.history.len() + 1).collect()
    }

    /// Gives the size that a guest on a node sees, or saw while it had a file.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] for a node of another tree.
    pub fn virtual_size(&self, id: NodeId) -> Result<u64> {
        match (self.nodes.get(&id), self.history.get(&id)) {
            (Some(node), _) => Ok(node.virtual_size),
            (None, Some(past)) => Ok(past.virtual_size),
            (None, None) => Err(Error::Internal(format!("node {id} is not in this tree"))),
        }
    }

    /// Gives the nodes that lie directly on a node.
    pub fn children(&self, parent: NodeId) -> impl Iterator<Item = NodeId> {
        self.nodes.iter().filter(move |(_, node)| node.parent == Some(parent)).map(|(id, _)| *id)
    }

    /// Tells whether others lie on a node, or are about to: it is then never written to.
    pub fn is_frozen(&self, id: NodeId) -> bool {
        let pending = match &self.intent {
            Some(Intent::Switch(change)) => change.nodes.values().any(|node| node.parent == Some(id)),
            Some(Intent::Resize { .. } | Intent::Compose { .. } | Intent::Relink { .. }) | None => false,
        };
        // What changed above it is told by what it held, also where the file that had the change is gone.
        let past = self.history.values().any(|past| past.parent == Some(id));
        pending || past || self.children(id).next().is_some()
    }

    /// Tells whether a volume is on a node, or writes what is thrown away to it.
    pub fn is_named(&self, id: NodeId) -> bool {
        self.volumes.values().any(|volume| volume.node == id)
            || self.scratch.values().any(|scratch| scratch.node == Some(id))
    }

    /// Tells whether a node's file is needed: a volume's data is in it, or another file lies on it or is about to.
    pub fn has_needed_data(&self, id: NodeId) -> bool {
        let pending = match &self.intent {
            Some(Intent::Switch(change)) => change.nodes.values().any(|node| node.parent == Some(id)),
            Some(Intent::Resize { node, .. }) => *node == id,
            // Which of the two trees needs what is not known before it is finished.
            Some(Intent::Compose { .. }) => true,
            Some(Intent::Relink { .. }) | None => false,
        };
        let held = self.volumes.values().any(|volume| volume.node == id && !volume.data_destroyed);
        let scratch = self.scratch.values().any(|scratch| scratch.node == Some(id));
        pending || held || scratch || self.children(id).next().is_some()
    }

    /// Gives every node whose file must stay: those of the tree and those of an operation under way.
    pub fn referenced_nodes(&self) -> BTreeSet<NodeId> {
        let pending = match &self.intent {
            Some(Intent::Switch(change)) => change.nodes.keys().copied().collect(),
            Some(Intent::Relink { open, .. }) => open.iter().map(|open| open.dropped).collect(),
            Some(Intent::Resize { .. } | Intent::Compose { .. }) | None => Vec::new(),
        };
        self.nodes.keys().copied().chain(pending).collect()
    }

    /// Gives every volume whose symlink must stay.
    pub fn referenced_volumes(&self) -> BTreeSet<VolumeKey> {
        let pending = match &self.intent {
            Some(Intent::Switch(change)) => change.volumes.keys().copied().collect(),
            Some(Intent::Resize { .. } | Intent::Compose { .. } | Intent::Relink { .. }) | None => Vec::new(),
        };
        self.volumes.keys().copied().chain(pending).collect()
    }

    /// Checks that the record means something: the nodes form one tree, every volume has a node of its own in it,
    /// sizes are possible, and an intent fits.
    ///
    /// # Errors
    ///
    /// What does not hold, in words.
    pub fn check(&self) -> Result<(), String> {
        self.check_nodes()?;
        self.check_history()?;
        self.check_volumes()?;
        self.check_scratch()?;
        self.check_merge()?;
        match &self.intent {
            None => Ok(()),
            Some(Intent::Switch(change)) => self.check_switch(change),
            Some(Intent::Resize { volume, node, virtual_size }) => {
                check_size(*node, *virtual_size)?;
                match self.volumes.get(volume) {
                    Some(found) if found.node == *node => Ok(()),
                    _ => Err(format!("the intent resizes volume {volume}, which is not on node {node}")),
                }
            }
            Some(Intent::Compose { volume, .. }) if self.volumes.contains_key(volume) => Ok(()),
            Some(Intent::Compose { volume, .. }) => {
                Err(format!("the intent composes volume {volume}, which is not there"))
            }
            Some(Intent::Relink { nodes, open }) => {
                let kept = open.iter().map(|open| &open.kept);
                match nodes.iter().chain(kept).find(|node| !self.nodes.contains_key(node)) {
                    Some(node) => Err(format!("the intent relinks node {node}, which is not there")),
                    None => match open.iter().find(|open| !self.volumes.contains_key(&open.volume)) {
                        Some(open) => Err(format!("the intent relinks volume {}, which is not there", open.volume)),
                        None => Ok(()),
                    },
                }
            }
        }
    }

    fn check_merge(&self) -> Result<(), String> {
        match self.merge {
            Some(Merge { lower, upper, .. })
                if self.nodes.get(&upper).map(|node| node.parent) != Some(Some(lower)) =>
            {
                Err(format!("nodes {lower} and {upper} are being merged, and the one does not lie on the other"))
            }
            _ => Ok(()),
        }
    }

    fn check_nodes(&self) -> Result<(), String> {
        let mut roots = 0;
        for (id, node) in &self.nodes {
            check_size(*id, node.virtual_size)?;
            match node.parent {
                None => roots += 1,
                Some(parent) if !self.nodes.contains_key(&parent) => {
                    return Err(format!("node {id} has parent {parent}, which is not there"));
                }
                Some(_) => {}
            }
        }
        // A node is rooted when its parents lead to a root; every node is walked over once.
        let mut rooted: BTreeSet<NodeId> = BTreeSet::new();
        for id in self.nodes.keys() {
            let mut walked = BTreeSet::new();
            let mut next = Some(*id);
            while let Some(node) = next.filter(|node| !rooted.contains(node)) {
                if !walked.insert(node) {
                    return Err(format!("the parents of node {id} go round in a circle"));
                }
                next = self.nodes.get(&node).and_then(|node| node.parent);
            }
            rooted.extend(walked);
        }
        // Of a tree whose data is all destroyed only the history is left.
        let is_history = self.nodes.is_empty() && !self.history.is_empty();
        if roots != 1 && !is_history {
            return Err(format!("it has {roots} roots instead of one"));
        }
        Ok(())
    }

    fn check_history(&self) -> Result<(), String> {
        for (id, past) in &self.history {
            check_size(*id, past.virtual_size)?;
            if let Some(parent) = past.parent
                && !self.nodes.contains_key(&parent)
                && !self.history.contains_key(&parent)
            {
                return Err(format!("node {id} had parent {parent}, of which nothing is known"));
            }
            let lineage = self.lineage(*id);
            if lineage.iter().collect::<BTreeSet<_>>().len() != lineage.len() {
                return Err(format!("the history of node {id} goes round in a circle"));
            }
        }
        Ok(())
    }

    fn check_volumes(&self) -> Result<(), String> {
        if self.volumes.is_empty() {
            return Err("it has no volume".to_owned());
        }
        let mut owners = BTreeMap::new();
        for (key, volume) in &self.volumes {
            let past = volume.data_destroyed && self.history.contains_key(&volume.node);
            if !past && !self.nodes.contains_key(&volume.node) {
                return Err(format!("volume {key} is on node {}, which is not there", volume.node));
            }
            if let Some(other) = owners.insert(volume.node, key) {
                return Err(format!("volumes {other} and {key} are on one node"));
            }
            let hosts: BTreeSet<Uuid> = volume.active.iter().map(|activation| activation.host).collect();
            if hosts.len() != volume.active.len() {
                return Err(format!("volume {key} has two activations of one host"));
            }
        }
        Ok(())
    }

    fn check_scratch(&self) -> Result<(), String> {
        for (key, scratch) in &self.scratch {
            if !self.volumes.contains_key(key) {
                return Err(format!("what is written to volume {key} is thrown away, and it is not there"));
            }
            let Some(node) = scratch.node else { continue };
            if !self.nodes.contains_key(&node) || self.volumes.values().any(|volume| volume.node == node) {
                return Err(format!("what is written to volume {key} goes to node {node}, which is not for that"));
            }
        }
        Ok(())
    }

    fn check_switch(&self, change: &Change) -> Result<(), String> {
        let Some(moves) = change.moves else {
            return Err("the intent switches no volume".to_owned());
        };
        let parent = change.nodes.get(&moves.overlay).and_then(|node| node.parent);
        if parent.is_none() || self.volumes.get(&moves.volume).map(|volume| volume.node) != parent {
            return Err(format!("the intent's overlay {} does not lie on its volume's node", moves.overlay));
        }
        if change.nodes.keys().any(|node| self.nodes.contains_key(node))
            || change.volumes.keys().any(|key| self.volumes.contains_key(key))
        {
            return Err("the intent adds what is there already".to_owned());
        }
        // The tree that it leads to must be as sound as this one.
        let mut after = Self { intent: None, ..self.clone() };
        after.add(change);
        after.check()
    }

    /// Puts a change into the tree.
    pub(super) fn add(&mut self, change: &Change) {
        self.nodes.extend(change.nodes.clone());
        self.volumes.extend(change.volumes.clone());
        if let Some(moves) = change.moves
            && let Some(volume) = self.volumes.get_mut(&moves.volume)
        {
            volume.node = moves.overlay;
        }
    }
}

/// Tells whether a flag is left out of the record.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_false(flag: &bool) -> bool {
    !flag
}

/// Checks a size that a record gives.
fn check_size(node: NodeId, size: u64) -> Result<(), String> {
    if size == 0 || size > MAX_VIRTUAL_SIZE || !size.is_multiple_of(512) {
        return Err(format!("node {node} has the impossible size {size}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const A: &str = "aaaaaaaa-0000-4000-8000-000000000001";
    const B: &str = "bbbbbbbb-0000-4000-8000-000000000002";
    const V: &str = "cccccccc-0000-4000-8000-000000000003";

    /// A sound record: two nodes, one volume.
    fn sound() -> Value {
        json!({
            "format": 1,
            "nodes": {A: {"virtual_size": 1_048_576}, B: {"parent": A, "virtual_size": 1_048_576}},
            "volumes": {V: {
                "node": B, "name": "n", "description": "", "read_write": true, "sharable": false, "cbt_enabled": false
            }},
        })
    }

    /// Judges the record after a change to it.
    fn judged(change: impl FnOnce(&mut Value)) -> Result<(), String> {
        let mut value = sound();
        change(&mut value);
        let tree: Tree = serde_json::from_value(value).map_err(|error| error.to_string())?;
        tree.check()
    }

    #[test]
    fn a_sound_record_is_taken() {
        assert_eq!(judged(|_| {}), Ok(()));
        assert_eq!(
            judged(|value| value["intent"] = json!({"resize": {"volume": V, "node": B, "virtual_size": 2_097_152}})),
            Ok(())
        );
    }

    #[test]
    fn a_record_that_is_not_one_sound_tree_is_refused_in_words() {
        type Damage = fn(&mut Value);
        let cases: [(&str, Damage); 19] = [
            ("which is not there", |v| v["nodes"][B]["parent"] = json!(V)),
            ("in a circle", |v| v["nodes"][A]["parent"] = json!(B)),
            ("in a circle", |v| v["nodes"][A]["parent"] = json!(A)),
            ("2 roots", |v| v["nodes"][V] = json!({"virtual_size": 512})),
            ("impossible size 0", |v| v["nodes"][A]["virtual_size"] = json!(0)),
            ("impossible size 513", |v| v["nodes"][A]["virtual_size"] = json!(513)),
            ("is on node", |v| v["volumes"][V]["node"] = json!(V)),
            ("on one node", |v| v["volumes"][A] = v["volumes"][V].clone()),
            ("no volume", |v| v["volumes"] = json!({})),
            ("two activations", |v| {
                let active = json!({"host": A, "boot_id": B, "mode": "rw"});
                v["volumes"][V]["active"] = json!([active, active]);
            }),
            ("unknown field", |v| v["extra"] = json!(1)),
            ("does not lie", |v| {
                v["intent"] = json!({"switch": {"nodes": {V: {"parent": A, "virtual_size": 512}},
                    "moves": {"volume": V, "overlay": V}}});
            }),
            ("thrown away", |v| v["scratch"] = json!({A: {}})),
            ("not for that", |v| v["scratch"] = json!({V: {"node": B}})),
            ("composes", |v| v["intent"] = json!({"compose": {"volume": A, "parent": V, "onto": B}})),
            ("relinks", |v| v["intent"] = json!({"relink": {"nodes": [V]}})),
            ("merged", |v| v["merge"] = json!({"lower": B, "upper": A, "direction": "up"})),
            ("merged", |v| v["merge"] = json!({"lower": A, "upper": V, "direction": "down"})),
            ("not on node", |v| {
                v["intent"] = json!({"resize": {"volume": V, "node": A, "virtual_size": 512}});
            }),
        ];
        for (words, change) in cases {
            let reason = judged(change).unwrap_err();
            assert!(reason.contains(words), "{reason}");
        }
    }

    #[test]
    fn a_tree_is_written_in_the_oldest_format_that_can_hold_it() {
        let needed = |change: fn(&mut Value)| {
            let mut value = sound();
            change(&mut value);
            serde_json::from_value::<Tree>(value).unwrap().needed_format()
        };
        assert_eq!(needed(|_| {}), 1);
        assert_eq!(needed(|value| value["scratch"] = json!({V: {}})), 2);
        assert_eq!(needed(|value| value["history"] = json!({A: {"virtual_size": 512}})), 2);
        assert_eq!(needed(|value| value["volumes"][V]["data_destroyed"] = json!(true)), 2);
        assert_eq!(needed(|value| value["nodes"][A]["content"] = json!(V)), 3);
        assert_eq!(needed(|value| value["volumes"][V]["importing"] = json!("MIR0a1b2c")), 4);
        assert_eq!(needed(|value| value["merge"] = json!({"lower": A, "upper": B, "direction": "up"})), 5);
        assert_eq!(needed(|value| value["intent"] = json!({"relink": {"nodes": [B]}})), 5);
        let tree: Tree = serde_json::from_value(sound()).unwrap();
        let text = serde_json::to_string(&tree).unwrap();
        assert!(!text.contains("content"), "an older program refuses a field that it does not know: {text}");
    }

    #[test]
    fn a_long_chain_is_judged_in_little_time() {
        let nodes: Vec<NodeId> = (0..50_000).map(|_| NodeId::random()).collect();
        let mut tree: Tree = serde_json::from_value(sound()).unwrap();
        let volume = tree.volumes.values_mut().next().unwrap();
        volume.node = *nodes.last().unwrap();
        tree.nodes =
            nodes.iter().enumerate().map(|(i, id)| (*id, Node::new((i > 0).then(|| nodes[i - 1]), 512))).collect();
        assert_eq!(tree.check(), Ok(()));
    }
}
