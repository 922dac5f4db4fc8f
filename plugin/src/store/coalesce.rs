//! Merging hidden nodes: a node that no volume names, and that one other lies on, becomes one with that.
//!
//! ```text
//!      up: C takes what it has not           down: N takes what C has, and C's place
//!
//!      V        V                            V        V
//!      │        │                            │        │
//!     [C]      [C]  what N had is in C      [C]  ┌──►[N]  what C had is in N
//!      │        │                            │   │    │
//!     [N]  ──►  │                           [N] ─┘    │
//!      │        │                            │        │
//!     [G]      [G]                          [G]      [G]
//! ```
//!
//! While data is copied nothing that anybody reads changes: going up, C gets what shows through it anyhow; going down, N
//! gets what only C's readers could see, and they see C's. So the copying may stop at any point, and the record tells of
//! it only so that nobody meets it at work:
//!
//! ```text
//!   tree lock ─► marker committed ─► (no lock) data copied, flushed, looked over ─► tree lock ─► marker still there?
//!      │            names both                    │                                                │
//!      └─ merge lock, held throughout ────────────┴── stop file: given up, marker out              ▼
//!                                                      record without the node, with an intent ─► headers ─► intent out
//! ```
//!
//! A guest of this host may have the two open, if they are below what it writes to: see [`super::reader`].
//!
//! Whoever locks the tree for a volume that reads through the two asks for the copying to stop, waits for the merge lock,
//! which the process that copies holds too, and takes the marker out. A marker whose lock nobody holds is of one that
//! was killed. Without its marker nothing is merged, however much was copied.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use super::allocation::{Allocation, BLOCK, State};
use super::header::Header;
use super::locked::{LoadedTree, LockedTree, node_path};
use super::plan;
use super::reader::{Live, Reader};
use super::sr::Sr;
use super::tree::{Direction, Intent, Merge, OpenMerge, Tree};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::id::{NodeId, TreeId, VolumeKey};
use crate::lock::FileLock;
use crate::qemu::merge::Copied;
use crate::qemu::{Image, img};

/// The file in a tree's directory whose lock is held while data is copied.
pub(super) const LOCK: &str = "merge";

/// The file in a tree's directory that asks for the copying to stop.
const STOP: &str = "merge.stop";

/// Both of these, which are garbage without a marker.
pub(super) const FILES: [&str; 2] = [LOCK, STOP];

/// How often a lock is tried that must not be waited for.
const LOOK: Duration = Duration::from_millis(5);

/// What a guest has to have written over older data so that its volume is given an overlay for the merge, in bytes.
const WORTH_AN_OVERLAY: u64 = 1 << 20;

/// Of all the data of the two nodes this part has to be hidden for that: a hundredth.
const WORTH_A_SHARE: u64 = 100;

/// How often a worker gives one volume an overlay.
const ROUNDS: usize = 8;

/// Why two nodes stay that could be merged in neither direction.
const KEPT_APART: &str = "its end, or its sectors, could not be kept apart from those of others";

/// How many blocks are looked at together.
const WINDOW: u64 = BLOCK / 8;

/// What can be done in a tree.
#[derive(Debug)]
pub enum Next {
    /// Nothing more: what is left to merge, and why it cannot be now.
    Nothing(Vec<Waiting>),
    /// Two nodes were merged at once, as there was nothing to copy.
    Merged,
    /// Data is to be copied.
    Copy(Box<Merging>),
    /// What a guest writes goes to a new overlay since, so that what it wrote before can be merged.
    Frozen,
}

/// What a worker has tried in a tree.
#[derive(Clone, Debug, Default)]
pub struct Tried {
    /// Hidden nodes that are not to be tried again.
    pub failed: BTreeSet<NodeId>,
    /// What each guest had written over older data when its volume was given an overlay, in bytes.
    pub frozen: BTreeMap<VolumeKey, Vec<u64>>,
}

/// Two nodes that cannot be merged now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The hidden node.
    pub lower: NodeId,
    /// Why it stays.
    pub reason: String,
}

/// A merge that was begun. Its marker stands until somebody takes it out.
#[derive(Debug)]
pub struct Merging {
    /// What is merged.
    pub merge: Merge,
    /// The bytes that are to be copied.
    pub bytes: u64,
    /// The files from the upper node down to the root.
    pub chain: Vec<Image>,
    /// The guest that has them open.
    pub live: Option<Live>,
    tree: TreeId,
    directory: PathBuf,
    lock: FileLock,
}

