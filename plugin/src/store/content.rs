//! What nodes read as, by name (docs/mirroring.md).
//!
//! A name stands for bytes that never change, with zeroes after their end: a node that is enlarged keeps its name. Two
//! nodes with one name read the same; what reads the same may well have two names. So a name may be taken away at any
//! time, and given only when nobody writes to the node, nor will while it has the name:
//!
//! - a node that others come to lie on is never written again: it is named in the commit that adds them;
//! - a node that was written to is named once it is closed and flushed, in the commit that takes back the host's claim;
//! - the commit by which a host claims a volume for writing takes the name of the volume's node away, before the node
//!   is opened.

use super::allocation::Allocation;
use super::locked::LoadedTree;
use super::tree::{Change, Tree};
use crate::error::Result;
use crate::id::{ContentId, NodeId};
use crate::mirror::Base;
use crate::qemu::Image;

/// Names what the nodes hold that a change's new ones lie on, where they have no name; nobody writes to them any more.
pub(super) fn frozen(tree: &mut Tree, change: &Change, content: ContentId) {
    if let Some(node) = below(change).and_then(|below| tree.nodes.get_mut(&below)) {
        node.content.get_or_insert(content);
    }
}

/// Names what a node held that was written to until a change's new nodes were laid on it.
pub(super) fn left(tree: &mut Tree, change: &Change, content: ContentId) {
    if let Some(node) = below(change).and_then(|below| tree.nodes.get_mut(&below)) {
        node.content = Some(content);
    }
}

/// Gives the node that a change's new ones lie on: it is the same for all of them.
fn below(change: &Change) -> Option<NodeId> {
    change.nodes.values().find_map(|node| node.parent.filter(|parent| !change.nodes.contains_key(parent)))
}

impl LoadedTree {
    /// Tells what a chain reads as, given top first with its files; nobody has the top open. What cannot be told is not
    /// known.
    pub fn base(&self, chain: &[Image]) -> Base {
        self.find_base(chain).unwrap_or_else(|error| {
            tracing::warn!(error = error.chain(), "what a volume reads as cannot be told");
            Base::Unknown
        })
    }

    fn find_base(&self, chain: &[Image]) -> Result<Base> {
        let mut seen = u64::MAX;
        for image in chain {
            let node = self.tree.node(image.node)?;
            // The end of this one is hidden, so that it is not what is read.
            if node.virtual_size > seen {
                return Ok(Base::Unknown);
            }
            seen = node.virtual_size;
            if let Some(content) = node.content {
                return Ok(Base::Content(content));
            }
            if !Allocation::open(image)?.is_empty()? {
                return Ok(Base::Unknown);
            }
        }
        Ok(Base::Blank)
    }
}
