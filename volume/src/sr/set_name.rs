//! SR.set_name: changes an SR's name.

use plugin::error::Result;
use plugin::host::Host;
use serde::Deserialize;

use crate::request::SrName;

/// The SR and its new name.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    new_name: String,
}

/// Changes the name.
///
/// # Errors
///
/// When the SR is not attached or its record cannot be written.
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    parameters.sr.open(host)?.update(host, |record| record.name = parameters.new_name)
}