/// What became of a merge whose data was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The two nodes are one.
    Merged,
    /// Somebody needed the nodes: it is as if the merge had not been begun.
    Stopped,
}

/// Finds the nodes that could be merged, each with the only one on it.
pub fn pairs(tree: &Tree) -> Vec<(NodeId, NodeId)> {
    let named: BTreeSet<NodeId> = tree
        .volumes
        .values()
        .map(|volume| volume.node)
        .chain(tree.scratch.values().filter_map(|scratch| scratch.node))
        // What changed from or to such a node is told by it alone.
        .chain(tree.history.keys().copied())
        .chain(tree.history.values().filter_map(|past| past.parent))
        .collect();
    let is_scratch = |id: NodeId| tree.scratch.values().any(|scratch| scratch.node == Some(id));
    let mut children: BTreeMap<NodeId, Vec<NodeId>> = BTreeMap::new();
    for (id, node) in &tree.nodes {
        if let Some(parent) = node.parent {
            children.entry(parent).or_default().push(*id);
        }
    }
    let hidden = children.into_iter().filter(|(parent, _)| !named.contains(parent));
    // A scratch node goes by itself, and then what it lies on.
    hidden
        .filter_map(|(lower, on)| <[NodeId; 1]>::try_from(on).ok().map(|[upper]| (lower, upper)))
        .filter(|(_, upper)| !is_scratch(*upper))
        .collect()
}

/// Finds the volumes whose guests read a node.
pub fn readers(tree: &Tree, node: NodeId) -> Vec<VolumeKey> {
    let reads = |top: NodeId| tree.chain(top).contains(&node);
    let through = |key: &VolumeKey| {
        let scratch = tree.scratch.get(key).and_then(|scratch| scratch.node);
        tree.volumes.get(key).is_some_and(|volume| reads(volume.node)) || scratch.is_some_and(reads)
    };
    tree.volumes.keys().copied().filter(|key| through(key)).collect()
}

/// Whether what a file has is known by sectors instead of clusters, of the lower and the upper one.
#[derive(Clone, Copy, Debug, Default)]
struct BySector {
    lower: bool,
    upper: bool,
}

/// Tells in which directions two nodes can be merged so that everybody reads the same.
fn directions(tree: &Tree, lower: NodeId, upper: NodeId, by_sector: BySector) -> Result<Vec<Direction>> {
    let (below, above) = (tree.node(lower)?.virtual_size, tree.node(upper)?.virtual_size);
    // The lower one hides the end of what it lies on, and the upper one is longer: that the zeroes there are kept is more
    // than QEMU promises when it is killed.
    let hides = tree.chain(lower).iter().skip(1).any(|id| tree.nodes.get(id).is_some_and(|n| n.virtual_size > below));
    if above > below && hides {
        return Ok(Vec::new());
    }
    let in_history =
        tree.history.contains_key(&upper) || tree.history.values().any(|past| past.parent == Some(upper));
    // The lower file would be longer than its reader, whose end others would see again; the upper node's name stands in
    // the history; and what is known by sectors stays so, since compose lays just these on other data.
    let down = above >= below && !in_history && !by_sector.upper;
    let up = by_sector.upper || !by_sector.lower;
    let allowed = [(Direction::Up, up), (Direction::Down, down)];
    Ok(allowed.into_iter().filter(|(_, allowed)| *allowed).map(|(direction, _)| direction).collect())
}

/// Plans that the data of two nodes is being merged.
fn begun(tree: &Tree, merge: Merge) -> Tree {
    let mut after = tree.clone();
    after.merge = Some(merge);
    if merge.direction == Direction::Down
        && let Some(lower) = after.nodes.get_mut(&merge.lower)
    {
        // It is about to be written to.
        lower.content = None;
    }
    after
}

/// Plans that a merge is given up. What was copied stays where it is, and nobody sees it; the lower node has the size that
/// its file says.
fn given_up(tree: &Tree, merge: Merge, lower_size: u64) -> Tree {
    let mut after = Tree { merge: None, ..tree.clone() };
    if merge.direction == Direction::Down
        && let Some(lower) = after.nodes.get_mut(&merge.lower)
    {
        lower.virtual_size = lower.virtual_size.max(lower_size);
    }
    after
}

