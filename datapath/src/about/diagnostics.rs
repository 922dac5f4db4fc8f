//! Plugin.diagnostics: what this host does now, for people.

use plugin::error::Result;
use plugin::host::Host;
use plugin::status::{Detail, Status, draw_all};
use serde::Deserialize;

/// Nothing is asked.
#[derive(Debug, Deserialize)]
pub struct Parameters {}

/// Describes what there is, as that of the volume plugin but for the trees: this call does not fail for what it finds,
/// waits for no daemon, and for a file system with a bound.
///
/// # Errors
///
/// None.
pub fn execute(host: &Host, _: Parameters) -> Result<String> {
    Ok(draw_all(&Status::of(host, Detail::Brief)))
}
