//! What is known of a mirror.

use std::borrow::Cow;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::people::ForPeople;
use super::plan::Plan;
use super::speed::Speed;
use crate::error::{Error, Result};
use crate::host::{Host, Process};
use crate::id::{Domain, MirrorKey, NodeId, SrUuid, VolumeKey, VolumeUri};
use crate::qemu::graph::Pace;
use crate::record::{self, Durability, Record};
use crate::smapi::DataStatus;
use crate::trace::{self, Origin};

/// Where a mirror stands.
///
/// ```text
/// Starting ─► Connecting ─► Copying ─► Ready ─► Draining ─► Finished
///     └────────────┴───────────┴────────┴──────────┴──────► Failed, Cancelled
/// ```
///
/// A mirror whose source nobody writes to goes from Copying to Draining by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Its supervisor is being started.
    Starting,
    /// Its supervisor connects to the peer and negotiates.
    Connecting,
    /// The destination does not have everything yet.
    Copying,
    /// The destination has everything but what the guest writes now.
    Ready,
    /// The last writes are being sent and flushed.
    Draining,
    /// The destination has every byte, flushed, and the connection is closed.
    Finished,
    /// The destination does not have every byte.
    Failed,
    /// It was ended before it was done.
    Cancelled,
}

impl Phase {
    /// Tells whether nothing comes after it.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Finished | Self::Failed | Self::Cancelled)
    }
}

/// What was copied and sent so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes copied by the running job, of [`Self::length`]; both grow while a guest writes.
    pub offset: u64,
    /// Bytes that it has to copy.
    pub length: u64,
    /// Bytes sent to the peer, the protocol's own included.
    pub sent: u64,
    /// Bytes received from the peer.
    pub received: u64,
    /// How much of the mirror earlier jobs were, in millionths: one that sends several layers has a job for each.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub earlier: u32,
    /// How much of it later jobs will be.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub later: u32,
}

/// How the name of a directory begins that was a mirror's.
const GONE: &str = ".gone-";

/// What [`Progress::earlier`] and [`Progress::later`] are parts of.
pub const WHOLE: u32 = 1_000_000;

impl Progress {
    /// Gives how much of the mirror is done, from 0 to 1.
    pub fn fraction(&self) -> f64 {
        let part = if self.length == 0 { 0.0 } else { self.offset as f64 / self.length as f64 };
        let running = f64::from(WHOLE.saturating_sub(self.earlier).saturating_sub(self.later));
        (f64::from(self.earlier) + running * part) / f64::from(WHOLE)
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
fn is_zero(part: &u32) -> bool {
    *part == 0
}

/// The record of a mirror, `<run>/mirrors/<key>/state.json`, which people read too.
///
/// Its supervisor is its only writer while it lives; a call writes it before the supervisor starts and after it
/// ended. The format may grow fields; format 1 is the first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MirrorRecord {
    /// The record's format.
    pub format: u64,
    /// What people want to know first.
    #[serde(default)]
    pub for_people: ForPeople,
    /// The mirror's key, which Data.mirror gave.
    pub key: MirrorKey,
    /// The SR of the source volume.
    pub sr: SrUuid,
    /// The source volume.
    pub volume: VolumeKey,
    /// The domain that Data.mirror named: the guest's own for a live leaf.
    pub domain: Domain,
    /// The destination's NBD URI.
    pub remote: String,
    /// The node that is sent.
    pub node: NodeId,
    /// Whether a guest may write to the source, so that the mirror goes on when it is complete.
    pub live: bool,
    /// Whether the mirror itself opened the source, under [`super::OFFLINE_DOMAIN`].
    pub offline: bool,
    /// Where it stands.
    pub phase: Phase,
    /// Why it failed or was cancelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether it was ever complete, so that xapi may have been told so.
    pub was_complete: bool,
    /// Whether Datapath.deactivate failed because of it.
    pub raised: bool,
    /// Whether xapi is known to know how it ended.
    pub acknowledged: bool,
    /// What the guest may write, since it wrote faster than the link is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pace: Option<Pace>,
    /// What was copied and sent.
    pub progress: Progress,
    /// How fast it goes, while it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<Speed>,
    /// Whether it is a copy: of [`super::Blocks`] alone, and ended by itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub copy: bool,
    /// What the caller said of itself, for Task.stat.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub debug_info: String,
    /// What the destination said of its export.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// What of the source is sent, once the destination was asked; of a copy nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
    /// What its supervisor's spans hang from, where xapi observes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<Origin>,
    /// Its supervisor, once that runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub supervisor: Option<Process>,
    /// When it was started, in seconds since 1970.
    pub started: u64,
    /// When the record was written, in seconds since 1970.
    pub updated: u64,
}

/// A mirror whose record cannot be read, and why.
pub type Unreadable = (MirrorKey, Error);

impl Record for MirrorRecord {
    const FORMAT: u64 = 1;
    const IS_FOR_PEOPLE: bool = true;
}

impl MirrorRecord {
    /// Makes the record of a mirror that is to be started, of what a volume's node holds, with a key of its own.
    pub fn new(uri: VolumeUri, node: NodeId, domain: Domain, remote: String) -> Self {
        Self {
            format: Self::FORMAT,
            for_people: ForPeople::default(),
            key: MirrorKey::random(),
            sr: uri.sr,
            volume: uri.volume,
            domain,
            remote,
            node,
            live: false,
            offline: false,
            phase: Phase::Starting,
            reason: None,
            was_complete: false,
            raised: false,
            acknowledged: false,
            pace: None,
            progress: Progress::default(),
            speed: None,
            copy: false,
            debug_info: String::new(),
            description: None,
            plan: None,
            trace: trace::origin(),
            supervisor: None,
            started: now(),
            updated: 0,
        }
    }

