//! Volume.compose: lays what a volume has of its own onto another volume.

use plugin::error::{Error, Result};
use plugin::gc;
use plugin::host::Host;
use plugin::id::VolumeKey;
use plugin::mirror;
use serde::Deserialize;

use crate::request::{SrName, VolumeName};
use crate::usage::{self, Usage};

/// The child, `key`, and the parent, `key2`.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    key: VolumeName,
    key2: VolumeName,
}

/// Gives the child the parent's data wherever it has none of its own; zeroes that were written to it are its own. The
/// child keeps key, size, names and xapi's keys; the parent is gone, but for its snapshots and clones, which stay, as
/// all other volumes do. Again, once the parent is gone by this, it is success.
///
/// # Errors
///
/// [`Error::VolumeInUse`] or [`Error::ActivatedOnAnotherHost`] while either is active: xapi composes at the end of a
/// migration, after it detached both (xen-api `ocaml/xapi/storage_smapiv1_migrate.ml`, receive_finalize_common).
/// [`Error::Unsupported`] when others lie on the child or share its data, [`Error::ChainTooLong`]. Both volumes are
/// then as before.
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let sr = parameters.sr.open(host)?;
    let (child, parent) = (parameters.key.key()?, parameters.key2.key()?);
    if child == parent {
        return Err(Error::BadRequest(format!("volume {child} cannot be composed with itself")));
    }
    mirror::reap(host, child)?;
    mirror::reap(host, parent)?;
    // What a killed call began with the parent may need the child's tree, which is not locked yet.
    match sr.lock(host, parent) {
        Ok(_) | Err(Error::VolumeDoesNotExist(_)) => {}
        Err(error) => return Err(error),
    }
    let mut tree = sr.lock(host, child)?;
    if tree.was_composed(child, parent) {
        drop(tree);
        return forget(host, parent);
    }
    let mut onto = tree.lock_beside(host, parent)?;
    usage::refuse_mirrored(host, child)?;
    usage::refuse_mirrored(host, parent)?;
    // One that is only attached may be composed: what is opened later is the new chain.
    Usage::of(host, &tree, child)?.refuse_active(child)?;
    usage::release(host, onto.as_ref().unwrap_or(&tree), parent)?;
    tree.stop_merge(host)?;
    if let Some(onto) = &mut onto {
        onto.stop_merge(host)?;
    }
    let ids = [Some(tree.id), onto.as_ref().map(|onto| onto.id)];
    tree.compose(child, parent, onto)?;
    ids.into_iter().flatten().for_each(|id| gc::start_for(host, &sr, id));
    forget(host, parent)
}

/// Forgets what is known of mirrors of a volume that is gone.
fn forget(host: &Host, parent: VolumeKey) -> Result<()> {
    if let Err(error) = mirror::forget_volume(host, parent) {
        tracing::warn!(error = error.chain(), "records of mirrors are left");
    }
    Ok(())
}
