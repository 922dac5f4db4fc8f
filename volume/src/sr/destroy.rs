//! SR.destroy: removes an SR that has no volumes.

use plugin::error::Result;
use plugin::gc;
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
/// one first. One that a call before has destroyed, but not forgotten, is forgotten.
///
/// # Errors
///
/// [`plugin::Error::SrNotEmpty`] when it has volumes, [`plugin::Error::SrNotAttached`].
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let uuid = parameters.sr.uuid()?;
    // Otherwise a call that was killed, or still runs, has done all but the last.
    if !Sr::was_destroyed(host, uuid)? {
        match parameters.sr.open(host) {
            Ok(sr) => sr.destroy(host)?,
            Err(_) if Sr::was_destroyed(host, uuid)? => {}
            Err(error) => return Err(error),
        }
    }
    Sr::detach(host, uuid)?;
    gc::stop(host, uuid)
}
