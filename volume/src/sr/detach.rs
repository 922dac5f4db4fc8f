//! SR.detach: forgets an SR on this host.

use plugin::error::Result;
use plugin::gc;
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
/// [`plugin::Error::SrInUse`] while a volume of it is attached for a guest on this host.
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let Ok(uuid) = parameters.sr.uuid() else {
        return Ok(());
    };
    usage::stop_unused(host, uuid)?;
    Sr::detach(host, uuid)?;
    gc::stop(host, uuid)
}
