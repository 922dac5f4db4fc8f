//! Attaching and activating a volume: this host's side of it together with the SR's, where other hosts see it.
//!
//! A volume's record in its tree says which hosts have it active. It is written before anything is opened and taken
//! back after everything is closed, so that it may claim too much and never too little:
//!
//! ```text
//!   tree lock ─► attachment lock ─► claim in tree.json ─► graph opened, exported       activate
//!   tree lock ─► attachment lock ─► graph closed, flushed ─► claim taken back          deactivate
//! ```
//!
//! One host may write while no other has any claim; several may read while none writes. A claim of this host from an
//! earlier boot, or without an open graph behind it, is worth nothing. A claim of another host always stands: whether
//! that host lives cannot be known from here.
//!
//! Nothing that others lie on is written to: a volume whose node has children moves to a new overlay first.
//!
//! A volume is persistent unless it was opened otherwise ([`open`]); then a guest's writes go to a node that is thrown
//! away ([`crate::store::Scratch`]).

use std::ffi::OsString;
use std::path::PathBuf;

use uuid::Uuid;

use crate::attachment::Attachment;
use crate::error::{Error, Result};
use crate::gc;
use crate::host::Host;
use crate::id::{ContentId, Domain, NodeId, VolumeKey, VolumeUri};
use crate::mirror::Base;
use crate::qemu::block_on;
use crate::store::{Activation, LockedTree, Mode, Sr, Tree};

/// Opens a volume for a guest that is about to start; what an earlier one wrote and was to be thrown away is gone then.
/// A volume that stays persistent may be opened by any number of guests.
///
/// # Errors
///
/// [`Error::SrNotAttached`], [`Error::VolumeDoesNotExist`]; [`Error::VolumeInUse`] or [`Error::ActivatedOnAnotherHost`]
/// when somebody has it open for writing in another way, or not persistent.
pub fn open(host: &Host, uri: VolumeUri, persistent: bool) -> Result<()> {
    let sr = Sr::attached(host, uri.sr)?;
    if persistent && !sr.load(uri.volume)?.tree.scratch.contains_key(&uri.volume) {
        return Ok(());
    }
    let mut tree = sr.lock(host, uri.volume)?;
    let written = |mode: Mode| mode == Mode::ReadWrite;
    let in_use = || {
        let reason = "it is active, and what is written to it would be kept or lost against what is asked".to_owned();
        Err(Error::VolumeInUse { volume: uri.volume.to_string(), reason })
    };
    let this = host.uuid()?;
    let has_scratch = tree.scratch(uri.volume).is_some();
    let mut others = tree.volume(uri.volume)?.active.iter().filter(|claim| claim.host != this);
    if let Some(claim) = others.find(|claim| has_scratch || written(claim.mode)) {
        return Err(Error::ActivatedOnAnotherHost { volume: uri.volume.to_string(), host: claim.host });
    }
    if let Some(mut attachment) = Attachment::lock_existing(host, uri.volume)?
        && attachment.open_mode().is_some_and(|mode| has_scratch || written(mode))
    {
        if block_on(attachment.is_used())? {
            return in_use();
        }
        // A migration that nobody is connected for: see `Domain::is_migration`.
        block_on(attachment.stop())?;
        follow(&mut tree, uri.volume, host, &mut attachment)?;
    }
    tree.empty_scratch(uri.volume, !persistent)
}

