//! What this host keeps of an SR below /run: attachments, their daemons, mirrors.

use std::collections::BTreeSet;
use std::fs;
use std::io;

use plugin::attachment::Attachment;
use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::id::{MirrorKey, VolumeKey};
use plugin::lock::FileLock;
use plugin::mirror::{self, MirrorRecord};
use plugin::store::{Finding, LoadedTree, Severity, Sr, is_same};

/// Finds attachments and mirrors of the SR that have lost their processes, processes that have lost their records, and
/// records that cannot be read.
pub fn examine(
    host: &Host,
    sr: &Sr,
    trees: &[LoadedTree],
    is_complete: bool,
    found: &mut Vec<Finding>,
) -> Result<()> {
    examine_attached(host, sr, found)?;
    for key in Attachment::volumes(host)? {
        let finding = examine_attachment(host, sr, trees, is_complete, key)?;
        // One that was at work when it was looked at is looked at again: only what stays is wrong.
        if finding.is_some() {
            found.extend(examine_attachment(host, sr, trees, is_complete, key)?);
        }
    }
    examine_mirrors(host, sr, found)
}

/// Finds what this host knows of where the SR is, and is wrong.
fn examine_attached(host: &Host, sr: &Sr, found: &mut Vec<Finding>) -> Result<()> {
    let own = sr.record.uuid;
    for uuid in Sr::all_attached(host)? {
        let record = host.sr_record(uuid);
        match Sr::attached_path(host, uuid) {
            Ok(path) if uuid == own && !is_same(&path, &sr.path) => {
                let what =
                    format!("the SR is attached at {}, and this is another directory with its uuid", path.display());
                let remedy = "one of the two is a copy: see which, and take sr.json out of the other";
                found.push(Finding::new(Severity::Error, &record, what, remedy));
            }
            Ok(path) if uuid != own && is_same(&path, &sr.path) => {
                let what = format!("SR {uuid} is attached there, and SR {own} is in its place");
                let remedy = "mount the right file system, or put the right sr.json back";
                found.push(Finding::new(Severity::Error, &record, what, remedy));
            }
            Err(error) if uuid == own => {
                let remedy = "unplug the PBD and plug it again";
                found.push(Finding::new(Severity::Error, &record, error.chain(), remedy));
            }
            _ => {}
        }
    }
    Ok(())
}

fn examine_attachment(
    host: &Host,
    sr: &Sr,
    trees: &[LoadedTree],
    is_complete: bool,
    key: VolumeKey,
) -> Result<Option<Finding>> {
    let directory = host.volume_dir(key);
    // A call is at work.
    if FileLock::is_held(&directory.join("lock")) {
        return Ok(None);
    }
    let is_of_sr = trees.iter().any(|loaded| loaded.tree.volumes.contains_key(&key));
    let seen = match Attachment::seen(host, key) {
        Ok(Some(seen)) => seen,
        Ok(None) if !directory.exists() => return Ok(None),
        Ok(None) => {
            let what = "what a call that was killed has left of an attachment";
            return Ok(Some(Finding::repairable(
                Severity::Note,
                &directory,
                what,
                "removed, with a daemon that runs there",
            )));
        }
        Err(error) if is_of_sr => {
            let path = directory.join("state.json");
            let finding = if Attachment::has_daemon(host, key)? {
                let remedy = "shut its VM down, end the storage daemon, and repair then";
                Finding::new(Severity::Error, &path, error.chain(), remedy)
            } else {
                Finding::repairable(Severity::Error, &path, error.chain(), "removed: no daemon runs there")
            };
            return Ok(Some(finding));
        }
        Err(_) => return Ok(None),
    };
    if seen.uri.sr != sr.record.uuid || seen.is_of_earlier_boot {
        return Ok(None);
    }
    let path = directory.join("state.json");
    if !is_of_sr && is_complete && sr.load(key).is_err() {
        let what = "the volume is attached here, and is not in the SR";
        let remedy = "Datapath.detach its domains (docs/operations.md)";
        return Ok(Some(Finding::new(Severity::Error, &path, what, remedy)));
    }
    let domains: Vec<&str> = seen.domains.keys().map(plugin::id::Domain::as_str).collect();
    if !seen.is_running && !domains.is_empty() {
        let what = format!("the volume's storage daemon has ended: domains {} have no disk", domains.join(", "));
        let remedy = "start the VM anew, or have xapi deactivate and activate the volume: that starts another";
        return Ok(Some(Finding::new(Severity::Error, &path, what, remedy)));
    }
    let strays = Attachment::stray_daemons(host, key)?;
    if let [stray, ..] = strays[..] {
        let what = format!("storage daemon {stray} runs for the volume, and no record tells of it");
        let remedy = "end the process, after its VM";
        return Ok(Some(Finding::new(Severity::Error, &directory, what, remedy)));
    }
    Ok(None)
}

/// Finds mirrors of the SR's volumes that nobody supervises any more.
fn examine_mirrors(host: &Host, sr: &Sr, found: &mut Vec<Finding>) -> Result<()> {
    for key in mirrors(host)? {
        let path = MirrorRecord::path(host, key);
        match MirrorRecord::load(host, key) {
            Ok(Some(record)) if record.sr == sr.record.uuid && is_orphan(host, &record) => {
                let what = format!("the mirror of volume {} has not ended, and nobody supervises it", record.volume);
                found.push(Finding::repairable(Severity::Warning, &path, what, "ended as failed"));
            }
            Ok(_) => {}
            Err(error @ (Error::DamagedRecord { .. } | Error::NewerFormat { .. })) => {
                let remedy = "have xapi cancel the migration, and remove the directory";
                found.push(Finding::new(Severity::Warning, &path, error.chain(), remedy));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Tells whether a mirror has not ended and has no supervisor, nor is given one just now.
fn is_orphan(host: &Host, record: &MirrorRecord) -> bool {
    !record.phase.is_terminal()
        && !record.is_running(host)
        && !FileLock::is_held(&MirrorRecord::supervisor_lock(host, record.key))
        && !FileLock::is_held(&mirror::start_lock(host, record.volume))
        // It may have ended, or its supervisor have written its name, since the record was read.
        && matches!(MirrorRecord::load(host, record.key), Ok(Some(now)) if !now.phase.is_terminal() && !now.is_running(host))
}

fn mirrors(host: &Host) -> Result<BTreeSet<MirrorKey>> {
    let directory = host.runtime_dir().join("mirrors");
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(error) => return Err(Error::on("listing", &directory)(error)),
    };
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect())
}

/// Ends mirrors that nobody supervises, and removes what killed calls left of attachments.
///
/// # Errors
///
/// The first that fails; the others are done all the same.
pub fn repair(host: &Host, sr: &Sr) -> Result<()> {
    let mut done = Ok(());
    for record in MirrorRecord::all(host)? {
        if record.sr == sr.record.uuid && is_orphan(host, &record) {
            done = done.and(mirror::reap(host, record.volume));
        }
    }
    for key in Attachment::volumes(host)? {
        done = match Attachment::seen(host, key) {
            Ok(None) => done.and(Attachment::lock_existing(host, key).map(drop)),
            Err(Error::DamagedRecord { .. }) if sr.load(key).is_ok() => {
                done.and(Attachment::forget_damaged(host, key))
            }
            _ => done,
        };
    }
    done
}