/// Plans the tree in which two nodes are one, with the nodes whose files' headers are to follow.
///
/// # Errors
///
/// [`Error::Internal`] when they cannot be merged.
fn merged(tree: &Tree, merge: Merge) -> Result<(Tree, BTreeSet<NodeId>)> {
    let Merge { lower, upper, direction } = merge;
    let mut after = Tree { merge: None, ..tree.clone() };
    let below = tree.node(lower)?.parent;
    let relinked = match direction {
        Direction::Up => {
            after.nodes.remove(&lower);
            if let Some(node) = after.nodes.get_mut(&upper) {
                node.parent = below;
            }
            BTreeSet::from([upper])
        }
        Direction::Down => {
            let mut node = tree.node(upper)?.clone();
            node.parent = below;
            // It had a name still if nothing was copied to it: then the upper one reads as it does.
            node.content = node.content.or(tree.node(lower)?.content);
            after.nodes.remove(&upper);
            after.nodes.insert(lower, node);
            let children: BTreeSet<NodeId> = tree.children(upper).collect();
            for child in &children {
                if let Some(child) = after.nodes.get_mut(child) {
                    child.parent = Some(lower);
                }
            }
            for volume in after.volumes.values_mut().filter(|volume| volume.node == upper) {
                volume.node = lower;
            }
            children
        }
    };
    Ok((after, relinked))
}

impl Sr {
    /// Locks a tree, and finishes what a killed call began in it; `None` when it is gone.
    ///
    /// # Errors
    ///
    /// As [`Self::lock`].
    pub fn lock_tree(&self, host: &Host, id: TreeId) -> Result<Option<LockedTree>> {
        let directory = self.tree_directory(id);
        let lock = match FileLock::acquire(&directory.join("lock"), host.settings()?.lock()) {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            lock => lock?,
        };
        let Some(loaded) = self.read_tree(id)? else { return Ok(None) };
        let mut locked = LockedTree::new(self.clone(), loaded, lock);
        locked.finish(host)?;
        // Its last volume may have been on its way to another tree.
        Ok(Some(locked).filter(|locked| !locked.tree.volumes.is_empty()))
    }
}

impl LoadedTree {
    /// Tells whether the record has nodes to be merged, or a merge that was begun.
    pub fn has_merges(&self) -> bool {
        self.tree.merge.is_some() || !pairs(&self.tree).is_empty()
    }

    /// Opens the tables of a node whose header was checked.
    fn tables(&self, node: NodeId) -> Result<Allocation> {
        Allocation::open(&self.checked_image(node)?)
    }
}

/// What copying in a direction takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    /// The bytes of data.
    bytes: u64,
    /// The blocks that are zeroes.
    zeroes: u64,
}

impl Cost {
    fn add(&mut self, state: State) {
        match state {
            State::Unset => {}
            State::Zero | State::PartZero => self.zeroes += 1,
            State::Data => self.bytes += BLOCK,
        }
    }
}

/// Looks at what two files have of each block, the upper's and the lower's, wherever either has a table.
fn walk(
    upper: &Allocation,
    lower: &Allocation,
    size: u64,
    mut look: impl FnMut(u64, State, State) -> Result<()>,
) -> Result<()> {
    let end = size.div_ceil(BLOCK);
    let mut first = 0;
    while first < end {
        let count = WINDOW.min(end - first);
        if upper.has_tables(first, count) || lower.has_tables(first, count) {
            let length = usize::try_from(count).unwrap_or(usize::MAX);
            let (mut above, mut below) = (vec![State::Unset; length], vec![State::Unset; length]);
            upper.fill(first, &mut above)?;
            lower.fill(first, &mut below)?;
            for ((above, below), block) in above.into_iter().zip(below).zip(first..end) {
                look(block, above, below)?;
            }
        }
        first += count;
    }
    Ok(())
}

