//! SR.detach: forgets an SR on this host.

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::store::Sr;
use serde::Deserialize;

use crate::request::SrName;
use crate::usage;

/// The SR.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
}

/// Detaches the SR; one that is not attached is left so.
///
/// # Errors
///
/// [`Error::SrInUse`] while a volume of it has its daemon running on this host.
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let Ok(uuid) = parameters.sr.uuid() else {
        return Ok(());
    };
    if let Some(volume) = usage::running_volume(host, uuid)? {
        return Err(Error::SrInUse { sr: uuid.to_string(), reason: format!("volume {volume} has its datapath") });
    }
    Sr::detach(host, uuid)
}