    /// Gives the file of a mirror's record.
    pub fn path(host: &Host, key: MirrorKey) -> PathBuf {
        host.mirror_dir(key).join("state.json")
    }

    /// Gives the lock that a mirror's supervisor holds from before it reads the record until it ends. Who holds it
    /// while the record says `Starting` may end the mirror: a supervisor that comes later finds it ended.
    pub fn supervisor_lock(host: &Host, key: MirrorKey) -> PathBuf {
        host.mirror_dir(key).join("lock")
    }

    /// Reads the record of a mirror; `None` when there is none.
    ///
    /// # Errors
    ///
    /// When it is there and cannot be read.
    pub fn load(host: &Host, key: MirrorKey) -> Result<Option<Self>> {
        record::read_if_present(&Self::path(host, key))
    }

    /// Reads the records of the mirrors that have a volume as their source, newest last.
    ///
    /// # Errors
    ///
    /// When the directory of mirrors cannot be read. A single record that cannot be is passed over with a warning:
    /// it must not keep a volume of another mirror from being deactivated.
    pub fn of_volume(host: &Host, volume: VolumeKey) -> Result<Vec<Self>> {
        let mut records = Self::all(host)?;
        records.retain(|record| record.volume == volume);
        Ok(records)
    }

    /// Reads the records of all mirrors, newest last.
    ///
    /// # Errors
    ///
    /// As [`Self::of_volume`].
    pub fn all(host: &Host) -> Result<Vec<Self>> {
        let (records, unreadable) = Self::readable(host)?;
        for (mirror, error) in unreadable {
            tracing::warn!(%mirror, error = error.chain(), "a mirror's record is unreadable");
        }
        Ok(records)
    }