impl LockedTree {
    /// Begins the merge that copies the least, of those that can be made now, unless nothing is to be copied: then it is
    /// made. What a guest writes to is frozen where that is what is left to merge, and worth it.
    ///
    /// # Errors
    ///
    /// When a file is not what it should be, or the record cannot be written. Nothing was begun then.
    pub fn next_merge(&mut self, host: &Host, tried: &mut Tried) -> Result<Next> {
        let mut waiting = Vec::new();
        let mut written = Vec::new();
        let mut best: Option<(Cost, Merge, Option<Live>)> = None;
        if self.tree.merge.is_some() && !self.clear_merge()? {
            return Ok(Next::Nothing(Vec::new()));
        }
        let pairs = pairs(&self.tree);
        if let (Some(_), Some((lower, _))) = (&self.tree.intent, pairs.first()) {
            let reason = "another host is to finish what it began in the tree".to_owned();
            return Ok(Next::Nothing(vec![Waiting { lower: *lower, reason }]));
        }
        for (lower, upper) in pairs {
            if tried.failed.contains(&lower) {
                continue;
            }
            let live = match self.reader(host, upper)? {
                Reader::Nobody => None,
                Reader::Here(live) => Some(live),
                Reader::Writes(volume) => {
                    written.push((lower, upper, volume));
                    continue;
                }
                Reader::Forbids(reason) => {
                    waiting.push(Waiting { lower, reason });
                    continue;
                }
            };
            match self.cheapest(lower, upper)? {
                None => waiting.push(Waiting { lower, reason: KEPT_APART.to_owned() }),
                Some((cost, merge)) if cost == Cost::default() && !self.grows(merge)? => {
                    let Some(_starts) = self.no_mirror_starts(host, live)? else { continue };
                    self.make_one(host, merge, live)?;
                    return Ok(Next::Merged);
                }
                Some((cost, _)) if best.is_some_and(|(least, _, _)| least <= cost) => {}
                Some((cost, merge)) => best = Some((cost, merge, live)),
            }
        }
        if let Some((cost, merge, live)) = best {
            let Some(_starts) = self.no_mirror_starts(host, live)? else { return Ok(Next::Nothing(waiting)) };
            return self.begin(host, merge, cost.bytes, live).map(|merging| Next::Copy(Box::new(merging)));
        }
        for (lower, upper, volume) in written {
            match self.freeze(host, lower, upper, volume, tried)? {
                None => return Ok(Next::Frozen),
                Some(reason) => waiting.push(Waiting { lower, reason }),
            }
        }
        Ok(Next::Nothing(waiting))
    }

    /// Gives the volume that a guest writes to an overlay, when enough of what it has written lies over data that nobody
    /// sees any more; else says why not.
    fn freeze(
        &mut self,
        host: &Host,
        lower: NodeId,
        upper: NodeId,
        volume: VolumeKey,
        tried: &mut Tried,
    ) -> Result<Option<String>> {
        let here = format!("volume {volume} is active on this host");
        let hides = |bytes: u64| format!("{here}: the {bytes} bytes that it hides are merged when it is closed");
        // What its daemon knows is not in the tables yet, but what was written is in the file.
        let path = node_path(&self.directory, upper);
        let taken = fs::metadata(&path).map_err(Error::on("reading the state of", &path))?.blocks() * 512;
        if taken < WORTH_AN_OVERLAY {
            return Ok(Some(hides(taken)));
        }
        self.flush_reader(host, volume)?;
        let (mut twice, mut all) = (0, 0);
        let size = self.tree.node(upper)?.virtual_size;
        walk(&self.tables(upper)?, &self.tables(lower)?, size, |_, above, below| {
            all += BLOCK * (u64::from(above == State::Data) + u64::from(below == State::Data));
            twice += BLOCK * u64::from(above.is_known() && below == State::Data);
            Ok(())
        })?;
        if twice < WORTH_AN_OVERLAY || twice < all / WORTH_A_SHARE {
            return Ok(Some(hides(twice)));
        }
        if self.cheapest(lower, upper)?.is_none() {
            return Ok(Some(KEPT_APART.to_owned()));
        }
        let before = tried.frozen.entry(volume).or_default();
        if before.len() >= ROUNDS || before.last().is_some_and(|last| twice > last / 2) {
            return Ok(Some(format!("{here}, and its guest writes as fast as data is merged")));
        }
        before.push(twice);
        let Some(_starts) = self.no_mirror_starts(host, Some(Live { volume }))? else {
            return Ok(Some(format!("{here}, and about to be mirrored")));
        };
        let change = plan::overlay(&self.tree, volume, NodeId::random(), None)?;
        tracing::info!(%volume, twice, "what a guest has written is frozen");
        self.switch(host, change).map(|()| None)
    }

    /// Tells whether the file that takes the data is to be made larger.
    fn grows(&self, merge: Merge) -> Result<bool> {
        let size = |node| self.tree.node(node).map(|node| node.virtual_size);
        Ok(merge.direction == Direction::Down && size(merge.lower)? != size(merge.upper)?)
    }

