//! Data.destroy: forgets a mirror or a copy that has ended.

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::mirror::{self, How};

use super::{Known, OperationParameters};

/// Removes the operation's record: Data.stat then answers as for an unknown key. An unknown one is no error; a copy
/// that a mirror does by the way has no record of its own.
///
/// # Errors
///
/// [`Error::VolumeInUse`] when the operation goes on, as SMAPIv3 wants it (xen-api
/// `ocaml/xapi-storage/generator/lib/data.ml`); else its record cannot be removed.
pub fn execute(host: &Host, parameters: OperationParameters) -> Result<()> {
    let (record, goes_on) = match parameters.find(host)? {
        None => return Ok(()),
        Some(Known::Within(record)) if record.was_complete || !record.is_running(host) => return Ok(()),
        Some(Known::Within(record)) => (record, true),
        Some(Known::Own(record)) => {
            let goes_on = record.is_running(host);
            (record, goes_on)
        }
    };
    if goes_on {
        let reason = format!("operation {} goes on", record.key);
        return Err(Error::VolumeInUse { volume: record.volume.to_string(), reason });
    }
    mirror::end(host, &record, How::Cancel, "it was destroyed")?.remove(host)
}
