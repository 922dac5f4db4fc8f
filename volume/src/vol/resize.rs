//! Volume.resize: makes a volume larger.

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::id::NodeId;
use plugin::store::{Mode, plan};
use serde::Deserialize;

use crate::request::{Size, SrName, VolumeName};
use crate::usage::{self, Usage};

/// The volume and the size it is to have at least.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    key: VolumeName,
    new_size: Size,
}

/// Grows the volume; one that has the size already is left as it is.
///
/// # Errors
///
/// [`Error::InvalidSize`] for a smaller size; [`Error::VolumeInUse`] while it is read from or a client of its
/// export would not learn the new size; [`Error::ActivatedOnAnotherHost`].
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let sr = parameters.sr.open(host)?;
    let key = parameters.key.key()?;
    let bytes = parameters.new_size.bytes()?;
    let mut tree = sr.lock(host, key)?;
    let node = tree.volume(key)?.node;
    let now = tree.tree.node(node)?.virtual_size;
    if bytes < now {
        return Err(Error::InvalidSize(format!(
            "volume {key} has {now} bytes and cannot shrink to {bytes}; copy what is in it to a smaller one"
        )));
    }
    if bytes == now {
        return Ok(());
    }
    match Usage::of(host, &tree, key)? {
        Usage::Elsewhere(holder, _) => Err(Error::ActivatedOnAnotherHost { volume: key.to_string(), host: holder }),
        Usage::Here(Mode::ReadOnly) => Err(usage::in_use(key, "it is being read from")),
        Usage::Here(Mode::ReadWrite) => {
            usage::refuse_mirrored(host, key)?;
            tree.grow_live(host, key, bytes)
        }
        // What lies on a node must not see it change.
        Usage::Idle if tree.tree.is_frozen(node) => {
            let change = plan::overlay(&tree.tree, key, NodeId::random(), Some(bytes))?;
            tree.apply(&change)
        }
        Usage::Idle => tree.grow(key, bytes),
    }
}
