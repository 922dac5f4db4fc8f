//! Task.cancel: ends a task before it is done.

use plugin::error::Result;
use plugin::host::Host;
use plugin::mirror::{self, How};

pub use super::Parameters;

/// Ends the task as failed; one that has ended, or is unknown, is left as it is.
///
/// # Errors
///
/// When the task cannot be ended.
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    if let Some(record) = parameters.find(host)? {
        let mut record = mirror::end(host, &record, How::Cancel, "it was cancelled")?;
        mirror::acknowledge(host, &mut record)?;
    }
    Ok(())
}
