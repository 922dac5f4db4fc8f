//! SR.destroy: removes an SR that has no volumes.

use plugin::error::Result;
use plugin::host::Host;
use plugin::store::Sr;
use serde::Deserialize;

use crate::request::SrName;

/// The SR.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
}

/// Removes the SR from its directory and from this host. Data is never removed with it: volumes are destroyed one by
/// one first.
///
/// # Errors
///
/// [`plugin::Error::SrNotEmpty`] when it has volumes, [`plugin::Error::SrNotAttached`].
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let sr = parameters.sr.open(host)?;
    let uuid = sr.record.uuid;
    sr.destroy(host)?;
    Sr::detach(host, uuid)
}
