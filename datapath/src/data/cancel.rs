//! Data.cancel: ends a mirror before it is done.

use plugin::error::Result;
use plugin::host::Host;
use plugin::mirror::{self, How, MirrorRecord};

use super::OperationParameters;

/// Ends the mirror as cancelled, at once; the destination is then without some bytes. One that has ended, or is
/// unknown, is left as it is.
///
/// # Errors
///
/// When the mirror cannot be ended.
pub fn execute(host: &Host, parameters: OperationParameters) -> Result<()> {
    let Some(key) = parameters.mirror() else { return Ok(()) };
    if let Some(record) = MirrorRecord::load(host, key)? {
        let mut record = mirror::end(host, &record, How::Cancel, "it was cancelled")?;
        mirror::acknowledge(host, &mut record)?;
    }
    Ok(())
}