    /// Finds the direction in which the least is copied; `None` when there is none that can be gone.
    fn cheapest(&self, lower: NodeId, upper: NodeId) -> Result<Option<(Cost, Merge)>> {
        let (above, below) = (self.tables(upper)?, self.tables(lower)?);
        let size = self.tree.node(upper)?.virtual_size;
        let (mut up, mut down) = (Cost::default(), Cost::default());
        walk(&above, &below, size, |_, above, below| {
            down.add(above);
            if !above.is_known() {
                up.add(below);
            }
            Ok(())
        })?;
        let by_sector = BySector { lower: below.is_by_sector(), upper: above.is_by_sector() };
        let cost = |direction| if direction == Direction::Up { up } else { down };
        let allowed = directions(&self.tree, lower, upper, by_sector)?.into_iter();
        let best = allowed.map(|direction| (cost(direction), direction)).min_by_key(|(cost, _)| *cost);
        Ok(best.map(|(cost, direction)| (cost, Merge { lower, upper, direction })))
    }

    /// Writes down that data is being copied, and takes the lock for that.
    fn begin(&mut self, host: &Host, merge: Merge, bytes: u64, live: Option<Live>) -> Result<Merging> {
        if let (Some(live), Direction::Up) = (live, merge.direction) {
            self.prepare_growth(host, live, merge.upper, bytes)?;
        }
        let path = self.directory.join(LOCK);
        let Some(lock) = FileLock::try_acquire(&path)? else {
            return Err(Error::Internal(format!("{} is locked without a marker in the record", path.display())));
        };
        let chain = self.tree.chain(merge.upper).into_iter().map(|node| self.checked_image(node));
        let chain = chain.collect::<Result<Vec<_>>>();
        let begun = chain.and_then(|chain| {
            crate::record::remove(&self.directory.join(STOP))?;
            self.commit(begun(&self.tree, merge))?;
            self.sync_copy()?;
            Ok(chain)
        });
        match begun {
            Ok(chain) => {
                let (tree, directory) = (self.id, self.directory.clone());
                Ok(Merging { merge, bytes, chain, live, tree, directory, lock })
            }
            Err(error) => {
                drop(fs::remove_file(&path));
                Err(error)
            }
        }
    }

    /// Stops a merge whose nodes a volume reads.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] when it does not stop; else as [`Self::commit`].
    pub fn settle(&mut self, host: &Host, key: VolumeKey) -> Result<()> {
        match self.tree.merge {
            Some(merge) if readers(&self.tree, merge.upper).contains(&key) => self.stop_merge(host),
            _ => Ok(()),
        }
    }

    /// Stops a merge in this tree, if there is one, and takes its marker out.
    ///
    /// # Errors
    ///
    /// As [`Self::settle`].
    pub fn stop_merge(&mut self, host: &Host) -> Result<()> {
        if self.tree.merge.is_none() {
            return Ok(());
        }
        let (path, stop) = (self.directory.join(LOCK), self.directory.join(STOP));
        let lock = match FileLock::try_acquire(&path)? {
            Some(lock) => lock,
            None => {
                fs::write(&stop, b"").map_err(Error::on("writing", &stop))?;
                FileLock::acquire(&path, host.settings()?.lock())?
            }
        };
        self.give_up(&lock)
    }

    /// Takes the marker of a merge out that nobody is at work on; false when somebody is.
    fn clear_merge(&mut self) -> Result<bool> {
        match FileLock::try_acquire(&self.directory.join(LOCK))? {
            Some(lock) => self.give_up(&lock).map(|()| true),
            None => Ok(false),
        }
    }

    /// Takes the marker out. What was copied is not lost to the next attempt.
    fn give_up(&mut self, lock: &FileLock) -> Result<()> {
        if let Some(merge) = self.tree.merge {
            let header = Header::read(&node_path(&self.directory, merge.lower))?;
            self.commit(given_up(&self.tree, merge, header.virtual_size))?;
        }
        remove_files(lock, &self.directory);
        Ok(())
    }

    /// Makes two nodes one whose data is in one of the files: first in the record, then in the files' headers and for the
    /// guest that has them open. The other file goes.
    fn make_one(&mut self, host: &Host, merge: Merge, live: Option<Live>) -> Result<()> {
        let (after, nodes) = merged(&self.tree, merge)?;
        let (kept, dropped) = match merge.direction {
            Direction::Up => (merge.upper, merge.lower),
            Direction::Down => (merge.lower, merge.upper),
        };
        let open = live.map(|live| OpenMerge { volume: live.volume, kept, dropped });
        self.commit(plan::with_intent(&after, Intent::Relink { nodes, open })?)?;
        self.sync_copy()?;
        self.finish_relink(host)
    }
}

/// Removes the files by which a merge is kept apart from other calls, by who holds its lock.
fn remove_files(lock: &FileLock, directory: &std::path::Path) {
    for path in [&directory.join(STOP), lock.path()] {
        if let Err(error) = crate::record::remove(path) {
            tracing::warn!(error = error.chain(), "a file of a merge is left");
        }
    }
}

