//! SR.detach: forgets an SR on this host.

use plugin::error::Result;
use plugin::gc;
use plugin::host::Host;
use plugin::mirror;
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
    // An SR that is not there any more can still be detached.
    if let Err(error) = Sr::attached(host, uuid).and_then(|sr| mirror::forget_gone(host, &sr)) {
        tracing::debug!(error = error.chain(), "records of mirrors are left");
    }
    Sr::detach(host, uuid)?;
    gc::stop(host, uuid)
}
