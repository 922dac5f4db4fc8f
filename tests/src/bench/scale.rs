//! How much of everything a run takes.

use std::time::Duration;

/// Sizes and numbers of repetitions.
#[derive(Debug, Clone)]
pub struct Scale {
    /// Its name.
    pub name: &'static str,
    /// Samples of each call.
    pub calls: usize,
    /// Disks that are called for at once.
    pub crowd: usize,
    /// Repetitions of that.
    pub crowd_runs: usize,
    /// Volumes of the SRs that calls are made on, ascending; the last two are those that SR.ls is compared on.
    pub volumes: [usize; 4],
    /// Samples of SR.ls.
    pub scans: usize,
    /// Bytes of a full mirror.
    pub mirror: u64,
    /// Samples of each mirror.
    pub mirrors: usize,
    /// Bytes of the large volume of which little is written.
    pub sparse: u64,
    /// Bytes that are written of it.
    pub sparse_data: u64,
    /// Bytes of the reference tree's disk.
    pub tree: u64,
    /// Migrations of it by each flow.
    pub trees: usize,
    /// Migrations of it by full mirrors, by the flows tree and base.
    pub full_trees: [usize; 2],
    /// Whether the copies are compared with their sources.
    pub compare: bool,
    /// Live snapshots.
    pub snapshots: usize,
    /// The time around a snapshot in which the longest write is looked for.
    pub window: Duration,
    /// Bytes that are written to by the guest around a snapshot.
    pub guest: u64,
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

impl Scale {
    /// What figures are told of: about ten minutes on two processors.
    #[must_use]
    pub fn full() -> Self {
        Self {
            name: "full",
            calls: 30,
            crowd: 32,
            crowd_runs: 5,
            volumes: [10, 100, 1_000, 10_000],
            scans: 7,
            mirror: 2 * GIB,
            mirrors: 5,
            sparse: 1 << 40,
            sparse_data: 64 * MIB,
            tree: 2 * GIB,
            trees: 3,
            full_trees: [2, 2],
            compare: true,
            snapshots: 20,
            window: Duration::from_secs(1),
            guest: 256 * MIB,
        }
    }

    /// Enough to see that everything is measured; its figures mean nothing.
    #[must_use]
    pub fn small() -> Self {
        Self {
            name: "small",
            calls: 1,
            crowd: 3,
            crowd_runs: 1,
            volumes: [4, 6, 8, 12],
            scans: 1,
            mirror: 4 * MIB,
            mirrors: 1,
            sparse: 8 * GIB,
            sparse_data: MIB,
            tree: 4 * MIB,
            trees: 1,
            full_trees: [1, 0],
            compare: true,
            snapshots: 1,
            window: Duration::from_millis(100),
            guest: MIB,
        }
    }
}
