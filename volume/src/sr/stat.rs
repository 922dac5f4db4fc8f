//! SR.stat: an SR's names, space and health.

use plugin::error::Result;
use plugin::host::Host;
use plugin::smapi::SrStat;
use plugin::store::health;
use serde::Deserialize;

use crate::request::SrName;

/// The SR.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
}

/// Describes the SR. One that is not where it was attached, or does not answer, says so by its health.
///
/// # Errors
///
/// [`plugin::Error::SrNotAttached`].
pub fn execute(host: &Host, parameters: Parameters) -> Result<SrStat> {
    health::stat(host, parameters.sr.uuid()?)
}
