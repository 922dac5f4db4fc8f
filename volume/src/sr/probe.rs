//! SR.probe: looks for an SR, or for a place for one.

use std::collections::BTreeMap;

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::smapi::{Configuration, ProbeResult};
use plugin::store::{Sr, sr_path, sr_uri};
use serde::Deserialize;

/// Where to look.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    configuration: Configuration,
}

/// Gives the SR that is in the directory, or the directory as a place where one can be made.
///
/// # Errors
///
/// When there is no such directory, or its SR's record cannot be read.
pub fn execute(_: &Host, parameters: Parameters) -> Result<Vec<ProbeResult>> {
    let path = sr_path(&parameters.configuration)?;
    if !path.is_dir() {
        let reason = format!("{} is not a directory", path.display());
        return Err(Error::InvalidDeviceConfig { key: "uri", reason });
    }
    let mut configuration = Configuration::from([("uri".to_owned(), sr_uri(&path))]);
    let sr = Sr::find(&path)?.map(|sr| sr.describe()).transpose()?;
    if let Some(stat) = &sr {
        // xapi-storage-script wants it exactly where an SR was found.
        configuration.insert("sr_uuid".to_owned(), stat.uuid.clone());
    }
    Ok(vec![ProbeResult { configuration, complete: true, sr, extra_info: BTreeMap::new() }])
}
