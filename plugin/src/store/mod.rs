//! The SR on disk: its record, its trees of nodes and volumes, their locks and their replacement.
//!
//! ```text
//! <sr>/sr.json                          the SR's record (SrRecord)
//! <sr>/lock                             SR.create, SR.destroy, SR.attach and the SR's name
//! <sr>/volumes/<volume>                 symlink to ../trees/<tree>
//! <sr>/trees/<tree>/tree.json           what nodes and volumes there are (Tree)
//! <sr>/trees/<tree>/<node>.qcow2        a node
//! <sr>/trees/<tree>/<node>.changed.json what a node changed whose file is gone, or says something else since
//! <sr>/trees/<tree>/lock                whoever changes tree.json or the files holds it
//! <sr>/trees/<tree>/merge               whoever merges two nodes' data holds its lock, beside no other
//! <sr>/trees/<tree>/merge.stop          asks them to stop
//! <sr>/gc, <sr>/gc.next                 the locks of the one that merges, and of the one that is to be next
//! <sr>/trees/<tree>/spare               blocks set aside for a tree.json, so that a full file system can be freed, and
//!                                       a copy of it for when it is lost
//! <sr>/trees/<tree>/tree.json.damaged   what was found in its place when it was made anew from that and the images
//! <sr>/trees/.new-<tree>/               a tree being made; renamed into place
//! <sr>/trees/.old-<tree>/               a tree whose last volume is gone, being removed
//! ```
//!
//! tree.json is the truth. A file is made before the commit that names it and removed after the commit that drops
//! it, so what tree.json names exists, and what it does not name is garbage. A symlink in `volumes` only says where
//! to look: it exists for every volume, and may be left over for a volume that is gone.
//!
//! Readers take no lock: they see one tree.json or the next. Changes are pure functions from [`Tree`] to [`Tree`]
//! ([`plan`]), carried out by whoever holds the tree's lock ([`LockedTree`]). Locks are taken in the order SR,
//! tree, attachment, and none is held across a job.

mod allocation;
mod blank;
mod changed;
pub mod coalesce;
pub mod compose;
mod content;
mod examine;
mod extent;
mod finding;
mod garbage;
mod header;
pub mod health;
mod intent;
mod listing;
mod locked;
mod mend;
mod new;
pub mod plan;
pub mod reader;
mod rebuild;
mod scratch;
mod spare;
mod sr;
mod tree;
mod uri;

/// What is private and fuzzed ([`crate::fuzz`]).
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed {
    pub(crate) use super::allocation::{Allocation, State};
    pub(crate) use super::changed::Changed;
    pub(crate) use super::sr::AttachedRecord;
}

pub use allocation::BLOCK;
pub use blank::{Blank, Unit};
pub use changed::Bitmap;
pub use examine::Examination;
pub use finding::{Finding, Severity};
pub use header::Header;
pub use locked::{LoadedTree, LockedTree};
pub use new::NewTree;
pub use rebuild::{RECOVERED, Rebuilt};
pub use sr::{Sr, SrRecord, is_read_only, is_same};
pub use tree::{
    Activation, Change, Direction, Intent, MAX_VIRTUAL_SIZE, Merge, Mode, Move, Node, OpenMerge, Past, SIZE_UNIT,
    Scratch, Tree, Volume,
};
pub use uri::{sr_path, sr_uri};
