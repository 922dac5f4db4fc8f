//! A volume that is attached, and its storage daemon, as they are shown.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde::Serialize;

use crate::attachment::{Attachment, Use};
use crate::host::Host;
use crate::id::{Domain, SrUuid, VolumeKey};
use crate::store::Mode;

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
    /// NBD clients that are connected; none where the kernel does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clients: Option<usize>,
    /// Whether a call is, or was when it was killed, at work on what is open.
    pub is_changing: bool,
    /// What its export says of itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub announced: Option<String>,
    /// Its block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<PathBuf>,
    /// The domain for which an import runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub import: Option<Domain>,
    /// Domains whose last writes could not be flushed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unflushed: Vec<Domain>,
}

impl VolumeStatus {
    /// Describes a volume, unless it has just been detached.
    pub(super) fn of(host: &Host, volume: VolumeKey) -> Option<Self> {
        let nothing = Self {
            volume,
            problem: None,
            sr: None,
            daemon: None,
            memory: 0,
            domains: BTreeMap::new(),
            open: None,
            nodes: 0,
            clients: None,
            is_changing: false,
            announced: None,
            device: None,
            import: None,
            unflushed: Vec::new(),
        };
        match Attachment::seen(host, volume) {
            Ok(seen) => seen.map(|seen| {
                let daemon = seen.pid.filter(|_| seen.is_running);
                let open = seen.open.as_ref();
                Self {
                    sr: Some(seen.uri.sr),
                    problem: daemon.is_none().then(|| "its storage daemon does not run".to_owned()),
                    daemon,
                    memory: daemon.map(memory_of).unwrap_or_default(),
                    open: open.map(|open| open.mode),
                    nodes: open.map_or(0, |open| open.nodes.len()),
                    clients: daemon.and_then(|_| Attachment::clients_of(host, volume).ok()),
                    is_changing: open.is_some_and(|open| open.is_changing),
                    announced: open.and_then(|open| open.announced.clone()),
                    domains: seen.domains,
                    device: seen.device,
                    import: seen.import,
                    unflushed: seen.unflushed,
                    ..nothing
                }
            }),
            Err(error) => Some(Self { problem: Some(error.chain()), ..nothing }),
        }
    }
}

/// Reads how much memory a process has, in bytes; 0 when it is gone.
fn memory_of(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kibibytes.unwrap_or_default() * 1024
}
