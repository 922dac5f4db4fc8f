//! Volumes whose guest's writes are thrown away.
//!
//! ```text
//!   opened          activated for writing         closed, or opened again
//!
//!     V               V    scratch                  V
//!     │               │      │                      │
//!    [N]    ──►      [N] ◄──[T]           ──►      [N]
//! ```
//!
//! Such a volume keeps its node, and everything that is done with the volume is done with that: a snapshot or a clone
//! holds what will be there after the guest. Its datapath alone reads and writes a node on top, which belongs to no
//! volume. That stays while the guest is suspended, wherever it goes on, and goes when the volume is closed or opened
//! again, or when it is next activated after the host that had it open has died.

use std::collections::BTreeMap;

use super::locked::LockedTree;
use super::plan;
use super::tree::{Change, Node, Scratch, Tree};
use crate::error::{Error, Result};
use crate::id::{NodeId, VolumeKey};
use crate::qemu::Image;

/// Plans that what was written to a volume is thrown away; what is written later as well, where `again` says so.
fn emptied(tree: &Tree, key: VolumeKey, again: bool) -> Tree {
    let mut after = tree.clone();
    if let Some(node) = after.scratch.remove(&key).and_then(|scratch| scratch.node) {
        plan::prune(&mut after, node);
    }
    if again {
        after.scratch.insert(key, Scratch::default());
    }
    after
}

impl LockedTree {
    /// Tells whether what a guest writes to a volume is thrown away.
    pub fn scratch(&self, key: VolumeKey) -> Option<&Scratch> {
        self.tree.scratch.get(&key)
    }

    /// Throws away what was written to a volume that nobody has open and, where `again` says so, what is written from
    /// now on.
    ///
    /// # Errors
    ///
    /// When the record cannot be written; everything is then as before.
    pub fn empty_scratch(&mut self, key: VolumeKey, again: bool) -> Result<()> {
        let after = emptied(&self.tree, key, again);
        if after == self.tree {
            return Ok(());
        }
        self.commit(after)?;
        self.sweep([]);
        Ok(())
    }

    /// Writes down that what was written to a volume is thrown away once nobody has it open any more.
    ///
    /// # Errors
    ///
    /// When the record cannot be written.
    pub fn end_scratch_later(&mut self, key: VolumeKey) -> Result<()> {
        let mut after = self.tree.clone();
        match after.scratch.get_mut(&key) {
            Some(scratch) if !scratch.ended => {
                scratch.ended = true;
                self.commit(after)
            }
            _ => Ok(()),
        }
    }

    /// Makes the node that takes what a guest writes, unless it is there.
    ///
    /// # Errors
    ///
    /// When it cannot be made; nothing of it is left then.
    pub fn make_scratch(&mut self, key: VolumeKey) -> Result<()> {
        if self.scratch(key).is_some_and(|scratch| scratch.node.is_some()) {
            return Ok(());
        }
        let below = self.volume(key)?.node;
        let node = NodeId::random();
        let virtual_size = self.tree.node(below)?.virtual_size;
        let nodes = BTreeMap::from([(node, Node::new(Some(below), virtual_size))]);
        let change = Change { nodes, ..Change::default() };
        let mut after = plan::applied(&self.tree, &change);
        after.scratch.entry(key).or_default().node = Some(node);
        self.prepare(&change)?;
        let committed = self.commit(after);
        if committed.is_err() {
            self.sweep([]);
        }
        committed
    }

    /// Gives the files that a guest of a volume reads, as [`super::LoadedTree::chain_images`] does, what it wrote and
    /// is to be thrown away included.
    ///
    /// # Errors
    ///
    /// [`Error::Image`] for a file that is missing or not what it should be.
    pub fn datapath_images(&self, key: VolumeKey) -> Result<Vec<Image>> {
        match self.scratch(key).and_then(|scratch| scratch.node) {
            Some(top) => self.tree.chain(top).into_iter().map(|node| self.checked_image(node)).collect(),
            None => self.chain_images(key),
        }
    }

    /// Refuses an operation that would have to take what a guest wrote along.
    pub(super) fn refuse_scratch(&self, key: VolumeKey) -> Result<()> {
        match self.scratch(key) {
            None => Ok(()),
            Some(_) => {
                let reason = "it was opened so that what is written to it is thrown away".to_owned();
                Err(Error::VolumeInUse { volume: key.to_string(), reason })
            }
        }
    }
}
