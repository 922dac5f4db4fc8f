//! Volume.revert: takes a volume back to what a snapshot holds.

use plugin::error::Result;
use plugin::gc;
use plugin::host::Host;
use plugin::mirror;
use serde::Deserialize;

use crate::request::{SrName, VolumeName};
use crate::usage::{self, Usage};

/// The volume, `key`, and the snapshot of it.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    snapshot: VolumeName,
    key: VolumeName,
}

/// Gives the volume the content and the size of the snapshot; its key, names and xapi's keys stay, and so do the
/// snapshot and everything else in the tree. What the volume held before is gone. Again, it does the same again.
///
/// The snapshot is any other volume of the same disk's tree, or one of another tree that xapi calls a snapshot of the
/// volume (its key `snapshot_of`); the volume then goes to that tree.
///
/// # Errors
///
/// [`plugin::Error::VolumeInUse`] or [`plugin::Error::ActivatedOnAnotherHost`] while the volume is open anywhere, or the
/// snapshot for writing: xapi shuts a VM down before it reverts it (xen-api `ocaml/xapi/xapi_vm_snapshot.ml`).
/// [`plugin::Error::Unsupported`] for a snapshot of another disk. The volume is then as before.
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let sr = parameters.sr.open(host)?;
    let (key, snapshot) = (parameters.key.key()?, parameters.snapshot.key()?);
    if !sr.load(snapshot)?.tree.volumes.contains_key(&key) {
        // What a killed call began with the snapshot may need the volume's tree, which is not locked yet.
        drop(sr.lock(host, snapshot)?);
    }
    mirror::reap(host, key)?;
    let mut tree = sr.lock(host, key)?;
    let mut onto = tree.lock_beside(host, snapshot)?;
    usage::refuse_mirrored(host, key)?;
    Usage::of(host, &tree, key)?.refuse_active(key)?;
    Usage::of(host, onto.as_ref().unwrap_or(&tree), snapshot)?.refuse_writer(snapshot)?;
    tree.stop_merge(host)?;
    if let Some(onto) = &mut onto {
        onto.stop_merge(host)?;
    }
    let ids = [Some(tree.id), onto.as_ref().map(|onto| onto.id)];
    match onto {
        Some(onto) => tree.revert_onto(key, snapshot, onto)?,
        None => {
            tree.revert(key, snapshot)?;
            drop(tree);
        }
    }
    ids.into_iter().flatten().for_each(|id| gc::start_for(host, &sr, id));
    Ok(())
}