/// Closes a volume whose guest is gone: what it wrote is thrown away if the volume was opened for that, at once or, while
/// somebody still has it open, by the last one's deactivation. A volume that is gone is closed.
///
/// # Errors
///
/// When the record cannot be written.
pub fn close(host: &Host, uri: VolumeUri) -> Result<()> {
    let loaded = Sr::attached(host, uri.sr).and_then(|sr| sr.load(uri.volume));
    match loaded {
        Ok(loaded) if loaded.tree.scratch.contains_key(&uri.volume) => {}
        Ok(_) | Err(Error::SrNotAttached(_) | Error::VolumeDoesNotExist(_)) => return Ok(()),
        Err(error) => return Err(error),
    }
    let Some(mut tree) = lock_tree(host, uri)? else { return Ok(()) };
    let this = host.uuid()?;
    let attachment = Attachment::lock_existing(host, uri.volume)?;
    let is_open = attachment.is_some_and(|attachment| attachment.open_mode().is_some())
        || tree.volume(uri.volume)?.active.iter().any(|claim| claim.host != this);
    if is_open { tree.end_scratch_later(uri.volume) } else { tree.empty_scratch(uri.volume, false) }
}

/// Attaches a domain to a volume and gives the socket at which its export will be.
///
/// # Errors
///
/// [`Error::SrNotAttached`], [`Error::VolumeDoesNotExist`], [`Error::DataDestroyed`]; else the volume's daemon does
/// not start.
pub fn attach(host: &Host, uri: VolumeUri, domain: &Domain) -> Result<PathBuf> {
    // Held so that the volume is not destroyed meanwhile.
    let tree = Sr::attached(host, uri.sr)?.lock(host, uri.volume)?;
    tree.tree.volume_with_data(uri.volume)?;
    let mut attachment = Attachment::lock(host, uri)?;
    block_on(attachment.attach(domain))?;
    Ok(attachment.sockets().nbd())
}

/// Activates a domain: the volume is then open and exported on this host.
///
/// # Errors
///
/// [`Error::ActivatedOnAnotherHost`] when another host's claim forbids it; [`Error::VolumeInUse`] when a client that
/// reads on this host does; [`Error::NotComposed`] for who is no migration while a migration from SMAPIv1 is not whole;
/// else the volume cannot be opened.
pub fn activate(host: &Host, uri: VolumeUri, domain: &Domain, mode: Mode) -> Result<()> {
    let mut tree = Sr::attached(host, uri.sr)?.lock(host, uri.volume)?;
    let importer = tree.tree.volume_with_data(uri.volume)?.importing.as_ref();
    if importer.is_some_and(|importer| importer != domain) && !domain.is_migration() {
        // xapi only logs that a migration's last calls failed, and starts the guest (xen-api
        // `ocaml/xapi/storage_migrate.ml`, post_deactivate_hook).
        return Err(Error::NotComposed(uri.volume.to_string()));
    }
    let mut attachment = Attachment::lock(host, uri)?;
    let this = host.uuid()?;
    let open = attachment.open_mode();
    let needed = attachment.mode_with(mode);
    refuse_for_others(&tree.tree, uri.volume, this, needed)?;
    let boot_id = host.boot_id()?;
    let is_before = |claim: &Activation| claim.host == this && claim.boot_id != boot_id;
    let is_abandoned = tree.volume(uri.volume)?.active.iter().any(is_before);
    if let Some(scratch) = tree.scratch(uri.volume).filter(|_| is_abandoned) {
        // The guest that wrote has died with the host. One that was suspended had no claim.
        let again = !scratch.ended;
        tree.empty_scratch(uri.volume, again)?;
    }
    let begins = needed == Mode::ReadWrite && open != Some(Mode::ReadWrite);
    let is_kept = tree.scratch(uri.volume).is_none();
    if begins && is_kept {
        tree.make_writable(uri.volume)?;
    } else if begins {
        tree.make_scratch(uri.volume)?;
    }
    let images = tree.datapath_images(uri.volume)?;
    let mut base = None;
    let mut written = None;
    if begins && is_kept {
        // A daemon that died: whether its last writes have all come to the file is nobody's to say.
        let is_unclean = tree.volume(uri.volume)?.active.iter().any(|claim| claim.mode == Mode::ReadWrite);
        base = Some(if domain.is_migration() && !is_unclean { tree.base(&images) } else { Base::Unknown });
        written = Some((tree.volume(uri.volume)?.node, None));
    }
    let claim = Activation { host: this, boot_id, mode: needed.max(open.unwrap_or(needed)) };
    set_claim(&mut tree, uri.volume, this, Some(claim), written)?;
    let activated = block_on(attachment.activate(domain, mode, &images, base));
    let claimed = follow(&mut tree, uri.volume, host, &mut attachment);
    match activated {
        Err(first) => Err(first.undone(claimed)),
        Ok(()) => claimed,
    }
}

