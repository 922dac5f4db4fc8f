//! What is recorded of a volume's life on this host.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::session::Session;
use crate::device::Loop;
use crate::host::Process;
use crate::id::{Domain, NodeId, SrUuid, VolumeKey, VolumeUri};
use crate::qemu::exchange::Exchange;
use crate::record::Record;
use crate::store::Mode;

/// What a domain does with a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Use {
    /// It was attached and is not active.
    #[serde(rename = "attached")]
    Attached,
    /// It may read.
    #[serde(rename = "ro")]
    ReadOnly,
    /// It may read and write.
    #[serde(rename = "rw")]
    ReadWrite,
}

impl Use {
    /// Gives what the use needs open; nothing for [`Use::Attached`].
    pub fn mode(self) -> Option<Mode> {
        match self {
            Self::Attached => None,
            Self::ReadOnly => Some(Mode::ReadOnly),
            Self::ReadWrite => Some(Mode::ReadWrite),
        }
    }

    /// Tells whether the domain is active.
    pub fn is_active(self) -> bool {
        self != Self::Attached
    }
}

impl From<Mode> for Use {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::ReadOnly => Self::ReadOnly,
            Mode::ReadWrite => Self::ReadWrite,
        }
    }
}

/// The record of a volume with a datapath, `state.json` in the volume's runtime directory. Written by who holds the
/// lock beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    /// The format of the record.
    pub format: u64,
    /// The SR that holds the volume.
    pub sr: SrUuid,
    /// The volume.
    pub volume: VolumeKey,
    /// The boot that the record is about; in a later one nothing of it holds.
    pub boot_id: Uuid,
    /// The volume's daemon, running or not.
    pub daemon: Option<Process>,
    /// Who uses the volume.
    pub domains: BTreeMap<Domain, Use>,
    /// What the daemon has open, which it loses with its life.
    pub open: Option<Open>,
    /// Domains whose last writes could not be flushed when they were deactivated, until they are activated anew
    /// or detached.
    #[serde(default)]
    pub unflushed: BTreeMap<Domain, String>,
    /// The import that writes to the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub import: Option<Import>,
    /// The volume's block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<Device>,
}

/// A block device, and the process behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Device {
    /// The process that serves it.
    pub server: Process,
    /// The loop device, once there is one.
    pub number: Option<Loop>,
    /// Whether it may be written to.
    pub mode: Mode,
    /// The active domains that it is for.
    pub domains: BTreeSet<Domain>,
}

/// An import, for which a relay runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Import {
    /// The domain with whose activation it ends.
    pub domain: Domain,
    /// The relay's process.
    pub relay: Process,
}

/// A chain that is open and exported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Open {
    /// Whether it may be written to.
    pub mode: Mode,
    /// Its nodes, top first.
    pub nodes: Vec<NodeId>,
    /// An overlay that is being put on the top, until it is known whether it was.
    #[serde(default)]
    pub overlay: Option<NodeId>,
    /// Nodes in its middle that are being exchanged, until it is done; `nodes` has those from before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exchange: Option<Exchange>,
    /// What is said of its content; nothing of what is only read, or thrown away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<Session>,
    /// How far it is.
    pub phase: Phase,
}

/// What is being done with a chain: written before it is done, so that what a killed call left is known for what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    /// It is being opened; nobody has been told that it can be used.
    Opening,
    /// It is open.
    Open,
    /// Its export is away for a moment.
    Exporting,
    /// It is being closed; nobody is to use it any more.
    Closing,
    /// What was written to it is flushed, or is known not to be, and it is being removed.
    Removing,
}

impl Record for State {
    const FORMAT: u64 = 1;
}

impl State {
    /// Makes the record of a volume that nobody uses.
    pub fn new(uri: VolumeUri, boot_id: Uuid) -> Self {
        Self {
            format: Self::FORMAT,
            sr: uri.sr,
            volume: uri.volume,
            boot_id,
            daemon: None,
            domains: BTreeMap::new(),
            open: None,
            unflushed: BTreeMap::new(),
            import: None,
            device: None,
        }
    }

    /// Gives the mode that the active domains together need.
    pub fn needed(&self) -> Option<Mode> {
        self.domains.values().filter_map(|usage| usage.mode()).max()
    }
}
