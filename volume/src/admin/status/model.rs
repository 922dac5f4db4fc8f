//! What is shown of a host, whatever the form: these are also the fields of `--json`.

use std::collections::BTreeMap;
use std::fs;

use plugin::attachment::{Attachment, Use};
use plugin::error::Result;
use plugin::failures::Failure;
use plugin::gc;
use plugin::host::Host;
use plugin::id::{Domain, MirrorKey, SrUuid, VolumeKey};
use plugin::mirror::{MirrorRecord, Phase, summary};
use plugin::qemu::storage_daemon;
use plugin::store::{Mode, Sr};
use serde::Serialize;

/// How many of the last failures are shown.
const FAILURES: usize = 5;

/// A host.
#[derive(Debug, Serialize)]
pub struct Status {
    /// The program's version.
    pub version: &'static str,
    /// The storage daemon that is used and its version, or why there is none.
    pub storage_daemon: String,
    /// The SRs that are attached.
    pub srs: Vec<SrStatus>,
    /// The volumes that are attached.
    pub volumes: Vec<VolumeStatus>,
    /// The mirrors that are known, those that ended too, the newest last.
    pub mirrors: Vec<MirrorStatus>,
    /// What failed last, the newest last.
    pub failures: Vec<Failure>,
}

/// An SR.
#[derive(Debug, Default, Serialize)]
pub struct SrStatus {
    /// Its uuid.
    pub sr: String,
    /// Its name.
    pub name: String,
    /// Its directory.
    pub path: String,
    /// Why no more is told of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Bytes that are free.
    pub free: u64,
    /// Bytes that there are.
    pub total: u64,
    /// Trees.
    pub trees: usize,
    /// Volumes.
    pub volumes: usize,
    /// Nodes that no volume names.
    pub hidden: usize,
    /// Nodes of the longest chain.
    pub longest_chain: usize,
    /// Who brings space back, or did last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gc: Option<GcStatus>,
}

/// What brings space back.
#[derive(Debug, Serialize)]
pub struct GcStatus {
    /// What it does, while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub doing: Option<String>,
    /// Nodes that it has merged.
    pub merged: u64,
    /// What it left, and why.
    pub left: Vec<String>,
}

/// A volume that is attached.
#[derive(Debug, Serialize)]
pub struct VolumeStatus {
    /// The volume's uuid.
    pub volume: VolumeKey,
    /// Why no more is told of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Its SR.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sr: Option<SrUuid>,
    /// Its storage daemon's process, while that runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub daemon: Option<i32>,
    /// Bytes of memory that the daemon has.
    pub memory: u64,
    /// Who uses it, and how.
    pub domains: BTreeMap<Domain, Use>,
    /// How its images are open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub open: Option<Mode>,
    /// How many images are open.
    pub nodes: usize,
}

/// A mirror.
#[derive(Debug, Serialize)]
pub struct MirrorStatus {
    /// Its key.
    pub mirror: MirrorKey,
    /// The source volume.
    pub volume: VolumeKey,
    /// Where it stands.
    pub phase: Phase,
    /// Whether it goes on.
    pub is_running: bool,
    /// How much is done, from 0 to 1.
    pub done: f64,
    /// Bytes sent so far.
    pub sent: u64,
    /// Bytes that are sent in a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// Seconds until everything was sent once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<u64>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The same in words.
    pub summary: String,
}

impl Status {
    /// Looks at the host, without a lock.
    pub fn of(host: &Host) -> Result<Self> {
        let daemon = storage_daemon(host);
        let daemon = daemon.map(|daemon| format!("{} {}", daemon.path.display(), daemon.version));
        Ok(Self {
            version: env!("CARGO_PKG_VERSION"),
            storage_daemon: daemon.unwrap_or_else(|error| error.chain()),
            srs: Sr::all_attached(host)?.into_iter().map(|uuid| sr_of(host, uuid)).collect(),
            volumes: Attachment::volumes(host)?.into_iter().filter_map(|key| volume_of(host, key)).collect(),
            mirrors: MirrorRecord::all(host)?.iter().map(|record| mirror_of(host, record)).collect(),
            failures: Failure::last(host, FAILURES),
        })
    }

