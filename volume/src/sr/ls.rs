//! SR.ls: lists an SR's volumes.

use plugin::error::Result;
use plugin::host::Host;
use plugin::smapi::VolumeRecord;
use serde::Deserialize;

use crate::request::SrName;

/// The SR.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
}

/// Lists all volumes, snapshots among them.
///
/// # Errors
///
/// When the SR is not there or any record in it cannot be read: xapi forgets what is not listed.
pub fn execute(host: &Host, parameters: Parameters) -> Result<Vec<VolumeRecord>> {
    parameters.sr.open(host)?.volumes()
}
