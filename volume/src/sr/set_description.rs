//! SR.set_description: changes an SR's description.

use plugin::error::Result;
use plugin::host::Host;
use serde::Deserialize;

use crate::request::SrName;

/// The SR and its new description.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    new_description: String,
}

/// Changes the description.
///
/// # Errors
///
/// When the SR is not attached or its record cannot be written.
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    parameters.sr.open(host)?.update(host, |record| record.description = parameters.new_description)
}
