//! SR.create: makes an SR in an existing directory.

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::smapi::Configuration;
use plugin::store::{Sr, sr_path, sr_uri};
use serde::Deserialize;

/// The SR to make.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    uuid: String,
    configuration: Configuration,
    name: String,
    description: String,
}

/// Makes an SR and gives the device-config by which every host finds it. Called again it changes nothing but the
/// name and the description.
///
/// # Errors
///
/// When there is no such directory, or another SR in it.
pub fn execute(host: &Host, parameters: Parameters) -> Result<Configuration> {
    let Parameters { uuid, mut configuration, name, description } = parameters;
    let path = sr_path(&configuration)?;
    if !path.is_dir() {
        let reason = format!("{} is not a directory", path.display());
        return Err(Error::InvalidDeviceConfig { key: "uri", reason });
    }
    Sr::create(host, &path, uuid.parse()?, &name, &description)?;
    configuration.insert("uri".to_owned(), sr_uri(&path));
    Ok(configuration)
}
