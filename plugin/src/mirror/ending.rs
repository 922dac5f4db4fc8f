//! Ending mirrors from other calls, and keeping their records.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::control::{EndRequest, How};
use super::record::{MirrorRecord, Phase};
use super::{OFFLINE_DOMAIN, job};
use crate::activation;
use crate::attachment::Attachment;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::id::{Domain, VolumeKey};
use crate::lock::FileLock;
use crate::store::Sr;

/// Seconds that a supervisor gets beyond the time for the drain itself; cutting a connection takes milliseconds.
const MARGIN: Duration = Duration::from_secs(10);

/// What it gets beyond that to compare the two ends, where that is asked for: the supervisor itself gives up on a peer
/// that stops answering.
const COMPARE: Duration = Duration::from_secs(6 * 60 * 60);

/// Seconds that a killed supervisor gets to be gone.
const KILL: Duration = Duration::from_secs(10);

/// Ends a mirror, whatever its state, and gives its last record; one that has ended stays as it is.
///
/// A supervisor that does not answer in time is killed, which cuts the mirror's connection; a dead one's job and nodes
/// are removed from the storage daemon. After this no block job holds the volume.
///
/// # Errors
///
/// When the supervisor can be neither reached nor killed, or the storage daemon does not give up the job.
pub fn end(host: &Host, record: &MirrorRecord, how: How, reason: &str) -> Result<MirrorRecord> {
    let (record, _unbegun) = begun(host, record)?;
    end_begun(host, record, how, reason)
}

/// Ends a mirror as [`end`] does unless it goes on, and gives its last record. One whose supervisor is just beginning
/// is waited for, so that a call which is repeated while the first is killed finds the mirror that the first started.
///
/// # Errors
///
/// As [`end`].
pub fn end_unless_running(host: &Host, record: &MirrorRecord, reason: &str) -> Result<MirrorRecord> {
    let (record, _unbegun) = begun(host, record)?;
    if record.is_running(host) { Ok(record) } else { end_begun(host, record, How::Cancel, reason) }
}

fn end_begun(host: &Host, record: MirrorRecord, how: How, reason: &str) -> Result<MirrorRecord> {
    if record.is_running(host) {
        let patience = match how {
            How::Finish => {
                let settings = host.settings()?;
                let is_compared = settings.verify || Sr::verifies(host, record.sr);
                let compare = if is_compared { COMPARE } else { Duration::ZERO };
                Duration::from_secs(settings.drain_seconds) + MARGIN + compare
            }
            How::Cancel => MARGIN,
        };
        let request = EndRequest { end: how, reason: reason.to_owned() };
        if let Err(error) = request.send(host, &record, patience) {
            tracing::error!(mirror = %record.key, error = error.chain(), "killing a supervisor that does not answer");
            if let Some(process) = record.supervisor {
                process.kill(host, KILL)?;
            }
        }
    }
    let mut record = MirrorRecord::load(host, record.key)?.unwrap_or(record);
    if !record.phase.is_terminal() {
        // Its supervisor died. QEMU's job failed with the connection, which was the supervisor's own; a copy has none.
        if !record.copy {
            job::clear_after_death(host, record.volume)?;
        }
        record.phase = Phase::Failed;
        record.reason = Some("its supervisor ended unexpectedly".to_owned());
        if let Err(error) = record.store(host) {
            tracing::warn!(mirror = %record.key, error = error.chain(), "the end of a mirror could not be recorded");
        }
        let key = record.key;
        let sockets = [EndRequest::socket(host, key), EndRequest::relay_socket(host, key)];
        for left in sockets.into_iter().chain([MirrorRecord::supervisor_lock(host, key)]) {
            let _ = fs::remove_file(left);
        }
    }
    Ok(record)
}

