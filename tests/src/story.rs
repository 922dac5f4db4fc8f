//! A run from beginning to end, as a page shows it: what was called when, what went over the wires, what guests felt.
//!
//! Times are milliseconds from the beginning of the migration; what came before it has negative ones.

/// What was seen of a run, beside its [`Report`](crate::report::Report).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Story {
    /// What was migrated, for the title.
    pub title: String,
    /// The source host's name in the calls, and the destination's, which may be the same.
    pub hosts: (String, String),
    /// When the migration was over, its own clean-up included.
    pub ended: f64,
    /// The migration's phases in their order.
    pub phases: Vec<Phase>,
    /// When the VM was suspended.
    pub pause: Option<Pause>,
    /// Every script call of both hosts, in the order in which they began.
    pub calls: Vec<Call>,
    /// Every connection from the source to the destination, in the order in which they were opened.
    pub mirrors: Vec<Mirror>,
    /// What guests felt, one a disk.
    pub guests: Vec<Guest>,
    /// The source's nodes just before the migration, parents before children.
    pub source_before: Vec<Node>,
    /// The source's nodes once everything was over.
    pub source_after: Vec<Node>,
    /// The destination's nodes once everything was over.
    pub destination_after: Vec<Node>,
    /// Why the migration failed, if it did.
    pub failure: Option<Failure>,
}

/// A phase of the migration.
#[derive(Debug, Clone, PartialEq)]
pub struct Phase {
    /// Its name.
    pub name: String,
    /// When it began.
    pub from: f64,
    /// When it ended.
    pub to: f64,
}

/// The time in which the VM did not run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pause {
    /// When it was asked to pause.
    pub from: f64,
    /// When its disks were usable again.
    pub to: f64,
    /// How long source and destination were held against each other meanwhile, which is no part of a migration; it is
    /// the last that was done.
    pub judged: f64,
}

/// A script call.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// The host that made it.
    pub host: String,
    /// The method.
    pub method: String,
    /// The volume that it was about, by name, where it was about one.
    pub volume: String,
    /// When it began.
    pub from: f64,
    /// When it ended; `None` if it never did.
    pub to: Option<f64>,
    /// Whether it failed.
    pub failed: bool,
    /// What was answered, for people.
    pub answer: String,
    /// What was done to it on purpose.
    pub fault: Option<String>,
}

/// A connection over which a volume travels.
#[derive(Debug, Clone, PartialEq)]
pub struct Mirror {
    /// The source volume's name.
    pub volume: String,
    /// The destination volume's name, or its beginning.
    pub destination: String,
    /// When it was opened.
    pub from: f64,
    /// When the destination had everything for the first time, if it ever had.
    pub complete: Option<f64>,
    /// The counts over time.
    pub samples: Vec<Sent>,
    /// Bytes that were sent in all.
    pub sent: u64,
    /// Bytes that came back in all.
    pub received: u64,
}

/// How much had been sent at one time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sent {
    /// When.
    pub at: f64,
    /// Bytes to the destination.
    pub bytes: u64,
}

/// What a guest felt.
#[derive(Debug, Clone, PartialEq)]
pub struct Guest {
    /// The disk's name.
    pub disk: String,
    /// By tenths of a second in which any of its commands ended.
    pub moments: Vec<Felt>,
}

/// What a guest felt in a moment; latencies in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Felt {
    /// When the moment began.
    pub at: f64,
    /// Commands that ended in it.
    pub commands: u64,
    /// Half of them took no longer.
    pub p50: f64,
    /// 99 of 100 took no longer.
    pub p99: f64,
    /// The longest.
    pub worst: f64,
}

/// A node of a tree.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// The name of its volume; for a hidden node the beginning of its uuid.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// The place in the list of what it lies on.
    pub parent: Option<usize>,
    /// The size of its content in bytes.
    pub size: u64,
    /// Bytes of data that it has of its own.
    pub own: u64,
    /// Bytes that mirrors of its volume sent, at the source.
    pub sent: Option<u64>,
    /// Whether it reads as the other side's does, where that was looked at.
    pub identical: Option<bool>,
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What the VM writes to.
    Leaf,
    /// A snapshot of the VM.
    Snapshot,
    /// A node that no volume names.
    Hidden,
    /// A volume that is not the VM's.
    Other,
}

/// Why a migration failed, and what was done about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Why.
    pub error: String,
    /// In which phase.
    pub phase: String,
    /// What xapi's own clean-up left and a user had to destroy, and whether that worked.
    pub swept: Vec<String>,
    /// Whether the VM had been suspended and was started again at the source.
    pub restarted: bool,
}
