//! Data.stat: how far a mirror or a copy is.

use std::path::Path;
use std::time::{Duration, Instant};

use plugin::error::Result;
use plugin::host::{Host, Process};
use plugin::mirror;
use plugin::smapi::DataStatus;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

use super::{Known, OperationParameters};

/// How long to wait for the mirror to become complete or fail: xapi asks again without a pause
/// (xen-api `ocaml/xapi/storage_smapiv3_migrate.ml`).
const PATIENCE: Duration = Duration::from_secs(1);

/// Tells how far an operation is; for one that goes on, after a second or when it becomes complete or fails. A copy that
/// a mirror does by the way is complete when the mirror was, whatever became of that since.
///
/// Reads one file: no lock and no daemon can make it wait, but for the one call that finds the supervisor of a mirror dead
/// that had slowed its guest. It never fails, because xapi calls it once in an error
/// handler where a second error would skip its clean-up: an unknown key, and a record that cannot be read, are a
/// mirror that failed.
///
/// # Errors
///
/// None.
pub fn execute(host: &Host, parameters: OperationParameters) -> Result<DataStatus> {
    let deadline = Instant::now() + PATIENCE;
    let mut changes = None;
    loop {
        let (mut record, status) = match find(host, &parameters) {
            None => return Ok(DataStatus::failed()),
            Some(Known::Within(record)) if record.was_complete => return Ok(DataStatus::complete()),
            Some(Known::Own(record) | Known::Within(record)) => {
                let status = record.status(host);
                (record, status)
            }
        };
        if record.raised && record.phase.is_terminal() {
            // Deactivate failed for it, and now this answer says so too: xapi cannot have missed it.
            if let Err(error) = mirror::acknowledge(host, &mut record) {
                tracing::warn!(error = error.chain(), "that a mirror's end was told could not be recorded");
            }
        }
        if record.pace.is_some() && !status.is_running() && !record.phase.is_terminal() {
            // Its supervisor was killed, and nobody else gives the guest its pace back before the volume is closed.
            let ended = mirror::end_unless_running(host, &record, "its supervisor is gone");
            if let Err(error) = ended {
                tracing::error!(error = error.chain(), "a guest is still slowed for a mirror that is gone");
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if !status.is_running() || left.is_zero() {
            return Ok(status);
        }
        // The first look may have been before the watch was there: look again before waiting.
        match &changes {
            None => changes = Some(Changes::watch(host, &host.mirror_dir(record.key), record.supervisor)),
            Some(changes) => changes.wait(left),
        }
    }
}

/// Finds an operation; what cannot be read is as good as unknown.
fn find(host: &Host, parameters: &OperationParameters) -> Option<Known> {
    parameters.find(host).unwrap_or_else(|error| {
        tracing::error!(error = error.chain(), "an operation's record is unreadable");
        None
    })
}

/// What wakes a call that waits for a mirror: its record's replacement, and its supervisor's end.
struct Changes {
    record: Option<OwnedFd>,
    supervisor: Option<OwnedFd>,
}

impl Changes {
    /// Starts to watch. What cannot be watched is looked at again only after the whole time.
    fn watch(host: &Host, directory: &Path, supervisor: Option<Process>) -> Self {
        let watch = || {
            let descriptor = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
            inotify::add_watch(&descriptor, directory, WatchFlags::MOVED_TO | WatchFlags::DELETE_SELF)?;
            Ok::<_, rustix::io::Errno>(descriptor)
        };
        Self { record: watch().ok(), supervisor: supervisor.and_then(|process| process.open(host)) }
    }

    /// Waits for a change, up to `left`.
    fn wait(&self, left: Duration) {
        let mut descriptors: Vec<PollFd<'_>> =
            self.record.iter().chain(&self.supervisor).map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let _ = poll(&mut descriptors, Some(&timeout));
        if let Some(record) = &self.record {
            // What happened does not matter, only that it did.
            let mut bytes = [0; 4096];
            while rustix::io::read(record, &mut bytes).is_ok_and(|length| length > 0) {}
        }
    }
}
