//! A volume's life on this host: who uses it, its daemon, and what that has open.
//!
//! ```text
//!               attach           activate              deactivate          detach
//!   nothing ─────────► attached ──────────► active ──────────────► attached ─────► nothing
//!                      daemon runs          graph open, exported   graph closed    daemon stopped
//! ```
//!
//! This is counted by domain: the daemon runs from the first attach to the last detach, the graph is open from the
//! first activation to the last deactivation, writable when one of the active domains writes. Every call may come
//! in any order, again, and from several processes at once: an [`Attachment`] is the volume's lock, held, and what
//! stands in `state.json` beside it is written before it is done, so that the next call finishes or undoes what a
//! killed one began. A daemon that dies takes the graph with it; the record of who uses the volume stays, and the next
//! attach or activate starts another.
//!
//! Which host may activate a volume is not decided here but in the SR: see [`crate::activation`].

mod clients;
mod device;
mod exchange;
mod graph_state;
mod import;
mod lifecycle;
mod live;
mod seen;
mod session;
mod state;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::host::{Host, Settings};
use crate::id::{ContentId, Domain, NodeId, VolumeKey, VolumeUri};
use crate::lock::FileLock;
use crate::qemu::daemon::{self, Sockets};
use crate::qemu::graph;
use crate::qemu::qmp::Client;
use crate::record::{self, Durability};
use crate::store::Mode;
/// What is private and fuzzed ([`crate::fuzz`]).
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed {
    pub(crate) use super::state::State;
}

pub use import::{import_socket, note_broken_import};
pub use seen::{Seen, SeenOpen};
use state::State;
pub use state::Use;

/// The file in a volume's runtime directory whose lock is the volume's.
const LOCK: &str = "lock";

/// A volume's state on this host, with its lock held. Dropped without [`Attachment::attach`] or
/// [`Attachment::activate`] before, it leaves nothing behind.
#[derive(Debug)]
pub struct Attachment {
    host: Host,
    settings: Settings,
    directory: PathBuf,
    state: State,
    /// Why what a killed call left half done could not be finished.
    trouble: Option<Error>,
    /// The node that was written to and is closed now, all of it flushed, with the name of what it holds.
    closed: Option<(NodeId, ContentId)>,
    /// How the import that this call ended was broken, if it was.
    import_failure: Option<String>,
    _lock: FileLock,
}

