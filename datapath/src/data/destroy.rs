//! Data.destroy: forgets a mirror that has ended.

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::mirror::{self, How, MirrorRecord};

use super::OperationParameters;

/// Removes the mirror's record: Data.stat then answers as for an unknown key. An unknown one is no error.
///
/// # Errors
///
/// [`Error::VolumeInUse`] when the mirror goes on, as SMAPIv3 wants it (xen-api
/// `ocaml/xapi-storage/generator/lib/data.ml`); else its record cannot be removed.
pub fn execute(host: &Host, parameters: OperationParameters) -> Result<()> {
    let Some(key) = parameters.mirror() else { return Ok(()) };
    let Some(record) = MirrorRecord::load(host, key)? else { return Ok(()) };
    if record.is_running(host) {
        let reason = format!("mirror {key} goes on: cancel it first");
        return Err(Error::VolumeInUse { volume: record.volume.to_string(), reason });
    }
    mirror::end(host, &record, How::Cancel, "it was destroyed")?.remove(host)
}
