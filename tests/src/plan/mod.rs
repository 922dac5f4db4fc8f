//! A plan: what is done to a VM's disks before they are migrated, as JSON.
//!
//! ```json
//! {
//!   "size": 16777216,
//!   "steps": [
//!     {"write": {"offset": 0, "length": 65536, "seed": 1}},
//!     {"snapshot": "a"},
//!     {"zero": {"offset": 4096, "length": 4096}},
//!     {"discard": {"offset": 0, "length": 65536}},
//!     {"resize": 33554432},
//!     {"revert": "a"},
//!     {"snapshot": "b"},
//!     {"destroy": "a"}
//!   ],
//!   "guest": {"writes_per_second": 500},
//!   "halted": false
//! }
//! ```
//!
//! - All numbers are bytes. `disks` instead of `size` gives several disks, each a size or `{"size": bytes}`; a step then says
//!   `"disk": index`, beside its action or inside it, and 0 is meant where nothing is said. Snapshots, reverts and the
//!   destruction of a snapshot are of the VM, so of all its disks, whatever index they carry.
//! - `write` puts bytes there that follow from seed and position. A `discard`ed byte reads as before or as zero. `resize` only
//!   grows; a revert takes the size back as well.
//! - `guest` has a guest write during the migration: `writes_per_second` of 0, or absent, is as fast as it can, the way QEMU
//!   spells an unlimited speed. Without `guest` nobody writes; and nobody does while the VM is `halted`.

mod execute;
mod model;
mod parse;

pub use execute::{Machine, run};
pub use model::{Disk, Mismatch, Model, fill};

/// A checked plan: every range lies inside its disk as it is at that step, every name is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The first size of each disk, in bytes.
    pub disks: Vec<u64>,
    /// What to do, in this order.
    pub steps: Vec<Step>,
    /// The guest that writes during the migration, if one does.
    pub guest: Option<GuestPlan>,
    /// Whether the VM is halted when it is migrated.
    pub halted: bool,
}

/// How a guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestPlan {
    /// Writes a second and disk; `None` is as fast as it can.
    pub writes_per_second: Option<u64>,
}

/// One step of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Something done to one disk.
    Disk {
        /// Which disk.
        disk: usize,
        /// What is done.
        action: Action,
    },
    /// A snapshot of the VM, under a name of its own.
    Snapshot(String),
    /// The VM goes back to a snapshot.
    Revert(String),
    /// A snapshot goes; what lies on it stays.
    Destroy(String),
}

/// What is done to one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Writes bytes that follow from the seed and their position.
    Write {
        /// Where.
        range: Extent,
        /// What.
        seed: u64,
    },
    /// Says that bytes are not needed any more.
    Discard(Extent),
    /// Makes bytes zero.
    Zero(Extent),
    /// Makes the disk larger.
    Resize(u64),
}

/// Some bytes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The first.
    pub offset: u64,
    /// How many.
    pub length: u64,
}

impl Extent {
    /// The first byte behind it.
    pub fn end(self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// What is wrong with a plan, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error(String);

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

impl Plan {
    /// Reads a plan and checks it from the first step to the last.
    ///
    /// # Errors
    /// Names the field or the step that is wrong, and why.
    pub fn parse(json: &[u8]) -> Result<Self, Error> {
        let plan = parse::read(json)?;
        plan.model()?;
        Ok(plan)
    }

    /// What the disks and snapshots hold after all steps.
    ///
    /// # Errors
    /// Names the first step that cannot be done.
    pub fn model(&self) -> Result<Model, Error> {
        let mut model = Model::new(&self.disks)?;
        for (index, step) in self.steps.iter().enumerate() {
            model.apply(step).map_err(|reason| Error(format!("steps[{index}]: {reason}")))?;
        }
        Ok(model)
    }

    /// Writes the plan as [`Plan::parse`] reads it.
    pub fn to_json(&self) -> serde_json::Value {
        parse::write(self)
    }
}
