//! Volume.create: makes a blank volume.

use plugin::error::Result;
use plugin::host::Host;
use plugin::id::VolumeKey;
use plugin::smapi::VolumeRecord;
use plugin::store::{NewTree, Tree, Volume};
use serde::Deserialize;

use crate::request::{Size, SrName};

/// The volume to make.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    name: String,
    description: String,
    size: Size,
    sharable: bool,
}

/// Makes a volume in a tree of its own. Every call makes another.
///
/// # Errors
///
/// [`plugin::Error::InvalidSize`], [`plugin::Error::NoSpace`]; nothing is left of it then.
pub fn execute(host: &Host, parameters: Parameters) -> Result<VolumeRecord> {
    let Parameters { sr, name, description, size, sharable } = parameters;
    let sr = sr.open(host)?;
    let virtual_size = size.bytes()?;
    let key = VolumeKey::random();
    let volume = Volume { sharable, ..Volume::new(name, description) };
    NewTree::begin(&sr)?.commit(Tree::of_one(key, volume, virtual_size))?;
    sr.stat(key)
}