/// Gives a domain that is active the volume's block device: see [`Attachment::open_device`].
///
/// # Errors
///
/// As [`Attachment::open_device`].
pub fn open_device(host: &Host, uri: VolumeUri, domain: &Domain) -> Result<()> {
    match Attachment::lock_existing(host, uri.volume)? {
        Some(mut attachment) => attachment.open_device(domain),
        None => Err(Error::NotActive { volume: uri.volume.to_string() }),
    }
}

/// Passes on what the kernel holds back of what a domain wrote to the volume's block device, before a mirror of it ends.
///
/// # Errors
///
/// As [`Attachment::write_device_back`].
pub fn write_device_back(host: &Host, uri: VolumeUri, domain: &Domain) -> Result<()> {
    match Attachment::lock_existing(host, uri.volume)? {
        Some(mut attachment) => attachment.write_device_back(domain),
        None => Ok(()),
    }
}

/// Deactivates a domain; whatever is not there is deactivated already: the domain, the volume, its SR.
///
/// # Errors
///
/// When what was written could not be flushed, or the daemon does not answer; see [`Attachment::deactivate`].
/// [`Error::ImportBroken`], once, when a migration from SMAPIv1 lost writes; the domain is deactivated then.
pub fn deactivate(host: &Host, uri: VolumeUri, domain: &Domain) -> Result<()> {
    let tree = lock_tree(host, uri)?;
    let volume = tree.as_ref().and_then(|tree| tree.tree.volumes.get(&uri.volume));
    let is_import = volume.is_some_and(|volume| volume.importing.is_some());
    let mut broken = None;
    with_attachment(host, uri, tree, |attachment| {
        let deactivated = block_on(attachment.deactivate(domain));
        broken = attachment.take_import_failure();
        deactivated
    })?;
    match broken.filter(|_| is_import) {
        Some(reason) => Err(Error::ImportBroken { volume: uri.volume.to_string(), reason }),
        None => Ok(()),
    }
}

/// Lets a migration from SMAPIv1 write to an active volume, by a process that this executable is with `arguments`, and
/// gives the socket at which that takes connections. A volume that lies on another has the rest of its data elsewhere
/// until it is composed; until then no guest activates it.
///
/// # Errors
///
/// As [`Attachment::import`]; else the volume's record cannot be written.
pub fn import(host: &Host, uri: VolumeUri, domain: &Domain, arguments: &[OsString]) -> Result<PathBuf> {
    let mut tree = Sr::attached(host, uri.sr)?.lock(host, uri.volume)?;
    let volume = tree.volume(uri.volume)?;
    let is_overlay = tree.tree.node(volume.node)?.parent.is_some();
    let Some(mut attachment) = Attachment::lock_existing(host, uri.volume)? else {
        return Err(Error::NotActive { volume: uri.volume.to_string() });
    };
    let socket = attachment.import(domain, arguments)?;
    let importing = attachment.importer().filter(|_| is_overlay).cloned();
    if importing.is_some() && importing != volume.importing {
        let mut after = tree.tree.clone();
        after.volume_mut(uri.volume)?.importing = importing;
        tree.commit(after)?;
    }
    Ok(socket)
}