    /// Reads the records of all mirrors, newest last, and tells which cannot be read.
    ///
    /// # Errors
    ///
    /// When the directory of mirrors cannot be read.
    pub fn readable(host: &Host) -> Result<(Vec<Self>, Vec<Unreadable>)> {
        let directory = host.runtime_dir().join("mirrors");
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Default::default()),
            Err(error) => return Err(Error::on("reading directory", &directory)(error)),
        };
        let (mut records, mut unreadable) = (Vec::new(), Vec::new());
        for entry in entries {
            let name = entry.map_err(Error::on("reading directory", &directory))?.file_name();
            let Some(key) = name.to_str().and_then(|name| name.parse::<MirrorKey>().ok()) else { continue };
            match Self::load(host, key) {
                Ok(found) => records.extend(found),
                Err(error) => unreadable.push((key, error)),
            }
        }
        records.sort_by_key(|record: &Self| (record.started, record.key));
        Ok((records, unreadable))
    }

    /// Writes the record, with the time of now.
    ///
    /// # Errors
    ///
    /// When it cannot be written; the older one still stands.
    pub fn store(&mut self, host: &Host) -> Result<()> {
        self.updated = now();
        self.for_people = ForPeople::of(self);
        record::write(&Self::path(host, self.key), self, Durability::UntilReboot)
    }

    /// Removes the record with everything of the mirror; one that is gone is no error.
    ///
    /// # Errors
    ///
    /// When its directory cannot be removed.
    pub fn remove(&self, host: &Host) -> Result<()> {
        let directory = host.mirror_dir(self.key);
        // Whoever is killed in the middle leaves what everybody knows to be garbage.
        let gone = directory.with_file_name(format!("{GONE}{}", self.key));
        match fs::rename(&directory, &gone) {
            Ok(()) => record::remove_directory(&gone).map_err(Error::on("removing", &gone)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::on("renaming", &directory)(error)),
        }
    }

    /// Removes what [`Self::remove`] left when it was killed.
    ///
    /// # Errors
    ///
    /// When the directory of mirrors cannot be read, or something in it not removed.
    pub(super) fn sweep(host: &Host) -> Result<()> {
        let directory = host.runtime_dir().join("mirrors");
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(Error::on("reading directory", &directory))?,
        };
        for entry in entries {
            let entry = entry.map_err(Error::on("reading directory", &directory))?;
            if entry.file_name().as_encoded_bytes().starts_with(GONE.as_bytes()) {
                record::remove_directory(&entry.path()).map_err(Error::on("removing", entry.path()))?;
            }
        }
        Ok(())
    }

    /// Gives the source volume's URI.
    pub fn uri(&self) -> VolumeUri {
        VolumeUri { sr: self.sr, volume: self.volume }
    }

    /// Tells whether no supervisor has named itself as the mirror's yet.
    pub(super) fn is_unbegun(&self) -> bool {
        self.phase == Phase::Starting && self.supervisor.is_none()
    }

    /// Tells whether the mirror goes on: it has not ended, and its supervisor lives.
    pub fn is_running(&self, host: &Host) -> bool {
        !self.phase.is_terminal() && self.supervisor.is_some_and(|process| process.is_alive(host))
    }

    /// Gives what Data.stat answers. A mirror that is not ended and has no supervisor any more has failed.
    pub fn status(&self, host: &Host) -> DataStatus {
        let (record, running) = self.judged(host);
        match record.phase {
            Phase::Finished => DataStatus::complete(),
            Phase::Failed | Phase::Cancelled => DataStatus::failed(),
            _ if !running => DataStatus::failed(),
            Phase::Ready => DataStatus::complete(),
            Phase::Draining if record.live && record.was_complete => DataStatus::complete(),
            Phase::Starting | Phase::Connecting => DataStatus::running(0.0),
            Phase::Copying | Phase::Draining => {
                // Never 1: that it is done is said by `complete` alone.
                DataStatus::running(record.progress.fraction().min(0.999))
            }
        }
    }

    /// Tells whether the mirror goes on, with the record that holds then. A supervisor writes its last record before it
    /// ends, which may have been after this one was read: that of a dead one is read again.
    fn judged(&self, host: &Host) -> (Cow<'_, Self>, bool) {
        let running = self.is_running(host);
        if running || self.phase.is_terminal() {
            return (Cow::Borrowed(self), running);
        }
        let newer = Self::load(host, self.key).ok().flatten();
        (newer.map_or(Cow::Borrowed(self), Cow::Owned), false)
    }

    /// Tells whether Datapath.deactivate must fail for this mirror: the destination lacks writes although xapi may
    /// have been told that it is complete, and nothing shows that xapi has learnt of it since.
    pub fn must_be_told(&self, host: &Host) -> bool {
        let (record, running) = self.judged(host);
        let broken = match record.phase {
            Phase::Finished => false,
            Phase::Failed | Phase::Cancelled => true,
            _ => !running,
        };
        record.live && record.was_complete && broken && !record.acknowledged
    }
}