    /// Tells whether something goes on that comes to an end by itself.
    pub fn is_busy(&self) -> bool {
        let gc = self.srs.iter().any(|sr| sr.gc.as_ref().is_some_and(|gc| gc.doing.is_some()));
        gc || self.mirrors.iter().any(|mirror| mirror.is_running)
    }
}

fn sr_of(host: &Host, uuid: SrUuid) -> SrStatus {
    Sr::attached(host, uuid).and_then(|sr| trees_of(host, &sr)).unwrap_or_else(|error| {
        let path = Sr::attached_path(host, uuid).map(|path| path.display().to_string()).unwrap_or_default();
        SrStatus { sr: uuid.to_string(), path, problem: Some(error.chain()), ..SrStatus::default() }
    })
}

fn trees_of(host: &Host, sr: &Sr) -> Result<SrStatus> {
    let described = sr.describe()?;
    let mut status = SrStatus {
        sr: sr.record.uuid.to_string(),
        name: sr.record.name.clone(),
        path: sr.path.display().to_string(),
        free: described.free_space,
        total: described.total_space,
        ..SrStatus::default()
    };
    for id in sr.tree_ids()? {
        let Some(loaded) = sr.read_tree(id)? else { continue };
        let tree = &loaded.tree;
        status.trees += 1;
        status.volumes += tree.volumes.len();
        status.hidden += tree.nodes.keys().filter(|node| !tree.is_named(**node)).count();
        let longest = tree.nodes.keys().map(|node| tree.chain(*node).len()).max().unwrap_or_default();
        status.longest_chain = status.longest_chain.max(longest);
    }
    status.gc = gc::State::load(host, sr.record.uuid)?.map(|state| {
        let left = state.still_undone(sr).into_iter();
        let left = left.map(|undone| format!("{} {}: {}", undone.subject(), undone.how(), undone.reason));
        GcStatus { doing: state.doing_now(host).map(str::to_owned), merged: state.merged, left: left.collect() }
    });
    Ok(status)
}

/// Describes a volume, unless it has just been detached.
fn volume_of(host: &Host, volume: VolumeKey) -> Option<VolumeStatus> {
    let nothing = VolumeStatus {
        volume,
        problem: None,
        sr: None,
        daemon: None,
        memory: 0,
        domains: BTreeMap::new(),
        open: None,
        nodes: 0,
    };
    match Attachment::seen(host, volume) {
        Ok(seen) => seen.map(|seen| {
            let daemon = seen.pid.filter(|_| seen.is_running);
            VolumeStatus {
                sr: Some(seen.uri.sr),
                problem: daemon.is_none().then(|| "its storage daemon does not run".to_owned()),
                daemon,
                memory: daemon.map(memory_of).unwrap_or_default(),
                open: seen.open.as_ref().map(|open| open.mode),
                nodes: seen.open.map_or(0, |open| open.nodes.len()),
                domains: seen.domains,
                ..nothing
            }
        }),
        Err(error) => Some(VolumeStatus { problem: Some(error.chain()), ..nothing }),
    }
}

fn mirror_of(host: &Host, record: &MirrorRecord) -> MirrorStatus {
    let is_running = record.is_running(host);
    let speed = record.speed.filter(|_| is_running);
    let lost = !is_running && !record.phase.is_terminal();
    let lost = lost.then(|| "its supervisor does not run".to_owned());
    MirrorStatus {
        mirror: record.key,
        volume: record.volume,
        phase: record.phase,
        is_running,
        done: if record.phase == Phase::Finished { 1.0 } else { record.progress.fraction() },
        sent: record.progress.sent,
        bytes_per_second: speed.map(|speed| speed.bytes_per_second),
        seconds_left: speed.and_then(|speed| speed.seconds_left),
        reason: record.reason.clone().or(lost),
        summary: summary(record),
    }
}

/// Reads how much memory a process has, in bytes; 0 when it is gone.
fn memory_of(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kibibytes.unwrap_or_default() * 1024
}
