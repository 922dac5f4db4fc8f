//! A volume's life on this host as anybody can see it, without its lock.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::device::shown;
use super::state::{Phase, State};
use super::{Attachment, LOCK, Use, clients};
use crate::device::Shown;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::id::{Domain, NodeId, VolumeKey, VolumeUri};
use crate::lock::FileLock;
use crate::qemu::daemon::{self, Sockets};
use crate::record;
use crate::store::Mode;

/// What the record of a volume's life says, and whether its daemon runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The volume.
    pub uri: VolumeUri,
    /// Whether the record is about an earlier boot, so that nothing of it holds.
    pub is_of_earlier_boot: bool,
    /// The daemon's process, running or not.
    pub pid: Option<i32>,
    /// Whether the daemon runs.
    pub is_running: bool,
    /// Who uses the volume.
    pub domains: BTreeMap<Domain, Use>,
    /// What the daemon has open, while it runs.
    pub open: Option<SeenOpen>,
    /// The volume's block device.
    pub device: Option<PathBuf>,
    /// The domain for which an import runs.
    pub import: Option<Domain>,
    /// Domains whose last writes could not be flushed.
    pub unflushed: Vec<Domain>,
}

/// A chain that a running daemon has open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenOpen {
    /// Whether it may be written to.
    pub mode: Mode,
    /// Its nodes, top first.
    pub nodes: Vec<NodeId>,
    /// Whether a call is, or was when it was killed, at work on it.
    pub is_changing: bool,
    /// What the export says of itself.
    pub announced: Option<String>,
}

impl Attachment {
    /// Looks at a volume's state on this host; `None` when nobody uses the volume.
    ///
    /// # Errors
    ///
    /// When the record cannot be read.
    pub fn seen(host: &Host, volume: VolumeKey) -> Result<Option<Seen>> {
        let directory = host.volume_dir(volume);
        let Some(state) = record::read_if_present::<State>(&directory.join("state.json"))? else {
            return Ok(None);
        };
        let is_of_earlier_boot = state.boot_id != host.boot_id()?;
        let is_running = state.daemon.is_some_and(|process| daemon::is_running(host, &directory, &process));
        let open = state.open.filter(|_| is_running).map(|open| SeenOpen {
            mode: open.mode,
            announced: open.session.and_then(|session| session.announcement()).map(|announced| announced.to_string()),
            is_changing: open.phase != Phase::Open || open.overlay.is_some() || open.exchange.is_some(),
            nodes: open.nodes,
        });
        Ok(Some(Seen {
            uri: VolumeUri { sr: state.sr, volume: state.volume },
            is_of_earlier_boot,
            pid: state.daemon.map(|process| process.pid),
            is_running,
            domains: state.domains,
            open,
            device: state.device.and_then(|device| shown(&directory, &device)).map(Shown::path),
            import: state.import.map(|import| import.domain),
            unflushed: state.unflushed.into_keys().collect(),
        }))
    }

    /// Counts the NBD clients of a volume's storage daemon, without asking that.
    ///
    /// # Errors
    ///
    /// When the kernel's list of sockets cannot be read.
    pub fn clients_of(host: &Host, volume: VolumeKey) -> Result<usize> {
        clients::count(&Sockets::of(&host.volume_dir(volume)).nbd())
    }

    /// Tells whether a storage daemon runs for a volume, recorded or not.
    ///
    /// # Errors
    ///
    /// When the processes cannot be listed.
    pub fn has_daemon(host: &Host, volume: VolumeKey) -> Result<bool> {
        Ok(!daemon::running_in(host, &host.volume_dir(volume))?.is_empty())
    }

    /// Finds the storage daemons that run for a volume beside the one that its record names.
    ///
    /// # Errors
    ///
    /// When the processes cannot be listed.
    pub fn stray_daemons(host: &Host, volume: VolumeKey) -> Result<Vec<i32>> {
        let running = daemon::running_in(host, &host.volume_dir(volume))?;
        // Read after them: one that is just started is in it.
        let own = Self::seen(host, volume)?.and_then(|seen| seen.pid);
        Ok(running.into_iter().map(|process| process.pid).filter(|pid| Some(*pid) != own).collect())
    }

    /// Removes a record that cannot be read, where no daemon runs: then nobody uses the volume.
    ///
    /// # Errors
    ///
    /// [`Error::VolumeInUse`] while a daemon runs.
    pub fn forget_damaged(host: &Host, volume: VolumeKey) -> Result<()> {
        let directory = host.volume_dir(volume);
        let lock = FileLock::acquire(&directory.join(LOCK), host.settings()?.lock())?;
        if Self::seen(host, volume).is_ok() {
            return Ok(());
        }
        if Self::has_daemon(host, volume)? {
            let reason = "its storage daemon runs, and its record cannot be read".to_owned();
            return Err(Error::VolumeInUse { volume: volume.to_string(), reason });
        }
        record::remove(&directory.join("state.json"))?;
        drop(lock);
        // Removes what else is there.
        Self::lock_existing(host, volume).map(drop)
    }
}
