//! Task.stat: how far a task is.

use plugin::error::Result;
use plugin::host::Host;
use plugin::mirror::{MirrorRecord, Phase, Progress};
use serde::{Serialize, Serializer};

pub use super::Parameters;

/// A task.
#[derive(Debug, Serialize)]
pub struct Task {
    id: String,
    debug_info: String,
    /// When it was started, in seconds since 1970.
    ctime: f64,
    state: State,
}

/// How far it is.
#[derive(Debug, PartialEq)]
enum State {
    /// It goes on, with its progress from 0 to 1.
    Pending(f64),
    /// It has succeeded, after so many seconds.
    Completed(f64),
    /// It has failed, and why.
    Failed(String),
}

impl Serialize for State {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Pending(progress) => ("Pending", progress).serialize(serializer),
            Self::Completed(seconds) => {
                ("Completed", std::collections::BTreeMap::from([("duration", seconds)])).serialize(serializer)
            }
            Self::Failed(reason) => ("Failed", reason).serialize(serializer),
        }
    }
}

/// Tells how far a task is, without waiting. A mirror of a live leaf stays pending, at 1, until it has ended.
///
/// # Errors
///
/// When there is no such task.
pub fn execute(host: &Host, parameters: Parameters) -> Result<Task> {
    let record = parameters.find(host)?.ok_or_else(|| parameters.unknown())?;
    let running = record.is_running(host);
    // It may have ended, and said how, after it was read.
    let record = if running { record } else { parameters.find(host)?.unwrap_or(record) };
    let state = state(&record, running);
    Ok(Task { id: record.key.to_string(), debug_info: record.debug_info, ctime: record.started as f64, state })
}

/// Gives the state of a record whose supervisor runs or does not.
fn state(record: &MirrorRecord, running: bool) -> State {
    let Progress { offset, length, .. } = record.progress;
    match record.phase {
        Phase::Finished => State::Completed(record.updated.saturating_sub(record.started) as f64),
        Phase::Failed | Phase::Cancelled => State::Failed(record.reason.clone().unwrap_or_default()),
        _ if !running => State::Failed("its supervisor ended unexpectedly".to_owned()),
        Phase::Ready => State::Pending(1.0),
        Phase::Starting | Phase::Connecting | Phase::Copying | Phase::Draining if length == 0 => State::Pending(0.0),
        Phase::Starting | Phase::Connecting | Phase::Copying | Phase::Draining => {
            State::Pending((offset as f64 / length as f64).min(1.0))
        }
    }
}

#[cfg(test)]
mod tests {
    use plugin::id::{NodeId, SrUuid, VolumeKey, VolumeUri};
    use serde_json::json;

    use super::*;

    #[test]
    fn a_task_says_what_its_record_says() {
        let uri = VolumeUri { sr: SrUuid::random(), volume: VolumeKey::random() };
        let domain = "7".parse().unwrap();
        let mut record = MirrorRecord::new(uri, NodeId::random(), domain, "nbd+unix:///e?socket=/s".to_owned());
        record.progress = Progress { offset: 1, length: 4, ..Progress::default() };
        for (phase, running, expected) in [
            (Phase::Copying, true, json!(["Pending", 0.25])),
            (Phase::Ready, true, json!(["Pending", 1.0])),
            (Phase::Ready, false, json!(["Failed", "its supervisor ended unexpectedly"])),
            (Phase::Cancelled, false, json!(["Failed", ""])),
        ] {
            record.phase = phase;
            assert_eq!(serde_json::to_value(state(&record, running)).unwrap(), expected);
        }
        (record.phase, record.updated) = (Phase::Finished, record.started + 3);
        assert_eq!(serde_json::to_value(state(&record, false)).unwrap(), json!(["Completed", {"duration": 3.0}]));
    }
}