impl Merging {
    /// Tells whether somebody asks for the copying to stop.
    pub fn is_to_stop(&self) -> bool {
        self.directory.join(STOP).exists()
    }

    /// Gives the lock that whatever copies is to hold as long as it lives.
    pub fn lock(&self) -> &FileLock {
        &self.lock
    }

    /// Sees that everything was copied, where that is said, by the files' tables, and that these are sound. What an earlier
    /// attempt that was killed has left unused in the file is freed.
    ///
    /// # Errors
    ///
    /// When something is missing or wrong; nothing may be merged then.
    pub fn look_over(&self, copied: Copied) -> Result<Copied> {
        if copied == Copied::All {
            self.check_copied()?;
        }
        Ok(copied)
    }

    fn check_copied(&self) -> Result<()> {
        let [upper, lower, below @ ..] = self.chain.as_slice() else {
            return Err(Error::Internal("a merge of less than two files".to_owned()));
        };
        let to = if self.merge.direction == Direction::Down { lower } else { upper };
        let wrong = |reason: String| Error::Image { path: to.path.clone(), reason };
        let header = Header::read(&to.path)?;
        if header.virtual_size != upper.virtual_size {
            return Err(wrong(format!("it has the size {} instead of {}", header.virtual_size, upper.virtual_size)));
        }
        let grown = Image { virtual_size: upper.virtual_size, ..lower.clone() };
        let lower = if self.merge.direction == Direction::Down { &grown } else { lower };
        walk(&Allocation::open(upper)?, &Allocation::open(lower)?, upper.virtual_size, |block, above, under| {
            let is_there = match self.merge.direction {
                Direction::Up => above.is_known() || under == State::Unset || under == State::PartZero,
                Direction::Down => {
                    under.is_known() || above == State::Unset || (above == State::Zero && below.is_empty())
                }
            };
            if is_there { Ok(()) } else { Err(wrong(format!("block {block} was not copied to it"))) }
        })?;
        let found = img::repair_leaks(&to.path, self.live.is_none(), Some(&self.lock))?;
        match found.corruptions + found.check_errors {
            0 => Ok(()),
            errors => Err(wrong(format!("qemu-img check finds {errors} errors in it"))),
        }
    }

    /// Makes the two nodes one, if the marker still stands and nothing else does against it.
    ///
    /// # Errors
    ///
    /// When a record or header cannot be written. Whoever locks the tree next ends it then, or takes the marker out.
    pub fn end(self, host: &Host, sr: &Sr) -> Result<Ended> {
        let Some(mut tree) = self.lock_tree(host, sr)? else { return Ok(Ended::Stopped) };
        if tree.tree.merge != Some(self.merge) {
            return Ok(Ended::Stopped);
        }
        let size = |node| tree.tree.node(node).map(|node| node.virtual_size);
        let is_as_before = pairs(&tree.tree).contains(&(self.merge.lower, self.merge.upper))
            && self.chain.iter().take(2).all(|image| size(image.node).is_ok_and(|size| size == image.virtual_size))
            && tree.tree.chain(self.merge.upper).iter().eq(self.chain.iter().map(|image| &image.node))
            && tree.tree.intent.is_none();
        let live = match tree.reader(host, self.merge.upper)? {
            Reader::Here(live) if Some(live) == self.live => Some(live),
            // Whoever had them open has closed them since.
            Reader::Nobody => None,
            _ => {
                tree.give_up(&self.lock)?;
                return Ok(Ended::Stopped);
            }
        };
        let starts = tree.no_mirror_starts(host, live)?;
        if !is_as_before || self.is_to_stop() || starts.is_none() {
            tree.give_up(&self.lock)?;
            return Ok(Ended::Stopped);
        }
        tree.make_one(host, self.merge, live)?;
        remove_files(&self.lock, &self.directory);
        Ok(Ended::Merged)
    }

    /// Gives a merge up that could not be made.
    ///
    /// # Errors
    ///
    /// When the record cannot be written: the marker stays, and the next one who meets it takes it out.
    pub fn abandon(self, host: &Host, sr: &Sr) -> Result<()> {
        match self.lock_tree(host, sr)? {
            Some(mut tree) if tree.tree.merge == Some(self.merge) => tree.give_up(&self.lock),
            _ => Ok(()),
        }
    }

