//! What this host does now, for people: its SRs and trees, storage daemons, mirrors, and what failed last.
//!
//! ```text
//!   xapi-storage-qcow2 status ──────────┐
//!   Plugin.diagnostics, either plugin ──┼──► Status ──► records below /run, trees of the SRs, /proc
//!   xapi-storage-qcow2 tree ────────────┘
//! ```
//!
//! One picture for all who show it. It is made without a lock and without a word to any storage daemon, so that it can be
//! had while calls and daemons hang; a file system that does not answer is waited for with a bound. What cannot be read is
//! told in its place, and never an error. Names are shown; descriptions, xapi's keys and what disks hold are not.

mod drawn;
mod mirror;
mod program;
mod sr;
mod text;
pub mod trees;
mod volume;

use serde::Serialize;

use crate::attachment::Attachment;
use crate::error::Result;
use crate::failures::Failure;
use crate::host::{Host, Settings};
use crate::mirror::MirrorRecord;
use crate::qemu::storage_daemon;
pub use drawn::{draw as draw_trees, remarks};
pub use mirror::MirrorStatus;
pub use program::ProgramStatus;
pub use sr::{GcStatus, SrStatus};
pub use text::{draw, draw_all};
pub use volume::VolumeStatus;

/// How many of the last failures are shown in short, and in full.
const FAILURES: (usize, usize) = (5, 20);

/// How much is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// What is shown at a glance.
    Brief,
    /// The trees too, with the header of each image.
    Full,
}

/// A host.
#[derive(Debug, Serialize)]
pub struct Status {
    /// The program's version.
    pub version: &'static str,
    /// The host's uuid, or why it is not known.
    pub host: String,
    /// The boot's id, or why it is not known.
    pub boot: String,
    /// The storage daemon that is used and its version, or why there is none.
    pub storage_daemon: String,
    /// The storage daemons that were asked what they can do, in the order of their places.
    pub programs: Vec<ProgramStatus>,
    /// What is wrong that is of none of what follows.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
    /// The SRs that are attached.
    pub srs: Vec<SrStatus>,
    /// The volumes that are attached.
    pub volumes: Vec<VolumeStatus>,
    /// The mirrors that are known, those that ended too, the newest last.
    pub mirrors: Vec<MirrorStatus>,
    /// What failed last, the newest last.
    pub failures: Vec<Failure>,
}

impl Status {
    /// Looks at the host.
    pub fn of(host: &Host, detail: Detail) -> Self {
        let mut problems = Vec::new();
        let settings = told(host.settings(), "settings", &mut problems).unwrap_or_default();
        let daemon = storage_daemon(host);
        let daemon = daemon.map(|daemon| format!("{} {}", daemon.path.display(), daemon.version));
        let (records, unreadable) = told(MirrorRecord::readable(host), "mirrors", &mut problems).unwrap_or_default();
        problems.extend(unreadable.iter().map(|(key, error)| format!("mirror {key}: {}", error.chain())));
        let mut keys = told(Attachment::volumes(host), "volumes", &mut problems).unwrap_or_default();
        keys.sort();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            host: host.uuid().map_or_else(|error| format!("({})", error.chain()), |uuid| uuid.to_string()),
            boot: host.boot_id().map_or_else(|error| format!("({})", error.chain()), |boot| boot.to_string()),
            storage_daemon: daemon.unwrap_or_else(|error| error.chain()),
            programs: program::all(host),
            srs: Self::srs(host, &settings, detail, &mut problems),
            volumes: keys.into_iter().filter_map(|key| VolumeStatus::of(host, key)).collect(),
            mirrors: records.iter().map(|record| MirrorStatus::of(host, record)).collect(),
            failures: Failure::last(host, if detail == Detail::Brief { FAILURES.0 } else { FAILURES.1 }),
            problems,
        }
    }

    /// Looks at the SRs all at once: each may keep who looks at it waiting.
    fn srs(host: &Host, settings: &Settings, detail: Detail, problems: &mut Vec<String>) -> Vec<SrStatus> {
        let uuids = told(crate::store::Sr::all_attached(host), "SRs", problems).unwrap_or_default();
        let looks: Vec<_> = uuids.into_iter().map(|uuid| sr::Look::begin(host, uuid, detail)).collect();
        looks.into_iter().map(|look| look.end(settings.file_system())).collect()
    }

    /// Tells whether something goes on that comes to an end by itself.
    pub fn is_busy(&self) -> bool {
        let gc = self.srs.iter().any(|sr| sr.gc.as_ref().is_some_and(|gc| gc.doing.is_some()));
        gc || self.mirrors.iter().any(|mirror| mirror.is_running)
    }
}

/// Takes what was found, or adds why there is nothing.
fn told<T>(found: Result<T>, what: &str, problems: &mut Vec<String>) -> Option<T> {
    found.map_err(|error| problems.push(format!("{what}: {}", error.chain()))).ok()
}
