//! SR.stat: an SR's names, space and health.

use plugin::error::Result;
use plugin::host::Host;
use plugin::smapi::SrStat;
use serde::Deserialize;

use crate::request::SrName;

/// The SR.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
}

/// Describes the SR.
///
/// # Errors
///
/// When it is not attached, or not where it was attached.
pub fn execute(host: &Host, parameters: Parameters) -> Result<SrStat> {
    parameters.sr.open(host)?.describe()
}
