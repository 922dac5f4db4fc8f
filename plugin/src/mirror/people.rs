//! What a mirror's record says for people who open the file.

use serde::{Deserialize, Serialize};

use super::record::{MirrorRecord, Phase};
use crate::clock;
use crate::size::bytes;

/// The record once more, in words. Written with each record and read by no program.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ForPeople {
    /// What it does now.
    pub summary: String,
    /// When it was started.
    pub started: String,
    /// When this was written.
    pub updated: String,
}

impl ForPeople {
    /// Describes a record.
    pub(super) fn of(record: &MirrorRecord) -> Self {
        Self {
            summary: summary(record),
            started: clock::for_people(record.started),
            updated: clock::for_people(record.updated),
        }
    }
}

/// Says on one line how far a mirror is, how fast it goes and what is left.
pub fn summary(record: &MirrorRecord) -> String {
    let (progress, seconds) = (&record.progress, record.updated.saturating_sub(record.started));
    let mut parts = vec![format!("{:?}", record.phase).to_lowercase()];
    let has_begun = !matches!(record.phase, Phase::Starting | Phase::Connecting) && progress.length > 0;
    if has_begun && record.phase != Phase::Finished {
        parts.push(format!("{:.1} %", progress.fraction() * 100.0));
    }
    if progress.sent > 0 {
        parts.push(format!("{} sent", bytes(progress.sent)));
    }
    match (record.phase.is_terminal(), &record.speed) {
        (false, Some(speed)) => {
            parts.push(format!("{}/s", bytes(speed.bytes_per_second)));
            let rest = progress.length.saturating_sub(progress.offset);
            if rest > 0 {
                let time = speed.seconds_left.map(|left| format!(", about {}", clock::span_for_people(left)));
                parts.push(format!("{} left{}", bytes(rest), time.unwrap_or_default()));
            }
        }
        (true, _) if seconds > 0 && progress.sent > 0 => {
            parts.push(format!("{}/s in {}", bytes(progress.sent / seconds), clock::span_for_people(seconds)));
        }
        _ => {}
    }
    if let Some(pace) = record.pace.filter(|_| !record.phase.is_terminal()) {
        parts.push(format!("its guest may write {}/s", bytes(pace.bytes)));
    }
    parts.extend(record.reason.clone());
    parts.join(", ")
}
