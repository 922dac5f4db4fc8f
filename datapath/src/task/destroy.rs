//! Task.destroy: forgets a task that has ended.

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::mirror::{self, How};

pub use super::Parameters;

/// Removes all traces of the task, as Data.destroy does. An unknown one is no error.
///
/// # Errors
///
/// [`Error::VolumeInUse`] when the task goes on; else its record cannot be removed.
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let Some(record) = parameters.find(host)? else { return Ok(()) };
    if record.is_running(host) {
        let reason = format!("task {} goes on", record.key);
        return Err(Error::VolumeInUse { volume: record.volume.to_string(), reason });
    }
    mirror::end(host, &record, How::Cancel, "it was destroyed")?.remove(host)
}
