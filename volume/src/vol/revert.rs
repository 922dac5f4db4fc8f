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
/// The snapshot is any other volume of the same disk's tree.
///
/// # Errors
///
/// [`plugin::Error::VolumeInUse`] or [`plugin::Error::ActivatedOnAnotherHost`] while the volume is open anywhere, or the
/// snapshot for writing: xapi shuts a VM down before it reverts it (xen-api `ocaml/xapi/xapi_vm_snapshot.ml`).
/// [`plugin::Error::Unsupported`] for a snapshot of another disk. The volume is then as before.
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let sr = parameters.sr.open(host)?;
    let (key, snapshot) = (parameters.key.key()?, parameters.snapshot.key()?);
    sr.load(snapshot)?;
    mirror::reap(host, key)?;
    let mut tree = sr.lock(host, key)?;
    usage::refuse_mirrored(host, key)?;
    Usage::of(host, &tree, key)?.refuse_active(key)?;
    if tree.tree.volumes.contains_key(&snapshot) {
        Usage::of(host, &tree, snapshot)?.refuse_writer(snapshot)?;
    }
    tree.stop_merge(host)?;
    tree.revert(key, snapshot)?;
    let id = tree.id;
    drop(tree);
    gc::start_for(host, &sr, id);
    Ok(())
}
