//! Volume.clone: makes a writable copy of a volume.

use plugin::error::Result;
use plugin::host::Host;
use plugin::id::{NodeId, VolumeKey};
use plugin::smapi::VolumeRecord;
use plugin::store::{Mode, plan};
use serde::Deserialize;

use crate::request::{SrName, VolumeName};
use crate::usage::{self, Usage};

/// The volume.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    key: VolumeName,
}

/// Makes a clone: an overlay on the volume's node. A volume that a guest writes to moves to an overlay of its own
/// at the same moment. Every call makes another.
///
/// # Errors
///
/// [`plugin::Error::ActivatedOnAnotherHost`] when it is open for writing elsewhere, [`plugin::Error::VolumeInUse`]
/// while a guest writes to it and it is mirrored; nothing is left of a clone that failed.
pub fn execute(host: &Host, parameters: Parameters) -> Result<VolumeRecord> {
    let sr = parameters.sr.open(host)?;
    let key = parameters.key.key()?;
    let mut tree = sr.lock(host, key)?;
    let usage = Usage::of(host, &tree, key)?;
    usage.refuse_writer_elsewhere(key)?;
    let clone = VolumeKey::random();
    match usage {
        Usage::Here(Mode::ReadWrite) => {
            usage::refuse_mirrored(host, key)?;
            let change = plan::clone(&tree.tree, key, clone, NodeId::random(), Some(NodeId::random()))?;
            tree.switch(host, change)?;
        }
        Usage::Idle | Usage::Here(Mode::ReadOnly) | Usage::Elsewhere(..) => {
            let change = plan::clone(&tree.tree, key, clone, NodeId::random(), None)?;
            tree.apply(&change)?;
        }
    }
    drop(tree);
    sr.stat(clone)
}
