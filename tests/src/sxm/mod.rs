//! Storage migration: the three flows of xapi, what they remember, and how they clean up.
//!
//! ```text
//!   migrate ── order the VDIs ── for each: copy or mirror ── metadata ── switch ── destroy the source
//!                                  │  leaf: SMAPIv3 mirror of the live leaf, DATA.copy of each snapshot alone
//!                                  │  tree: one mirror a disk that walks the tree first, depth first
//!                                  │  base: each snapshot mirrored into a clone of its parent's copy
//!                 any failure ─────┴─ unwind, last VDI first: stop, destroy, DP.destroy
//! ```
//!
//! A failure leaves what xapi itself would leave; [`sweep`] then does what a user would: it scans and destroys what no
//! database knows.

mod base;
mod cleanup;
mod copy;
mod engine;
mod leaf;
mod observe;
mod order;
mod state;
mod switch;
mod tree;
pub mod v1;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub use cleanup::{Swept, release, sweep, toolstack_restart};
pub use engine::migrate;
pub use observe::{Answer, Event, Observer, Quiet};
pub use state::{MirrorId, Receiving, Sending, State};

use crate::db::VmRef;
use crate::host::{Host, Wire};
use crate::report::Phases;
use crate::smapiv2::{Error, Sr, Vdi};

/// How snapshots travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Only the live leaf goes through the SMAPIv3 engine; each snapshot is copied alone.
    Leaf,
    /// The tree is walked depth first, inactive branches on clones, the active path on the working volume.
    Tree,
    /// Each volume is copied into a clone of its parent's copy.
    Base,
}

impl Flow {
    /// Its name in plans and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Leaf => "leaf",
            Self::Tree => "tree",
            Self::Base => "base",
        }
    }
}

/// Asks a migration to stop; it does so where xapi would look. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks.
    pub fn ask(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Ends the work in hand if somebody asked.
    ///
    /// # Errors
    /// [`Error::Cancelled`]
    pub fn check(&self) -> Result<(), Error> {
        if self.0.load(Ordering::SeqCst) { Err(Error::Cancelled) } else { Ok(()) }
    }
}

/// What to migrate where.
#[derive(Debug, Clone)]
pub struct Migration {
    /// The VM; its snapshots go with it.
    pub vm: VmRef,
    /// The destination host, which may be the source host.
    pub destination: Arc<Host>,
    /// The destination SR, attached there.
    pub sr: Sr,
    /// The flow.
    pub flow: Flow,
    /// How often the flows tree and base ask how far a mirror is; xapi does every half second.
    pub poll: Duration,
    /// Asked to stop by others.
    pub cancel: Cancel,
}

impl Migration {
    /// A migration with xapi's own timing.
    #[must_use]
    pub fn new(vm: VmRef, destination: &Arc<Host>, sr: &Sr, flow: Flow) -> Self {
        Self {
            vm,
            destination: Arc::clone(destination),
            sr: sr.clone(),
            flow,
            poll: Duration::from_millis(500),
            cancel: Cancel::default(),
        }
    }
}

/// A volume that has moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// The volume at the source.
    pub source: Vdi,
    /// The volume at the destination.
    pub destination: Vdi,
    /// The source volume that it is based on, as the VM's history has it.
    pub parent: Option<Vdi>,
    /// The name of the snapshot; none for a live leaf.
    pub snapshot: Option<String>,
    /// The disk's place in the VM.
    pub disk: usize,
}

/// A migration that has succeeded.
#[derive(Debug)]
pub struct Migrated {
    /// Every volume, parents before children.
    pub moved: Vec<Moved>,
    /// How long each phase took.
    pub phases: Phases,
    /// From the VM's suspension until it was resumed; none for a halted VM.
    pub downtime: Option<Duration>,
    /// Every connection there was, in the order they were opened.
    pub wires: Vec<Arc<Wire>>,
    /// What xapi forgets to finalise for a halted VM: see [`release`].
    pub stale: Vec<Receiving>,
    /// Source volumes that could not be destroyed, which xapi only logs in the flow tree.
    pub not_destroyed: Vec<Vdi>,
}

/// A migration that has failed and was cleaned up after.
#[derive(Debug, thiserror::Error)]
#[error("the migration failed in phase {phase}")]
pub struct Failed {
    /// Why.
    #[source]
    pub error: Error,
    /// In which phase.
    pub phase: String,
    /// What xapi's own clean-up left at either side and a user had to destroy.
    pub swept: Vec<Swept>,
    /// Whether the VM had been suspended and was started again at the source.
    pub restarted: bool,
    /// Every connection there was.
    pub wires: Vec<Arc<Wire>>,
}

#[cfg(test)]
mod tests;
