//! `tree`: what an SR's trees look like now.

mod dot;

use std::path::Path;

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::id::VolumeKey;
use plugin::status::{draw_trees, trees::Picture};
use plugin::store::Sr;

use crate::arguments::Form;
use crate::place;

/// Draws all trees, or that of one volume.
///
/// # Errors
///
/// When there is no SR, its record cannot be read, or the volume does not exist. A tree whose record cannot be read is
/// shown with the reason.
pub fn execute(host: &Host, sr: &Path, volume: Option<VolumeKey>, form: Form) -> Result<String> {
    let sr = Sr::open(&place::path_of(host, sr)?)?;
    let picture = Picture::of(host, &sr, volume)?;
    match form {
        Form::Text => Ok(draw_trees(&picture)),
        Form::Dot => Ok(dot::draw(&picture)),
        Form::Json => serde_json::to_string_pretty(&picture)
            .map(|text| text + "\n")
            .map_err(|error| Error::Internal(format!("the trees cannot be encoded: {error}"))),
    }
}
