//! What the last worker of an SR on this host does or did, for people.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::host::{Host, Process};
use crate::id::{NodeId, SrUuid, TreeId};
use crate::record::{self, Durability, Record};
use crate::store::Sr;

/// How it begins to say what it does when it merges nodes.
pub(super) const MERGING: &str = "merging nodes ";

/// The record of a worker, `<run>/gc/<sr>.json`. Written by the worker alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    format: u64,
    /// The worker's process.
    pub worker: Process,
    /// What it is doing; nothing once it has ended.
    #[serde(default)]
    pub doing: Option<String>,
    /// What it left undone, and why.
    #[serde(default)]
    pub undone: Vec<Undone>,
    /// How many nodes it has merged into others.
    #[serde(default)]
    pub merged: u64,
}

/// A hidden node that was not merged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Undone {
    /// Its tree.
    pub tree: TreeId,
    /// The node; none where the tree as a whole could not be looked at.
    #[serde(default)]
    pub node: Option<NodeId>,
    /// Why.
    pub reason: String,
    /// Whether it failed; else it waits for somebody.
    #[serde(default)]
    pub failed: bool,
}

impl Undone {
    /// Says what was not done: which node, or which tree.
    pub fn subject(&self) -> String {
        self.node.map_or_else(|| format!("tree {}", self.tree), |node| format!("node {node}"))
    }

    /// Says how it is with that.
    pub fn how(&self) -> &'static str {
        if self.failed { "failed" } else { "waits" }
    }
}

impl Record for State {
    const FORMAT: u64 = 1;
}

impl State {
    /// Makes the record of a worker that begins: the process that calls.
    ///
    /// # Errors
    ///
    /// When the process cannot be named.
    pub(super) fn begin(host: &Host) -> Result<Self> {
        let worker = Process::current(host)?;
        Ok(Self { format: Self::FORMAT, worker, doing: None, undone: Vec::new(), merged: 0 })
    }

    /// Reads the record of the last worker on this host.
    ///
    /// # Errors
    ///
    /// When it is there and cannot be read.
    pub fn load(host: &Host, sr: SrUuid) -> Result<Option<Self>> {
        record::read_if_present(&host.gc_dir(sr).with_extension("json"))
    }

    /// Writes the record.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub(super) fn store(&self, host: &Host, sr: SrUuid) -> Result<()> {
        record::write(&host.gc_dir(sr).with_extension("json"), self, Durability::UntilReboot)
    }

    /// Removes the record of a worker that left nothing to tell of.
    ///
    /// # Errors
    ///
    /// When it cannot be removed.
    pub fn remove(host: &Host, sr: SrUuid) -> Result<()> {
        record::remove(&host.gc_dir(sr).with_extension("json"))
    }

    /// Gives what the worker is doing, while it runs.
    pub fn doing_now(&self, host: &Host) -> Option<&str> {
        self.doing.as_deref().filter(|_| self.worker.is_alive(host))
    }

    /// Gives which nodes are being merged, and how far that is.
    pub fn merging(&self, host: &Host) -> Option<&str> {
        self.doing_now(host).filter(|doing| doing.starts_with(MERGING))
    }

    /// Gives what was left undone and still is: another host may have done it since.
    pub fn still_undone(&self, sr: &Sr) -> Vec<&Undone> {
        let is_left = |undone: &&Undone| match (undone.node, sr.read_tree(undone.tree)) {
            (Some(node), Ok(Some(loaded))) => loaded.tree.nodes.contains_key(&node),
            (_, Ok(None)) => false,
            _ => true,
        };
        self.undone.iter().filter(is_left).collect()
    }
}
