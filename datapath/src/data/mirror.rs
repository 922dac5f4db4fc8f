//! Data.mirror: starts to mirror a volume.

use std::ffi::OsString;
use std::fs;
use std::time::Duration;

use plugin::activation;
use plugin::attachment::Attachment;
use plugin::error::{Error, Result};
use plugin::host::{Host, Launch};
use plugin::id::{Domain, MirrorKey, NodeId, VolumeUri};
use plugin::lock::FileLock;
use plugin::mirror::{self, MirrorRecord, OFFLINE_DOMAIN};
use plugin::nbd::NbdUri;
use plugin::smapi::Operation;
use plugin::store::{Mode, Sr};
use serde::Deserialize;

use crate::mirror::ENTRY;

/// The domain that xapi names for a VM that is halted (xen-api `ocaml/xapi/xapi_vm_migrate.ml`).
const HALTED: &str = "-1";

/// Seconds for which the record of a mirror that ended is kept for Data.stat.
const KEPT: Duration = Duration::from_secs(24 * 60 * 60);

/// The parameters of Data.mirror.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    uri: String,
    domain: String,
    remote: String,
}

/// Starts to copy the volume to the NBD export that `remote` names, and then to mirror what a guest writes; gives the
/// operation for Data.stat.
///
/// What is mirrored is what the volume's datapath has open, whoever activated it: xapi names the guest's domain for
/// the live leaf and its own for a snapshot. A volume that nobody activated is opened for the mirror alone. The same
/// call again, while the mirror goes on, gives the same operation: the caller repeats a call that it lost, and the
/// destination takes one connection. Whether the destination can be reached is told by Data.stat.
///
/// # Errors
///
/// [`Error::VolumeInUse`] when the volume is being mirrored elsewhere; else the volume cannot be opened, or the
/// supervisor not started.
pub fn execute(host: &Host, parameters: Parameters) -> Result<Operation> {
    let uri: VolumeUri = parameters.uri.parse()?;
    let domain: Domain = parameters.domain.parse()?;
    parameters.remote.parse::<NbdUri>()?;
    Sr::attached(host, uri.sr)?.load(uri.volume)?;
    let mirrors = host.runtime_dir().join("mirrors");
    host.make_runtime_dir(&mirrors)?;
    let lock = FileLock::acquire(&mirror::start_lock(host, uri.volume), host.settings()?.lock())?;
    let result = start(host, uri, domain, parameters.remote);
    // Removed under the lock; who waits for it finds out and makes another.
    let _ = fs::remove_file(lock.path());
    result.map(Operation::mirror)
}

/// Starts the mirror, with the lock held that keeps a second call from doing the same.
fn start(host: &Host, uri: VolumeUri, domain: Domain, remote: String) -> Result<MirrorKey> {
    for record in MirrorRecord::of_volume(host, uri.volume)? {
        let mut record = mirror::end_unless_running(host, &record, "another mirror was started")?;
        if !record.is_running(host) {
            mirror::acknowledge(host, &mut record)?;
        } else if record.domain == domain && record.remote == remote {
            return Ok(record.key);
        } else {
            let reason = format!("it is being mirrored to {}", record.remote);
            return Err(Error::VolumeInUse { volume: uri.volume.to_string(), reason });
        }
    }
    forget_old(host)?;
    let source = Source::open(host, uri)?;
    let live = source.mode == Mode::ReadWrite && domain.as_str() != HALTED;
    let record = MirrorRecord::new(uri, source.node, domain, remote);
    let mut record = MirrorRecord { live, offline: source.offline, ..record };
    launch(host, &mut record).inspect_err(|_| {
        if let Err(error) = record.remove(host) {
            tracing::error!(error = error.chain(), "the record of a mirror that did not start is left");
        }
        if source.offline {
            source.close(host, uri);
        }
    })?;
    Ok(record.key)
}

/// What a mirror reads.
struct Source {
    node: NodeId,
    mode: Mode,
    offline: bool,
}

impl Source {
    /// Finds what the volume's datapath has open, or opens the volume.
    fn open(host: &Host, uri: VolumeUri) -> Result<Self> {
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
}

/// Writes the record and starts the supervisor, which from then on is the record's only writer.
fn launch(host: &Host, record: &mut MirrorRecord) -> Result<()> {
    let directory = host.mirror_dir(record.key);
    host.make_runtime_dir(&directory)?;
    record.store(host)?;
    let program = std::env::current_exe().map_err(|error| Error::io("finding this program", error))?;
    let arguments: [OsString; 2] = [ENTRY.into(), record.key.to_string().into()];
    let unit = format!("xapi-storage-qcow2-mirror-{}", record.key);
    let log = directory.join("supervisor.log");
    let process = Launch { unit: &unit, program: &program, arguments: &arguments, log: &log }.start(host)?;
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
