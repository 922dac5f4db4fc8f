//! SR.attach: makes an SR known on this host.

use plugin::error::{Error, Result};
use plugin::gc;
use plugin::host::Host;
use plugin::id::SrUuid;
use plugin::mirror;
use plugin::smapi::Configuration;
use plugin::store::{Sr, sr_path};
use serde::Deserialize;

/// Where the SR is.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    configuration: Configuration,
}

/// Attaches the SR and finishes or removes what calls that were killed left in it. Gives the SR's uuid, by which later calls
/// name it. Called again it gives the same.
///
/// # Errors
///
/// When there is no SR, or another than the device-config's `sr_uuid` says; when its record or that of any tree cannot be
/// read.
pub fn execute(host: &Host, parameters: Parameters) -> Result<SrUuid> {
    let sr = Sr::open(&sr_path(&parameters.configuration)?)?;
    let uuid = sr.record.uuid;
    if let Some(expected) = parameters.configuration.get("sr_uuid")
        && *expected != uuid.to_string()
    {
        return Err(Error::InvalidDeviceConfig { key: "sr_uuid", reason: format!("the SR there is {uuid}") });
    }
    // What it holds could not be listed: better known now than by the first scan.
    sr.has_readable_trees()?;
    sr.attach_with(host, &parameters.configuration)?;
    // What is left over does no harm, so that an SR that cannot be written to can still be read.
    let swept = sr.lock_sr(host).and_then(|lock| sr.sweep(host, &lock));
    match swept {
        Ok(false) => {}
        Ok(true) => gc::start(host, &sr),
        Err(error) => tracing::warn!(error = error.chain(), "garbage is left for later"),
    }
    if let Err(error) = mirror::forget_gone(host, &sr) {
        tracing::warn!(error = error.chain(), "records of mirrors are left");
    }
    Ok(uuid)
}
