//! Data.cancel: ends a mirror or a copy before it is done.

use plugin::error::Result;
use plugin::host::Host;
use plugin::mirror::{self, How};

use super::{Known, OperationParameters};

/// Ends the operation as cancelled, at once; the destination is then without some bytes. One that has ended, or is
/// unknown, is left as it is, and so is a copy that a mirror does by the way.
///
/// # Errors
///
/// When the operation cannot be ended.
pub fn execute(host: &Host, parameters: OperationParameters) -> Result<()> {
    if let Some(Known::Own(record)) = parameters.find(host)? {
        let mut record = mirror::end(host, &record, How::Cancel, "it was cancelled")?;
        mirror::acknowledge(host, &mut record)?;
    }
    Ok(())
}
