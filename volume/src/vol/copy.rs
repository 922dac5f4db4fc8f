//! Volume.copy: makes a volume of its own with the content of another, in the same SR or in another.

use std::path::Path;

use plugin::activation;
use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::id::{Domain, NodeId, VolumeKey, VolumeUri};
use plugin::qemu::img;
use plugin::smapi::VolumeRecord;
use plugin::store::{LockedTree, Mode, NewTree, Sr, Tree, plan};
use serde::Deserialize;

use crate::request::{SrName, VolumeName};
use crate::usage::Usage;

/// The volume, and the SR that the copy is to be in.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    key: VolumeName,
    dest_sr: SrName,
}

/// Makes a copy in a tree of its own. Where the file system can share blocks between files, its nodes are copies of the
/// volume's nodes that share all of theirs; else its one node has all that the volume reads. Every call makes another.
///
/// # Errors
///
/// [`Error::VolumeInUse`] while a guest writes to the volume, and for whoever would activate it for that during the
/// copy; [`Error::ActivatedOnAnotherHost`], [`Error::DataDestroyed`], [`Error::NoSpace`]. Nothing is left of a copy
/// that failed.
pub fn execute(host: &Host, parameters: Parameters) -> Result<VolumeRecord> {
    let Parameters { sr, key, dest_sr } = parameters;
    let (sr, destination) = (sr.open(host)?, dest_sr.open(host)?);
    let key = key.key()?;
    let tree = sr.lock(host, key)?;
    tree.tree.volume_with_data(key)?;
    match Usage::of(host, &tree, key)? {
        Usage::Idle | Usage::Here(Mode::ReadOnly) | Usage::Elsewhere(_, Mode::ReadOnly) => {}
        Usage::Here(Mode::ReadWrite) => {
            return Err(Error::VolumeInUse { volume: key.to_string(), reason: "a guest writes to it".to_owned() });
        }
        Usage::Elsewhere(holder, Mode::ReadWrite) => {
            return Err(Error::ActivatedOnAnotherHost { volume: key.to_string(), host: holder });
        }
    }
    let copy = VolumeKey::random();
    if !share_blocks(&tree, key, &destination, copy)? {
        let volume = plan::copy(&tree.tree, key, NodeId::random())?;
        let virtual_size = tree.tree.virtual_size(tree.volume(key)?.node)?;
        // A copy takes long: nothing is locked meanwhile, and the volume is kept as it is by being read from.
        drop(tree);
        let uri = VolumeUri { sr: sr.record.uuid, volume: key };
        let data = Tree::of_one(copy, volume, virtual_size);
        read_through(host, uri, |socket| {
            NewTree::begin(&destination)?
                .commit_filled(data, |path, lock| img::copy_export(socket, &key.to_string(), path, Some(lock)))
        })?;
    }
    destination.stat(copy)
}

/// Copies the volume's nodes one by one if that costs no space; false when the file system cannot.
fn share_blocks(tree: &LockedTree, key: VolumeKey, destination: &Sr, copy: VolumeKey) -> Result<bool> {
    let images = tree.chain_images(key)?;
    let (copied, nodes) = plan::copied_chain(&tree.tree, key, copy)?;
    NewTree::begin(destination)?.commit_shared(copied, &images, &nodes)
}

/// Has the volume open for reading by a domain of its own, which counts for as long as somebody is connected.
fn read_through<T>(host: &Host, uri: VolumeUri, read: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let domain: Domain = format!("CP{}", &uuid::Uuid::new_v4().simple().to_string()[..6]).parse()?;
    let done = activation::attach(host, uri, &domain).and_then(|socket| {
        activation::activate(host, uri, &domain, Mode::ReadOnly)?;
        read(&socket)
    });
    let released = activation::release(host, uri, &domain);
    if let Err(error) = &released {
        tracing::warn!(error = error.chain(), volume = %uri, "what a copy read through is left");
    }
    done
}