    /// Locks the tree; `None` when it is gone, or somebody who holds its lock waits for this one to stop: they take the
    /// marker out.
    fn lock_tree(&self, host: &Host, sr: &Sr) -> Result<Option<LockedTree>> {
        let lock = loop {
            match FileLock::try_acquire(&self.directory.join("lock")) {
                Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
                Ok(Some(lock)) => break lock,
                Ok(None) if self.is_to_stop() => return Ok(None),
                Ok(None) => std::thread::sleep(LOOK),
            }
        };
        let Some(loaded) = sr.read_tree(self.tree)? else { return Ok(None) };
        let mut tree = LockedTree::new(sr.clone(), loaded, lock);
        tree.finish(host)?;
        Ok(Some(tree))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;
    use crate::id::ContentId;
    use crate::store::tree::{Node, Past, Volume};

    /// The size of a block of these trees.
    const UNIT: u64 = 4096;

    /// What files have of their own, by block; zeroes are data too.
    type Files = BTreeMap<NodeId, BTreeMap<u64, u8>>;

    /// Reads what a guest on a node sees.
    fn read(tree: &Tree, files: &Files, node: NodeId) -> Vec<u8> {
        let block = |at: u64| {
            for id in tree.chain(node) {
                if at >= tree.nodes[&id].virtual_size / UNIT {
                    return 0;
                }
                if let Some(found) = files[&id].get(&at) {
                    return *found;
                }
            }
            0
        };
        (0..tree.nodes[&node].virtual_size / UNIT).map(block).collect()
    }

    /// Reads all volumes.
    fn read_all(tree: &Tree, files: &Files) -> BTreeMap<VolumeKey, Vec<u8>> {
        tree.volumes.iter().map(|(key, volume)| (*key, read(tree, files, volume.node))).collect()
    }

    /// A tree of nodes of any sizes, some of them hidden.
    fn trees() -> impl Strategy<Value = (Tree, Files)> {
        let node = (any::<Index>(), 1..8_u64, any::<bool>(), prop::collection::btree_map(0..8_u64, 0..4_u8, 0..6));
        prop::collection::vec(node, 1..9).prop_map(|nodes| {
            let volume = || Volume::new(String::new(), String::new());
            let mut tree = Tree::of_one(VolumeKey::random(), volume(), UNIT);
            (tree.nodes, tree.volumes) = (BTreeMap::new(), BTreeMap::new());
            let mut files = Files::new();
            let mut made = Vec::new();
            let mut named = Vec::new();
            for (parent, size, is_named, data) in nodes {
                let id = NodeId::random();
                let parent = if made.is_empty() { None } else { Some(*parent.get(&made)) };
                let content = Some(ContentId::random());
                tree.nodes.insert(id, Node { content, ..Node::new(parent, size * UNIT) });
                files.insert(id, data.into_iter().filter(|(at, _)| *at < size).collect());
                made.push(id);
                named.push(is_named);
            }
            for (id, is_named) in made.iter().zip(named) {
                if is_named || tree.children(*id).next().is_none() {
                    tree.volumes.insert(VolumeKey::random(), Volume { node: *id, ..volume() });
                }
            }
            (tree, files)
        })
    }

    /// Copies one block of a merge.
    fn copy(tree: &Tree, files: &mut Files, merge: Merge, at: u64) {
        let (upper, lower) = (files[&merge.upper].get(&at).copied(), files[&merge.lower].get(&at).copied());
        let sizes = [merge.upper, merge.lower].map(|node| tree.nodes[&node].virtual_size / UNIT);
        match merge.direction {
            Direction::Down => files.get_mut(&merge.lower).unwrap().extend(upper.map(|found| (at, found))),
            Direction::Up if upper.is_none() && at < sizes[0] => {
                files.get_mut(&merge.upper).unwrap().extend(lower.map(|found| (at, found)));
            }
            Direction::Up => {}
        }
    }

    proptest! {
        #[test]
        fn nobody_reads_anything_else_however_far_a_merge_has_come(
            ((tree, mut files), order) in (trees(), prop::collection::vec((0..8_u64, any::<bool>()), 0..10)),
            (sectors, which) in (any::<(bool, bool)>(), any::<Index>()),
        ) {
            prop_assert_eq!(tree.check(), Ok(()));
            let expected = read_all(&tree, &files);
            let mut tree = tree;
            loop {
                let by_sector = BySector { lower: sectors.0, upper: sectors.1 };
                let all = pairs(&tree).into_iter().flat_map(|(lower, upper)| {
                    let found = directions(&tree, lower, upper, by_sector).unwrap();
                    found.into_iter().map(move |direction| Merge { lower, upper, direction })
                });
                let all: Vec<Merge> = all.collect();
                if all.is_empty() {
                    break;
                }
                let merge = *which.get(&all);
                let marked = begun(&tree, merge);
                prop_assert_eq!(marked.check(), Ok(()));
                for (at, _) in &order {
                    copy(&tree, &mut files, merge, *at);
                    prop_assert_eq!(&read_all(&marked, &files), &expected);
                }
                if order.iter().any(|(_, gives_up)| *gives_up) {
                    // The lower file was grown by then, or not.
                    let size = tree.nodes[&merge.upper].virtual_size;
                    let size = if order.len() % 2 == 0 { size } else { tree.nodes[&merge.lower].virtual_size };
                    let left = given_up(&marked, merge, size);
                    prop_assert_eq!(left.check(), Ok(()));
                    prop_assert_eq!(&read_all(&left, &files), &expected);
                }
                (0..8).for_each(|at| copy(&tree, &mut files, merge, at));
                let (after, relinked) = merged(&marked, merge).unwrap();
                prop_assert_eq!(after.check(), Ok(()));
                prop_assert_eq!(after.nodes.len() + 1, tree.nodes.len());
                prop_assert_eq!(&read_all(&after, &files), &expected);
                prop_assert_eq!(after.volumes.len(), tree.volumes.len());
                for (id, node) in &after.nodes {
                    let before = tree.nodes.get(id).unwrap();
                    prop_assert!(before.parent == node.parent || relinked.contains(id), "a header is forgotten");
                    // A name stays with what reads as it does.
                    let origin = tree.nodes.iter().find(|(_, found)| found.content == node.content).unwrap();
                    prop_assert_eq!(read(&tree, &files, *origin.0), read(&after, &files, *id));
                }
                tree = after;
            }
        }
    }

    /// Makes a tree of a hidden node with a volume's node on it.
    fn hidden() -> (Tree, NodeId, NodeId, VolumeKey) {
        let key = VolumeKey::random();
        let mut tree = Tree::of_one(key, Volume::new(String::new(), String::new()), UNIT);
        let lower = tree.volumes[&key].node;
        let upper = NodeId::random();
        tree.nodes.insert(upper, Node::new(Some(lower), UNIT));
        tree.volumes.get_mut(&key).unwrap().node = upper;
        (tree, lower, upper, key)
    }

    #[test]
    fn only_a_node_that_nothing_names_is_merged() {
        type Change = fn(&mut Tree, NodeId, NodeId, VolumeKey);
        let (tree, lower, upper, _) = hidden();
        assert_eq!(pairs(&tree), [(lower, upper)]);
        let changes: [Change; 5] = [
            |tree, lower, _, _| {
                tree.volumes.insert(VolumeKey::random(), Volume { node: lower, ..Volume::new("".into(), "".into()) });
            },
            |tree, lower, _, _| {
                tree.nodes.insert(NodeId::random(), Node::new(Some(lower), UNIT));
            },
            |tree, lower, _, _| {
                let past = Past { parent: Some(lower), virtual_size: UNIT };
                tree.history.insert(NodeId::random(), past);
            },
            |tree, lower, _, _| {
                tree.history.insert(lower, Past { parent: None, virtual_size: UNIT });
            },
            |tree, _, upper, key| {
                tree.scratch.insert(key, crate::store::Scratch { node: Some(upper), ended: false });
            },
        ];
        for change in changes {
            let (mut tree, lower, upper, key) = hidden();
            change(&mut tree, lower, upper, key);
            assert_eq!(pairs(&tree), []);
        }
    }

    #[test]
    fn what_is_known_by_sectors_stays_so_and_what_the_history_names_stays() {
        let (mut tree, lower, upper, _) = hidden();
        let of = |tree: &Tree, lower_is, upper_is| {
            directions(tree, lower, upper, BySector { lower: lower_is, upper: upper_is }).unwrap()
        };
        assert_eq!(of(&tree, false, false), [Direction::Up, Direction::Down]);
        assert_eq!(of(&tree, true, false), [Direction::Down]);
        assert_eq!(of(&tree, false, true), [Direction::Up]);
        assert_eq!(of(&tree, true, true), [Direction::Up]);
        tree.history.insert(NodeId::random(), Past { parent: Some(upper), virtual_size: UNIT });
        assert_eq!(of(&tree, false, false), [Direction::Up]);
        assert_eq!(of(&tree, true, false), []);
    }
}