/// Detaches a domain, active or not; whatever is not there is detached already. An SR that cannot be read does not
/// keep its daemons running; a claim that then stays in it is worth nothing to this host.
///
/// # Errors
///
/// Only when the daemon's process does not end, or a lock is held by another for too long.
pub fn detach(host: &Host, uri: VolumeUri, domain: &Domain) -> Result<()> {
    let tree = match lock_tree(host, uri) {
        Err(error @ Error::Timeout { .. }) => return Err(error),
        Err(error) => {
            tracing::error!(volume = %uri, error = error.chain(), "detaching a volume whose tree cannot be read");
            None
        }
        Ok(tree) => tree,
    };
    let merges = tree.as_ref().filter(|tree| tree.has_merges()).map(|tree| tree.sr().clone());
    with_attachment(host, uri, tree, |attachment| block_on(attachment.detach(domain)))?;
    // They may have waited for this.
    if let Some(sr) = merges {
        gc::start(host, &sr);
    }
    Ok(())
}

/// Makes this host's claim on a volume say what is open here, which is nothing after the host was booted. What a guest
/// wrote that died with the host, and was to be thrown away, is gone then.
///
/// # Errors
///
/// [`Error::VolumeDoesNotExist`]; [`Error::ActivatedOnAnotherHost`] when the volume is open here without a claim, and
/// another host's claim forbids that.
pub fn reclaim(host: &Host, sr: &Sr, volume: VolumeKey) -> Result<()> {
    let mut tree = sr.lock(host, volume)?;
    let (this, boot_id) = (host.uuid()?, host.boot_id()?);
    let open = Attachment::lock_existing(host, volume)?.and_then(|attachment| attachment.open_mode());
    if let Some(mode) = open {
        refuse_for_others(&tree.tree, volume, this, mode)?;
    }
    let is_before = |claim: &Activation| claim.host == this && claim.boot_id != boot_id;
    let is_abandoned = open.is_none() && tree.volume(volume)?.active.iter().any(is_before);
    if let Some(scratch) = tree.scratch(volume).filter(|_| is_abandoned) {
        let again = !scratch.ended;
        tree.empty_scratch(volume, again)?;
    }
    with_attachment(host, VolumeUri { sr: sr.record.uuid, volume }, Some(tree), |_| Ok(()))
}

/// Deactivates and detaches a domain: nothing of it stays, and the second is done even when the first fails.
///
/// # Errors
///
/// As [`deactivate`] and [`detach`], the first that fails.
pub fn release(host: &Host, uri: VolumeUri, domain: &Domain) -> Result<()> {
    let deactivated = deactivate(host, uri, domain);
    deactivated.and(detach(host, uri, domain))
}

