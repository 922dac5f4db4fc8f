//! Volume.snapshot: keeps what a volume holds now as a volume of its own.

use plugin::error::Result;
use plugin::gc;
use plugin::host::Host;
use plugin::id::{NodeId, VolumeKey};
use plugin::mirror;
use plugin::smapi::VolumeRecord;
use plugin::store::{Mode, plan};
use serde::Deserialize;

use crate::request::{SrName, VolumeName};
use crate::usage::Usage;

/// The volume.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    key: VolumeName,
}

/// Makes a snapshot: it gets the volume's node, and the volume goes on in an overlay. A guest that writes meanwhile
/// goes on writing; what it was told is written is in the snapshot. Every call makes another.
///
/// A mirror from the volume ends first, as failed: that is what xapi means by a snapshot then (xen-api
/// `ocaml/xapi/storage_migrate.ml`, stop).
///
/// # Errors
///
/// [`plugin::Error::ActivatedOnAnotherHost`] when it is open for writing elsewhere; nothing is left of a snapshot
/// that failed.
pub fn execute(host: &Host, parameters: Parameters) -> Result<VolumeRecord> {
    let sr = parameters.sr.open(host)?;
    let key = parameters.key.key()?;
    sr.load(key)?;
    mirror::end_for_snapshot(host, key)?;
    let mut tree = sr.lock(host, key)?;
    let usage = Usage::of(host, &tree, key)?;
    usage.refuse_writer_elsewhere(key)?;
    let snapshot = VolumeKey::random();
    let change = plan::snapshot(&tree.tree, key, snapshot, NodeId::random())?;
    match usage {
        Usage::Here(Mode::ReadWrite) => tree.switch(host, change)?,
        // Who only reads goes on reading the node that becomes the snapshot's, which stays as it is.
        Usage::Idle | Usage::Here(Mode::ReadOnly) | Usage::Elsewhere(..) => tree.apply(&change)?,
    }
    let id = tree.id;
    drop(tree);
    // What its guest wrote to waited for this.
    if matches!(usage, Usage::Here(_)) {
        gc::start_for(host, &sr, id);
    }
    sr.stat(snapshot)
}
