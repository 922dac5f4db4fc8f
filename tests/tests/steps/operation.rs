//! The operations of a history, and what each is to do to the volumes.

use std::collections::BTreeMap;

use anyhow::Context;

/// The unit of what is written, in bytes.
pub const BLOCK: u64 = 64 << 10;

/// The size of a volume that was not resized, and of what a resize adds, in bytes.
pub const SIZE: u64 = 16 * BLOCK;

/// What is done to the small SR: to its volume `v`, of which `s` is a snapshot, and to `w`, which is laid on `p`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// A new volume.
    Create,
    /// A guest writes to `v`, and flushes.
    Write,
    /// A snapshot of `v`.
    Snapshot,
    /// A clone of `s`.
    Clone,
    /// `v` goes back to `s`.
    Revert,
    /// `v` grows.
    Resize,
    /// `s` goes.
    Prune,
    /// `v` goes.
    Destroy,
    /// `w` is laid on `p`, which goes.
    Compose,
    /// A guest has `v`.
    Activate,
    /// The guest goes.
    Deactivate,
    /// Space is brought back.
    Gc,
    /// A migration writes to `w` without ever flushing, and then ends.
    Receive,
    /// The data of `s` goes.
    Forget,
}

/// What a volume holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Disk {
    /// Its size in bytes.
    pub size: u64,
    /// The byte that fills each block; those that are not here are zeroes.
    pub blocks: BTreeMap<u64, u8>,
    /// Whether its data was destroyed, and only what is told of it is left.
    pub is_forgotten: bool,
}

/// What is to be there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    /// The volumes, by what they are called here.
    pub volumes: BTreeMap<String, Disk>,
    /// Whether a guest has `v`.
    pub active: bool,
    /// Whether `w` was laid on `p`.
    pub composed: bool,
}

impl Model {
    /// The small SR as every history finds it; [`super::world::World::after`] makes it.
    pub fn small() -> Self {
        let disk =
            |blocks: &[(u64, u8)]| Disk { size: SIZE, blocks: blocks.iter().copied().collect(), is_forgotten: false };
        let volumes = [
            ("v", disk(&[(0, 1), (1, 2), (2, 2)])),
            ("s", disk(&[(0, 1), (1, 1)])),
            ("w", disk(&[(3, 3)])),
            ("p", disk(&[(3, 4), (4, 4)])),
        ];
        let volumes = volumes.into_iter().map(|(name, disk)| (name.to_owned(), disk)).collect();
        Self { volumes, active: false, composed: false }
    }
}

impl Operation {
    /// Those of which every short history is made.
    pub const ALL: [Self; 12] = [
        Self::Create,
        Self::Write,
        Self::Snapshot,
        Self::Clone,
        Self::Revert,
        Self::Resize,
        Self::Prune,
        Self::Destroy,
        Self::Compose,
        Self::Activate,
        Self::Deactivate,
        Self::Gc,
    ];

    /// Those that are not among them.
    pub const MORE: [Self; 2] = [Self::Receive, Self::Forget];

    /// Tells whether it adds a volume each time that it is asked for.
    pub fn adds(self) -> bool {
        matches!(self, Self::Create | Self::Snapshot | Self::Clone)
    }

    /// Gives what is to be there afterwards; `None` when it is to be refused. `place` is how many came before it.
    pub fn effect(self, before: &Model, place: usize) -> Option<Model> {
        let mut after = before.clone();
        let new = format!("new{place}");
        match self {
            Self::Create => {
                after.volumes.insert(new, Disk { size: SIZE, ..Disk::default() });
            }
            Self::Write => {
                let (block, byte) = (5 + place as u64, 10 + place as u8);
                after.volumes.get_mut("v")?.blocks.insert(block, byte);
            }
            Self::Snapshot => {
                after.volumes.insert(new, before.volumes.get("v")?.clone());
            }
            Self::Clone => {
                after.volumes.insert(new, before.volumes.get("s").filter(|disk| !disk.is_forgotten)?.clone());
            }
            Self::Revert if before.active => return None,
            Self::Revert => {
                let held = before.volumes.get("s").filter(|disk| !disk.is_forgotten)?.clone();
                *after.volumes.get_mut("v")? = held;
            }
            Self::Resize => after.volumes.get_mut("v")?.size += SIZE,
            Self::Prune => drop(after.volumes.remove("s")),
            Self::Destroy if before.active => return None,
            Self::Destroy => drop(after.volumes.remove("v")),
            Self::Compose if before.composed => {}
            Self::Compose => {
                let below = after.volumes.remove("p")?;
                let laid = after.volumes.get_mut("w")?;
                for (block, byte) in below.blocks {
                    laid.blocks.entry(block).or_insert(byte);
                }
                after.composed = true;
            }
            Self::Activate => {
                before.volumes.get("v")?;
                after.active = true;
            }
            Self::Deactivate => after.active = false,
            Self::Gc => {}
            Self::Receive => {
                let (block, byte) = (8 + place as u64, 40 + place as u8);
                after.volumes.get_mut("w")?.blocks.insert(block, byte);
            }
            Self::Forget => after.volumes.get_mut("s")?.is_forgotten = true,
        }
        Some(after)
    }
}

impl std::str::FromStr for Operation {
    type Err = anyhow::Error;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().chain(Self::MORE).find(|operation| format!("{operation:?}") == word);
        found.with_context(|| format!("{word} is no operation"))
    }
}
