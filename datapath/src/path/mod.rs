//! Datapath.*: from the first attach of a volume to its last detach.

pub mod activate;
pub mod activate_readonly;
pub mod attach;
pub mod close;
pub mod deactivate;
pub mod detach;
pub mod import_activate;
pub mod open;

use plugin::error::Error;
use plugin::id::{Domain, VolumeUri};
use serde::Deserialize;

/// A volume and who is to use it: what most methods take.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    #[serde(deserialize_with = "parsed")]
    uri: VolumeUri,
    domain: Domain,
}

/// Decodes a value from its text.
fn parsed<'de, D, T>(deserializer: D) -> std::result::Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: std::str::FromStr<Err = Error>,
{
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}