/// Gives the time in seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Makes a record of a mirror supervised by this very process.
    pub fn sample(host: &Host, phase: Phase) -> MirrorRecord {
        let uri = VolumeUri { sr: SrUuid::random(), volume: VolumeKey::random() };
        MirrorRecord {
            live: true,
            phase,
            was_complete: matches!(phase, Phase::Ready | Phase::Draining | Phase::Finished),
            progress: Progress { offset: 1, length: 2, ..Progress::default() },
            supervisor: Some(Process::current(host).unwrap()),
            started: 1,
            updated: 1,
            ..MirrorRecord::new(uri, NodeId::random(), "7".parse().unwrap(), "nbd+unix:///e?socket=/s".to_owned())
        }
    }

    fn said(record: &MirrorRecord, host: &Host) -> String {
        serde_json::to_string(&record.status(host)).unwrap()
    }

    #[test]
    fn a_mirror_without_a_supervisor_has_failed_unless_it_is_finished() {
        let host = Host::at("/");
        for phase in [Phase::Starting, Phase::Connecting, Phase::Copying, Phase::Ready, Phase::Draining] {
            let mut record = sample(&host, phase);
            assert!(!said(&record, &host).contains(r#""failed":true"#), "{phase:?}");
            record.supervisor = None;
            assert_eq!(said(&record, &host), r#"{"failed":true,"complete":false}"#, "{phase:?}");
        }
        let mut record = sample(&host, Phase::Finished);
        record.supervisor = None;
        assert!(said(&record, &host).contains(r#""complete":true"#));
    }

    #[test]
    fn a_record_is_readable_by_people_and_by_programs_of_either_age() {
        // As the first version wrote it, and as much of it as that reads.
        #[derive(Debug, PartialEq, Deserialize)]
        struct First {
            format: u64,
            phase: Phase,
            progress: Progress,
            started: u64,
            updated: u64,
        }
        let root = tempfile::tempdir().unwrap();
        let host = Host::at(root.path());
        let old = r#"{"format":1,"key":"a0000000-0000-4000-8000-000000000001",
            "sr":"a0000000-0000-4000-8000-000000000002","volume":"a0000000-0000-4000-8000-000000000003","domain":"7",
            "remote":"nbd+unix:///e?socket=/s","node":"a0000000-0000-4000-8000-000000000004","live":true,"offline":false,
            "phase":"copying","was_complete":false,"raised":false,"acknowledged":false,
            "progress":{"offset":1073741824,"length":4294967296,"sent":1100000000,"received":5},
            "started":1795428465,"updated":1795428500}"#;
        let mut record: MirrorRecord = record::parse(&root.path().join("state.json"), old.as_bytes()).unwrap();
        record.speed = Some(Speed { bytes_per_second: 100 << 20, seconds_left: Some(31) });
        host.make_runtime_dir(&host.mirror_dir(record.key)).unwrap();
        record.store(&host).unwrap();
        let text = fs::read_to_string(MirrorRecord::path(&host, record.key)).unwrap();
        let summary = "copying, 25.0 %, 1.0 GiB sent, 100.0 MiB/s, 3.0 GiB left, about 31 s";
        assert!(text.lines().count() > 20 && text.contains(summary), "{text}");
        assert!(text.contains("2026-11-23 10:07:45 UTC"), "{text}");
        assert_eq!(MirrorRecord::load(&host, record.key).unwrap(), Some(record.clone()));
        let first: First = serde_json::from_str(&text).unwrap();
        let MirrorRecord { format, phase, progress, started, updated, .. } = record;
        assert_eq!(first, First { format, phase, progress, started, updated });
    }

    #[test]
    fn the_progress_of_several_jobs_goes_on_where_the_last_one_ended() {
        let mut last = -1.0;
        for (earlier, later) in [(0, 700_000), (300_000, 100_000), (900_000, 0)] {
            for offset in 0..=4 {
                let fraction = Progress { offset, length: 4, earlier, later, ..Progress::default() }.fraction();
                assert!(fraction >= last && fraction <= 1.0, "{fraction} after {last}");
                last = fraction;
            }
        }
        assert!((last - 1.0).abs() < 1e-9);
        assert_eq!(Progress::default().fraction(), 0.0);
    }

    #[test]
    fn a_mirror_of_a_source_nobody_writes_to_is_complete_only_when_it_is_flushed_and_closed() {
        let host = Host::at("/");
        let mut record = sample(&host, Phase::Draining);
        record.live = false;
        assert!(said(&record, &host).contains(r#""complete":false"#));
        record.phase = Phase::Finished;
        assert!(said(&record, &host).contains(r#""complete":true"#));
    }

    #[test]
    fn only_a_mirror_that_broke_after_it_was_complete_must_be_told() {
        let host = Host::at("/");
        let mut record = sample(&host, Phase::Ready);
        assert!(!record.must_be_told(&host));
        record.supervisor = None;
        assert!(record.must_be_told(&host));
        record.acknowledged = true;
        assert!(!record.must_be_told(&host));
        assert!(!sample(&host, Phase::Failed).must_be_told(&host));
        assert!(!sample(&host, Phase::Finished).must_be_told(&host));
    }

    #[test]
    fn a_mirror_that_finished_after_its_record_was_read_has_not_failed() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::at(root.path());
        let mut record = sample(&host, Phase::Draining);
        record.supervisor = None;
        let read_before = record.clone();
        record.phase = Phase::Finished;
        host.make_runtime_dir(&host.mirror_dir(record.key)).unwrap();
        record.store(&host).unwrap();
        assert!(said(&read_before, &host).contains(r#""complete":true"#));
        assert!(!read_before.must_be_told(&host));
    }

    #[test]
    fn records_are_found_by_their_volume() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::at(root.path());
        assert!(MirrorRecord::all(&host).unwrap().is_empty());
        let mut record = sample(&host, Phase::Ready);
        host.make_runtime_dir(&host.mirror_dir(record.key)).unwrap();
        record.store(&host).unwrap();
        fs::create_dir(host.mirror_dir(MirrorKey::random())).unwrap();
        assert_eq!(MirrorRecord::of_volume(&host, record.volume).unwrap(), [record.clone()]);
        assert!(MirrorRecord::of_volume(&host, VolumeKey::random()).unwrap().is_empty());
        record.remove(&host).unwrap();
        record.remove(&host).unwrap();
        assert!(MirrorRecord::all(&host).unwrap().is_empty());
    }
}