impl Attachment {
    /// Locks a volume's state, which may be that nobody uses it.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] when another call holds the lock for too long; else the record cannot be read.
    pub fn lock(host: &Host, uri: VolumeUri) -> Result<Self> {
        let settings = host.settings()?;
        let directory = host.volume_dir(uri.volume);
        loop {
            host.make_runtime_dir(&directory)?;
            match FileLock::acquire(&directory.join(LOCK), settings.lock()) {
                Ok(lock) => return Self::read(host, settings, directory, lock, Some(uri))?.ok_or_else(gone),
                Err(error) if is_missing(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Locks a volume's state if there is any.
    ///
    /// # Errors
    ///
    /// As [`Self::lock`].
    pub fn lock_existing(host: &Host, volume: VolumeKey) -> Result<Option<Self>> {
        let settings = host.settings()?;
        let directory = host.volume_dir(volume);
        match FileLock::acquire(&directory.join(LOCK), settings.lock()) {
            Ok(lock) => Self::read(host, settings, directory, lock, None),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Lists the volumes that have state on this host, in no order.
    ///
    /// # Errors
    ///
    /// When the runtime directory cannot be read.
    pub fn volumes(host: &Host) -> Result<Vec<VolumeKey>> {
        let directory = host.runtime_dir().join("volumes");
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::on("listing", &directory)(error)),
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.filter_map(|name| name.parse().ok()).collect())
    }

    /// Reads the record behind a lock that was taken; without one, makes it for `uri` or, without that, gives `None`.
    fn read(
        host: &Host,
        settings: Settings,
        directory: PathBuf,
        lock: FileLock,
        uri: Option<VolumeUri>,
    ) -> Result<Option<Self>> {
        let boot_id = host.boot_id()?;
        let found: Option<State> = record::read_if_present(&directory.join("state.json"))?;
        let state = match (found, uri) {
            (Some(state), _) if state.boot_id == boot_id => state,
            (Some(State { sr, volume, .. }), _) => State::new(VolumeUri { sr, volume }, boot_id),
            (None, Some(uri)) => State::new(uri, boot_id),
            (None, None) => {
                remove_directory(host, &settings, &directory);
                return Ok(None);
            }
        };
        if uri.is_some_and(|uri| uri.sr != state.sr) {
            return Err(Error::BadRequest(format!("volume {} is attached from SR {}", state.volume, state.sr)));
        }
        let mut attachment = Self {
            host: host.clone(),
            settings,
            directory,
            state,
            trouble: None,
            closed: None,
            import_failure: None,
            _lock: lock,
        };
        attachment.notice_death();
        if attachment.state.device.is_none()
            && let Err(error) = attachment.end_device(false)
        {
            tracing::warn!(error = error.chain(), "what a killed call left of a block device is still there");
        }
        attachment.settle();
        Ok(Some(attachment))
    }

    /// Gives who uses the volume.
    pub fn domains(&self) -> &BTreeMap<Domain, Use> {
        &self.state.domains
    }

    /// Gives the volume's URI.
    pub fn uri(&self) -> VolumeUri {
        VolumeUri { sr: self.state.sr, volume: self.state.volume }
    }

    /// Tells whether the volume's daemon runs.
    pub fn is_alive(&self) -> bool {
        self.state.daemon.is_some()
    }

    /// Gives how the volume is open in a daemon that runs; `None` when it is not.
    pub fn open_mode(&self) -> Option<Mode> {
        self.state.open.as_ref().map(|open| open.mode)
    }

    /// Gives how the volume would be open once it is activated for a mode: whoever is active already needs it too.
    pub fn mode_with(&self, mode: Mode) -> Mode {
        mode.max(self.state.needed().unwrap_or(mode))
    }

    /// Gives the node that this call closed after it was written to, with the name of what it holds, once. None where
    /// not everything was flushed.
    pub fn take_closed(&mut self) -> Option<(NodeId, ContentId)> {
        self.closed.take().filter(|_| self.open_mode() != Some(Mode::ReadWrite))
    }

    /// Gives the sockets of the volume's daemon.
    pub fn sockets(&self) -> Sockets {
        Sockets::of(&self.directory)
    }

    /// Counts the NBD clients that are connected now.
    ///
    /// # Errors
    ///
    /// When the kernel's list of sockets cannot be read.
    pub async fn clients(&self) -> Result<usize> {
        if self.is_alive() { clients::count(&self.sockets().nbd()) } else { Ok(0) }
    }

    /// Asks the daemon which node the export reads; `None` when nothing is open.
    ///
    /// # Errors
    ///
    /// When the daemon does not answer, or exports what no record of ours tells of.
    pub async fn top(&self) -> Result<Option<NodeId>> {
        if self.open_mode().is_none() {
            return Ok(None);
        }
        let client = self.client().await?;
        self.exported_top(&client).await
    }

    /// Finds the node that the export reads among those known to be open.
    async fn exported_top(&self, client: &Client) -> Result<Option<NodeId>> {
        let Some(name) = graph::exported(client).await? else { return Ok(None) };
        let known = self.state.open.iter().flat_map(|open| open.overlay.iter().chain(&open.nodes));
        let node = known.copied().find(|node| graph::node_name(*node) == name);
        node.map(Some).ok_or_else(|| Error::Internal(format!("the storage daemon exports the unknown node {name}")))
    }

    /// Connects to the daemon.
    async fn client(&self) -> Result<Client> {
        Client::connect_at_once(&self.sockets().qmp(), self.settings.qmp()).await
    }

    /// Gives the name of the volume's export.
    fn export_name(&self) -> String {
        self.state.volume.to_string()
    }

    /// Writes the record down.
    fn save(&self) -> Result<()> {
        record::write(&self.directory.join("state.json"), &self.state, Durability::UntilReboot)
    }

    /// Removes the record.
    fn forget(&self) -> Result<()> {
        record::remove(&self.directory.join("state.json"))
    }

    /// Forgets a daemon that has died, and what it had open.
    fn notice_death(&mut self) {
        let Some(process) = &self.state.daemon else {
            self.state.open = None;
            return;
        };
        if daemon::is_running(&self.host, &self.directory, process) {
            return;
        }
        if let Err(error) = daemon::remove_files(&self.directory) {
            tracing::warn!(error = error.chain(), "files of a daemon that has died are left");
        }
        self.state.daemon = None;
        self.state.open = None;
        if let Err(error) = self.end_device(false) {
            tracing::warn!(error = error.chain(), "the block device of a daemon that has died is left");
        }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        // Still under the lock. Without a record nobody uses the volume.
        if !self.directory.join("state.json").exists() {
            remove_directory(&self.host, &self.settings, &self.directory);
        }
    }
}

/// Removes the runtime directory of a volume without a record, by who holds its lock, with whatever a killed call left
/// there. What cannot be removed stays for the next call.
///
/// Whoever waits for the lock finds that it is gone, and may make a new one at any moment: then that stays.
fn remove_directory(host: &Host, settings: &Settings, directory: &Path) {
    if let Err(error) = daemon::kill_strays(host, directory, settings.qmp()) {
        tracing::error!(error = error.chain(), "a storage daemon that no record tells of is left");
        return;
    }
    let volume = directory.file_name().and_then(|name| name.to_str()?.parse().ok());
    if let Some(volume) = volume
        && let Err(error) =
            device::remove(host, settings, directory, volume, device::Processes { server: None, daemon: None })
    {
        tracing::error!(error = error.chain(), "a block device that no record tells of is left");
        return;
    }
    let names = fs::read_dir(directory).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.file_name()));
    for name in names.filter(|name| name != LOCK) {
        drop(fs::remove_file(directory.join(name)));
    }
    drop(fs::remove_file(directory.join(LOCK)));
    drop(fs::remove_dir(directory));
}

/// Tells whether a lock could not be taken because its directory is gone.
fn is_missing(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
}

/// The error for a record that is not there although it is made when it is missing.
fn gone() -> Error {
    Error::Internal("a volume's state is gone under its lock".to_owned())
}
