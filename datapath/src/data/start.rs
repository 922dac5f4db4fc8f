//! What starting a mirror and starting a copy have in common: the source, and the supervisor.

use std::ffi::OsString;
use std::fs;
use std::time::Duration;

use plugin::activation;
use plugin::attachment::Attachment;
use plugin::error::{Error, Result};
use plugin::host::{Host, Launch, this_program};
use plugin::id::{NodeId, VolumeUri};
use plugin::lock::FileLock;
use plugin::mirror::{self, Blocks, MirrorRecord, OFFLINE_DOMAIN};
use plugin::store::{Intent, Mode, Sr};

use crate::mirror::ENTRY;

/// Seconds for which the record of a mirror that ended is kept for Data.stat.
const KEPT: Duration = Duration::from_secs(24 * 60 * 60);

/// Holds, while `start` runs, the lock that keeps a second call from starting something of the same volume.
///
/// # Errors
///
/// As `start`.
pub fn alone<T>(host: &Host, uri: VolumeUri, start: impl FnOnce() -> Result<T>) -> Result<T> {
    let mirrors = host.runtime_dir().join("mirrors");
    host.make_runtime_dir(&mirrors)?;
    let lock = FileLock::acquire(&mirror::start_lock(host, uri.volume), host.settings()?.lock())?;
    let result = stop_merge(host, uri).and_then(|()| start());
    // Removed under the lock; who waits for it finds out and makes another.
    let _ = fs::remove_file(lock.path());
    result
}

/// Stops a merge of nodes that the volume reads: what a mirror opens a second time is not to change meanwhile. While the
/// lock of [`alone`] is held none begins, nor afterwards while there is a mirror.
fn stop_merge(host: &Host, uri: VolumeUri) -> Result<()> {
    let sr = Sr::attached(host, uri.sr)?;
    let tree = sr.load(uri.volume)?.tree;
    if tree.merge.is_some() || matches!(tree.intent, Some(Intent::Relink { .. })) {
        sr.lock(host, uri.volume)?;
    }
    Ok(())
}

/// Gives the record of a volume's mirror or copy that goes on, of which there is one at most; that others have ended is
/// known from now on.
///
/// # Errors
///
/// When a mirror whose supervisor is gone cannot be cleared away.
pub fn running(host: &Host, uri: VolumeUri) -> Result<Option<MirrorRecord>> {
    let mut running = None;
    for record in MirrorRecord::of_volume(host, uri.volume)? {
        let mut record = mirror::end_unless_running(host, &record, "another mirror was started")?;
        if record.is_running(host) {
            running = Some(record);
        } else {
            mirror::acknowledge(host, &mut record)?;
        }
    }
    Ok(running)
}

/// What a mirror reads.
pub struct Source {
    /// The node that is on top.
    pub node: NodeId,
    /// Whether a guest may write to it.
    pub mode: Mode,
    /// Whether it was opened for the mirror alone.
    pub offline: bool,
}

impl Source {
    /// Finds what the volume's datapath has open, or opens the volume.
    ///
    /// # Errors
    ///
    /// When the volume cannot be opened.
    pub fn open(host: &Host, uri: VolumeUri) -> Result<Self> {
        if let Some(source) = Self::opened(host, uri, false)? {
            return Ok(source);
        }
        let domain = OFFLINE_DOMAIN.parse()?;
        activation::attach(host, uri, &domain)?;
        activation::activate(host, uri, &domain, Mode::ReadOnly)?;
        Self::opened(host, uri, true)?
            .ok_or_else(|| Error::Internal(format!("volume {} is not open after its activation", uri.volume)))
    }

    /// Asks what is open; `None` when nothing is.
    fn opened(host: &Host, uri: VolumeUri, offline: bool) -> Result<Option<Self>> {
        let Some(attachment) = Attachment::lock_existing(host, uri.volume)? else { return Ok(None) };
        let Some(mode) = attachment.open_mode() else { return Ok(None) };
        let node = plugin::qemu::block_on(attachment.top())?;
        Ok(node.map(|node| Self { node, mode, offline }))
    }

    /// Closes what [`Self::open`] opened.
    fn close(&self, host: &Host, uri: VolumeUri) {
        let released = OFFLINE_DOMAIN.parse().and_then(|domain| activation::release(host, uri, &domain));
        if let Err(error) = released {
            tracing::error!(error = error.chain(), "the source of a mirror that did not start is left open");
        }
    }

    /// Starts the supervisor of a mirror of the source or, with `blocks`, of a copy. On failure nothing of it is left,
    /// and the source is closed if it was opened for it.
    ///
    /// # Errors
    ///
    /// When the record cannot be written, or the supervisor does not start.
    pub fn supervise(&self, host: &Host, record: &mut MirrorRecord, blocks: Option<&Blocks>) -> Result<()> {
        forget_old(host)?;
        launch(host, record, blocks).inspect_err(|_| {
            if let Err(error) = record.remove(host) {
                tracing::error!(error = error.chain(), "the record of a mirror that did not start is left");
            }
            if self.offline {
                self.close(host, record.uri());
            }
        })
    }
}

/// Writes the record and starts the supervisor, which from then on is the record's only writer.
fn launch(host: &Host, record: &mut MirrorRecord, blocks: Option<&Blocks>) -> Result<()> {
    let directory = host.mirror_dir(record.key);
    host.make_runtime_dir(&directory)?;
    if let Some(blocks) = blocks {
        blocks.store(host, record.key)?;
    }
    record.store(host)?;
    let program = this_program()?;
    let arguments: [OsString; 2] = [ENTRY.into(), record.key.to_string().into()];
    let unit = format!("xapi-storage-qcow2-mirror@{}", record.key);
    let log = directory.join("supervisor.log");
    // Its record says what its spans hang from.
    let launch = Launch { unit: &unit, program: &program, arguments: &arguments, log: &log, observed: false };
    // It closes the source that was opened for it.
    let process = launch.start_for(host, Sr::attached_path(host, record.sr).ok().as_deref())?;
    // Until it has written its own name into the record, another call would take it for dead.
    let settings = host.settings()?;
    let deadline = std::time::Instant::now() + settings.qmp();
    while process.is_alive(host) && std::time::Instant::now() < deadline {
        match MirrorRecord::load(host, record.key)? {
            Some(current) if current.supervisor.is_some() => return Ok(()),
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    if MirrorRecord::load(host, record.key)?.is_some_and(|current| current.supervisor.is_some()) {
        // It has ended already, and said how.
        return Ok(());
    }
    process.kill(host, settings.qmp())?;
    let said = fs::read_to_string(&log).unwrap_or_default();
    Err(Error::Internal(format!("the mirror's supervisor did not start: {}", said.trim())))
}

/// Removes the records of mirrors that ended long ago: nobody asks for them any more.
fn forget_old(host: &Host) -> Result<()> {
    let now = mirror::now();
    for record in MirrorRecord::all(host)? {
        let is_old = now.saturating_sub(record.updated) > KEPT.as_secs();
        if record.phase.is_terminal() && is_old && !record.must_be_told(host) {
            record.remove(host)?;
        }
    }
    Ok(())
}