/// Locks the tree of a volume; `None` when the volume, or its SR, is not there.
fn lock_tree(host: &Host, uri: VolumeUri) -> Result<Option<LockedTree>> {
    match Sr::attached(host, uri.sr).and_then(|sr| sr.lock(host, uri.volume)) {
        Ok(tree) => Ok(Some(tree)),
        Err(Error::SrNotAttached(_) | Error::VolumeDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Closes something of a volume, and then takes back what of this host's claim has no open graph behind it.
fn with_attachment(
    host: &Host,
    uri: VolumeUri,
    mut tree: Option<LockedTree>,
    close: impl FnOnce(&mut Attachment) -> Result<()>,
) -> Result<()> {
    let Some(mut attachment) = Attachment::lock_existing(host, uri.volume)? else {
        return match &mut tree {
            Some(tree) => {
                set_claim(tree, uri.volume, host.uuid()?, None, None)?;
                end_scratch(tree, uri.volume)
            }
            None => Ok(()),
        };
    };
    let closed = close(&mut attachment);
    let claimed = match &mut tree {
        Some(tree) => follow(tree, uri.volume, host, &mut attachment).and_then(|()| end_scratch(tree, uri.volume)),
        None => Ok(()),
    };
    closed.and(claimed)
}

/// Throws away what was written to a volume that was closed meanwhile, once nobody has it open any more.
fn end_scratch(tree: &mut LockedTree, volume: VolumeKey) -> Result<()> {
    let is_ended = tree.scratch(volume).is_some_and(|scratch| scratch.ended);
    if is_ended && tree.volume(volume)?.active.is_empty() { tree.empty_scratch(volume, false) } else { Ok(()) }
}

/// Refuses a mode that another host's claim forbids.
fn refuse_for_others(tree: &Tree, volume: VolumeKey, this: Uuid, mode: Mode) -> Result<()> {
    let mut others = tree.volume(volume)?.active.iter().filter(|claim| claim.host != this);
    match others.find(|claim| claim.mode.max(mode) == Mode::ReadWrite) {
        Some(claim) => Err(Error::ActivatedOnAnotherHost { volume: volume.to_string(), host: claim.host }),
        None => Ok(()),
    }
}

/// Makes this host's claim say what is open on it, and names what was closed.
fn follow(tree: &mut LockedTree, volume: VolumeKey, host: &Host, attachment: &mut Attachment) -> Result<()> {
    let this = host.uuid()?;
    let boot_id = host.boot_id()?;
    let claim = attachment.open_mode().map(|mode| Activation { host: this, boot_id, mode });
    let closed = attachment.take_closed().map(|(node, content)| (node, Some(content)));
    match set_claim(tree, volume, this, claim, closed) {
        // Nothing depends on a name, and without one the record may not grow.
        Err(Error::NoSpace { .. }) if closed.is_some() => set_claim(tree, volume, this, claim, None),
        result => result,
    }
}

/// Replaces this host's claim on a volume and, where `named` says so, the name of what the volume's node holds; what
/// stands already is not written again.
fn set_claim(
    tree: &mut LockedTree,
    volume: VolumeKey,
    this: Uuid,
    claim: Option<Activation>,
    named: Option<(NodeId, Option<ContentId>)>,
) -> Result<()> {
    let current = tree.volume(volume)?.active.iter().find(|active| active.host == this).copied();
    let mut after = tree.tree.clone();
    let found = after.volume_mut(volume)?;
    if current != claim {
        found.active.retain(|active| active.host != this);
        found.active.extend(claim);
    }
    if let Some((node, content)) = named.filter(|(node, _)| *node == found.node)
        && let Some(node) = after.nodes.get_mut(&node)
    {
        node.content = content;
    }
    match claim {
        _ if after == tree.tree => Ok(()),
        // One that a power cut brings back claims too much, which does no harm; the downtime of a migration is saved a
        // sync.
        None => tree.commit_soon(after),
        Some(_) => tree.commit(after),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Volume;

    fn tree_with(claims: &[(Uuid, Mode)]) -> (Tree, VolumeKey) {
        let key = VolumeKey::random();
        let active = claims.iter().map(|(host, mode)| Activation { host: *host, boot_id: Uuid::nil(), mode: *mode });
        let volume = Volume { active: active.collect(), ..Volume::new(String::new(), String::new()) };
        (Tree::of_one(key, volume, 1 << 20), key)
    }

    #[test]
    fn many_hosts_may_read_or_one_may_write() {
        let (this, other) = (Uuid::new_v4(), Uuid::new_v4());
        for (theirs, ours, allowed) in [
            (Mode::ReadOnly, Mode::ReadOnly, true),
            (Mode::ReadOnly, Mode::ReadWrite, false),
            (Mode::ReadWrite, Mode::ReadOnly, false),
            (Mode::ReadWrite, Mode::ReadWrite, false),
        ] {
            let (tree, key) = tree_with(&[(this, Mode::ReadWrite), (other, theirs)]);
            match refuse_for_others(&tree, key, this, ours) {
                Ok(()) => assert!(allowed, "{theirs:?} {ours:?}"),
                Err(Error::ActivatedOnAnotherHost { host, .. }) => assert!(!allowed && host == other),
                Err(error) => panic!("{error}"),
            }
        }
    }
}