/// Waits until a mirror's supervisor has begun, and gives the record that holds then; or, when it has not, with the
/// lock that keeps it from ever doing so before this call has recorded the end.
fn begun(host: &Host, record: &MirrorRecord) -> Result<(MirrorRecord, Option<FileLock>)> {
    let mut record = record.clone();
    let deadline = Instant::now() + host.settings()?.qmp();
    while record.is_unbegun() {
        let lock = match FileLock::try_acquire(&MirrorRecord::supervisor_lock(host, record.key)) {
            Ok(lock) => lock,
            // Another call has removed the mirror.
            Err(_) if !host.mirror_dir(record.key).exists() => return Ok((record, None)),
            Err(error) => return Err(error),
        };
        if let Some(current) = MirrorRecord::load(host, record.key)? {
            record = current;
        }
        if lock.is_some() || Instant::now() >= deadline {
            return Ok((record, lock));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok((record, None))
}

/// Ends every mirror that has a volume as its source, as failed: what Volume.snapshot means to xapi during a
/// migration (xen-api `ocaml/xapi/storage_migrate.ml`, `stop`), and what any change of the volume's node needs.
///
/// xapi then knows how they ended, so that Datapath.deactivate no longer fails for them.
///
/// # Errors
///
/// As [`end`].
pub fn end_for_snapshot(host: &Host, volume: VolumeKey) -> Result<()> {
    for record in MirrorRecord::of_volume(host, volume)? {
        let mut record = end(host, &record, How::Cancel, "the volume was snapshotted or changed")?;
        acknowledge(host, &mut record)?;
    }
    reap(host, volume)
}

/// Gives the file that keeps two calls from starting a mirror of one volume at once.
pub fn start_lock(host: &Host, volume: VolumeKey) -> PathBuf {
    host.runtime_dir().join(format!("mirrors/{volume}.lock"))
}

/// Tells whether a call is just starting the mirror, which has no supervisor yet.
fn is_being_started(host: &Host, record: &MirrorRecord) -> Result<bool> {
    Ok(record.is_unbegun() && FileLock::try_acquire(&start_lock(host, record.volume))?.is_none())
}

/// Clears up after supervisors of a volume's mirrors that were killed: their jobs, and a source that is open for no
/// mirror any more. To be called before what a volume in use would refuse; no lock may be held.
///
/// # Errors
///
/// As [`end`]; else the source cannot be closed.
pub fn reap(host: &Host, volume: VolumeKey) -> Result<()> {
    let mut is_read = false;
    for record in MirrorRecord::of_volume(host, volume)? {
        if record.is_running(host) || is_being_started(host, &record)? {
            is_read |= record.offline;
        } else if !record.phase.is_terminal() {
            end(host, &record, How::Cancel, "its supervisor is gone")?;
        }
    }
    let domain = OFFLINE_DOMAIN.parse()?;
    let attachment = Attachment::lock_existing(host, volume)?;
    let orphan = attachment.filter(|attachment| !is_read && attachment.domains().contains_key(&domain));
    let orphan = orphan.map(|attachment| attachment.uri());
    let start_lock = start_lock(host, volume);
    // A Data.mirror that was killed has left its lock's file.
    if orphan.is_none() && !start_lock.exists() {
        return Ok(());
    }
    // Whoever holds this lock is just opening the source, and its mirror has no record yet.
    let Some(lock) = FileLock::try_acquire(&start_lock)? else { return Ok(()) };
    let released = orphan.map_or(Ok(()), |uri| activation::release(host, uri, &domain));
    let _ = fs::remove_file(lock.path());
    released
}

/// Tells whether a mirror that has this volume as its source goes on.
///
/// # Errors
///
/// When the directory of mirrors cannot be read.
pub fn is_running(host: &Host, volume: VolumeKey) -> Result<bool> {
    Ok(MirrorRecord::of_volume(host, volume)?.iter().any(|record| record.is_running(host)))
}

/// Records that xapi knows how a mirror ended; one that goes on is left alone.
///
/// # Errors
///
/// When the record cannot be written.
pub fn acknowledge(host: &Host, record: &mut MirrorRecord) -> Result<()> {
    if record.acknowledged || !record.phase.is_terminal() {
        return Ok(());
    }
    record.acknowledged = true;
    record.store(host)
}

/// Ends what a datapath's deactivation ends: the mirror of the guest's own disk is drained, any other is cancelled.
///
/// `is_last` says that no other domain holds the volume open after this one. Nothing else tells a mirror its end
/// (xen-api `ocaml/xapi/storage_smapiv3_migrate.ml`, receive_finalize3 follows at the destination), so this waits for
/// it. No lock may be held.
///
/// # Errors
///
/// [`Error::MirrorBroken`] when the destination lacks writes of a mirror that was complete before; again on every
/// call until a call shows that xapi knows. Then nothing was deactivated.
pub fn before_deactivate(host: &Host, volume: VolumeKey, domain: &Domain, is_last: bool) -> Result<()> {
    for record in MirrorRecord::of_volume(host, volume)? {
        if record.domain != *domain && !is_last && !record.offline {
            continue;
        }
        let mut record = record;
        if !record.phase.is_terminal() {
            let how = if record.live && record.was_complete { How::Finish } else { How::Cancel };
            record = end(host, &record, how, &format!("domain {domain} was deactivated"))?;
        }
        if record.must_be_told(host) {
            record.raised = true;
            record.store(host)?;
            let reason = record.reason.unwrap_or_else(|| "it did not finish".to_owned());
            return Err(Error::MirrorBroken { volume: volume.to_string(), reason });
        }
    }
    reap(host, volume)
}

/// Ends what still goes on when a domain is detached, and takes the detachment as a sign that xapi knows.
///
/// # Errors
///
/// As [`end`].
pub fn before_detach(host: &Host, volume: VolumeKey, domain: &Domain, is_last: bool) -> Result<()> {
    // xapi detaches its own domain from a live leaf whose mirror failed. Of a supervisor that was killed, nothing else
    // would clear up before the guest is deactivated.
    if let Err(error) = reap(host, volume) {
        tracing::warn!(%volume, error = error.chain(), "what a killed supervisor left stays for now");
    }
    for record in MirrorRecord::of_volume(host, volume)? {
        if record.domain != *domain && !is_last && !record.offline {
            continue;
        }
        let mut record = end(host, &record, How::Cancel, &format!("domain {domain} was detached"))?;
        if record.domain == *domain || is_last {
            acknowledge(host, &mut record)?;
        }
    }
    reap(host, volume)
}

/// Takes note that a guest may write to the source again: a mirror that was finished no longer shows it.
///
/// # Errors
///
/// When a mirror that goes on cannot be ended, or a record cannot be written.
pub fn source_activated(host: &Host, volume: VolumeKey) -> Result<()> {
    for record in MirrorRecord::of_volume(host, volume)? {
        if record.live && !record.phase.is_terminal() && record.is_running(host) {
            continue;
        }
        let mut record = end(host, &record, How::Cancel, "the source was activated for writing")?;
        // A copy that is done owes nothing.
        if record.phase == Phase::Finished && !record.copy {
            record.phase = Phase::Failed;
            record.reason = Some("the source was activated for writing after the mirror had ended".to_owned());
            record.acknowledged = true;
            record.store(host)?;
        }
    }
    reap(host, volume)
}

/// Forgets the mirrors of a volume that is gone.
///
/// # Errors
///
/// When one of them cannot be ended or its record not removed.
pub fn forget_volume(host: &Host, volume: VolumeKey) -> Result<()> {
    MirrorRecord::of_volume(host, volume)?.iter().try_for_each(|record| forget(host, record))
}

fn forget(host: &Host, record: &MirrorRecord) -> Result<()> {
    end(host, record, How::Cancel, "the volume was destroyed")?.remove(host)
}

/// Forgets the mirrors of an SR's volumes that are gone: a Volume.destroy that was killed has left them, and nobody
/// calls it again for what is not listed.
///
/// # Errors
///
/// As [`forget_volume`]; else a volume's tree cannot be read, or what a killed call left cannot be removed.
pub fn forget_gone(host: &Host, sr: &Sr) -> Result<()> {
    MirrorRecord::sweep(host)?;
    for record in MirrorRecord::all(host)?.into_iter().filter(|record| record.sr == sr.record.uuid) {
        match sr.load(record.volume) {
            Err(Error::VolumeDoesNotExist(_)) => forget(host, &record)?,
            found => drop(found?),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Process;
    use crate::mirror::record::tests::sample;

    fn starting(host: &Host) -> MirrorRecord {
        let mut record = sample(host, Phase::Starting);
        record.supervisor = None;
        host.make_runtime_dir(&host.mirror_dir(record.key)).unwrap();
        record.store(host).unwrap();
        record
    }

    #[test]
    fn a_mirror_whose_supervisor_begins_is_waited_for() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::at(root.path());
        let record = starting(&host);
        let _supervisors = FileLock::try_acquire(&MirrorRecord::supervisor_lock(&host, record.key)).unwrap().unwrap();
        let named = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| end_unless_running(&host, &record, "it is dead"));
            let mut named = record.clone();
            named.phase = Phase::Connecting;
            named.supervisor = Some(Process::current(&host).unwrap());
            named.store(&host).unwrap();
            waiting.join().unwrap().unwrap()
        });
        assert_eq!(named.phase, Phase::Connecting);
        assert!(MirrorRecord::load(&host, record.key).unwrap().unwrap().is_running(&host));
    }

    #[test]
    fn a_mirror_that_a_call_is_starting_is_not_reaped() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::at(root.path());
        let record = starting(&host);
        let starter = FileLock::acquire(&start_lock(&host, record.volume), Duration::from_secs(20)).unwrap();
        reap(&host, record.volume).unwrap();
        assert_eq!(MirrorRecord::load(&host, record.key).unwrap().unwrap(), record);
        drop(starter);
        reap(&host, record.volume).unwrap();
        assert_eq!(MirrorRecord::load(&host, record.key).unwrap().unwrap().phase, Phase::Failed);
        assert!(!start_lock(&host, record.volume).exists());
    }
}
