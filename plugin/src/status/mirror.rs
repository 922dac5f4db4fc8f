//! A mirror, as it is shown.

use serde::Serialize;

use crate::host::Host;
use crate::id::{MirrorKey, VolumeKey};
use crate::mirror::{MirrorRecord, Phase, summary};

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
    /// Whether it is a copy of listed blocks.
    pub is_copy: bool,
    /// The destination's NBD URI.
    pub remote: String,
    /// What is sent, once that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<String>,
    /// Its supervisor's process, while that runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub supervisor: Option<i32>,
    /// When it was started, in seconds since 1970.
    pub started: u64,
    /// When its record was written last.
    pub updated: u64,
}

impl MirrorStatus {
    /// Describes a mirror by its record.
    pub(super) fn of(host: &Host, record: &MirrorRecord) -> Self {
        let is_running = record.is_running(host);
        let speed = record.speed.filter(|_| is_running);
        let lost = !is_running && !record.phase.is_terminal();
        let lost = lost.then(|| "its supervisor does not run".to_owned());
        Self {
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
            is_copy: record.copy,
            remote: record.remote.clone(),
            plan: record.plan.as_ref().map(ToString::to_string),
            supervisor: record.supervisor.filter(|_| is_running).map(|process| process.pid),
            started: record.started,
            updated: record.updated,
        }
    }
}
