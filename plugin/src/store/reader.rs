//! Who has nodes open that are to be merged, and how a guest goes on with them.
//!
//! A volume's storage daemon has the tables of the files below its top in memory, as they were when it read them, and
//! nobody tells it of what a merge does to a file. It reads the same all the time:
//!
//! - going down, N's tables change only where C has something, and there nobody reads N;
//! - going up, what the daemon knows of C's tables it finds below, in N, which does not change. What it reads of them
//!   later leads to new places in the file; so that these are not beyond what it takes for the file's end, the file is
//!   made longer first, and opened anew.
//!
//! When the two are one, the daemon opens the file that is left anew, in place of both ([`crate::qemu::exchange`]). What
//! the guest itself writes to can have no part in this: where that is to be merged the volume is given an overlay first,
//! as by a snapshot, and what was written until then is merged like any other node. No job ever runs in a guest's daemon.

use std::fs::OpenOptions;

use super::coalesce::readers;
use super::extent;
use super::header;
use super::locked::{LockedTree, file_name, node_path};
use super::plan;
use super::tree::{Intent, Mode};
use crate::attachment::Attachment;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::id::{NodeId, VolumeKey};
use crate::lock::FileLock;
use crate::mirror::{self, MirrorRecord};
use crate::qemu::block_on;
use crate::store::header::Header;

/// What a file may grow by beyond the data that it takes, in bytes: tables, and what is not used in full.
const GROWTH: u64 = 64 << 20;

/// A volume of this host that alone has both nodes open, below the node that its guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Live {
    /// The volume.
    pub volume: VolumeKey,
}

/// Who has nodes open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reader {
    /// Nobody, on whatever host.
    Nobody,
    /// One volume on this host, which can go on with the two as one.
    Here(Live),
    /// One volume on this host, whose guest writes to the upper one.
    Writes(VolumeKey),
    /// Somebody because of whom they stay, as is said.
    Forbids(String),
}

/// Holds off mirrors of a volume that are about to be started.
#[derive(Debug)]
pub(super) struct NoMirror(Option<FileLock>);

impl Drop for NoMirror {
    fn drop(&mut self) {
        if let Some(lock) = &self.0 {
            drop(std::fs::remove_file(lock.path()));
        }
    }
}

impl LockedTree {
    /// Tells who has a node open, with what is below it.
    pub(super) fn reader(&self, host: &Host, upper: NodeId) -> Result<Reader> {
        let this = host.uuid()?;
        let mut open = Vec::new();
        for key in readers(&self.tree, upper) {
            if let Some(claim) = self.volume(key)?.active.iter().find(|claim| claim.host != this) {
                return Ok(Reader::Forbids(format!("volume {key} is active on host {}", claim.host)));
            }
            // Nothing is open behind a claim of this host: it is worth nothing, of whatever boot.
            let attachment = Attachment::lock_existing(host, key)?;
            open.extend(attachment.filter(|attachment| attachment.open_mode().is_some()));
        }
        let attachment = match open.as_slice() {
            [] => return Ok(Reader::Nobody),
            [attachment] => attachment,
            [one, other, ..] => {
                let (one, other) = (one.uri().volume, other.uri().volume);
                return Ok(Reader::Forbids(format!("volumes {one} and {other} are active on this host")));
            }
        };
        let volume = attachment.uri().volume;
        if let Some(reason) = self.refusal(host, volume, attachment)? {
            return Ok(Reader::Forbids(format!("volume {volume} is active on this host{reason}")));
        }
        Ok(if self.volume(volume)?.node == upper { Reader::Writes(volume) } else { Reader::Here(Live { volume }) })
    }

    /// Says why a volume that is open cannot go on with other nodes.
    fn refusal(&self, host: &Host, key: VolumeKey, attachment: &Attachment) -> Result<Option<&'static str>> {
        let volume = self.volume(key)?;
        let is_migrated =
            attachment.domains().iter().any(|(domain, usage)| usage.is_active() && domain.is_migration());
        let is_imported = volume.importing.is_some() || attachment.importer().is_some();
        let reason = if !host.settings()?.gc_live {
            ""
        } else if self.tree.scratch.contains_key(&key) {
            ", and what is written to it is thrown away"
        } else if is_mirrored(host, key)? {
            ", and being mirrored or copied"
        } else if is_migrated || is_imported {
            ", for a migration"
        } else if attachment.open_mode() == Some(Mode::ReadOnly) {
            ", where it is only read"
        } else if attachment.settled_nodes() != Some(&self.tree.chain(volume.node)) {
            ", and its storage daemon has not just its nodes open"
        } else {
            return Ok(None);
        };
        Ok(Some(reason))
    }

    /// Holds off mirrors of a volume as long as what is given lives; `None` when one is being started or goes on.
    pub(super) fn no_mirror_starts(&self, host: &Host, live: Option<Live>) -> Result<Option<NoMirror>> {
        let Some(Live { volume }) = live else { return Ok(Some(NoMirror(None))) };
        host.make_runtime_dir(&host.runtime_dir().join("mirrors"))?;
        // Whoever has it may wait for the tree's lock.
        let Some(lock) = FileLock::try_acquire(&mirror::start_lock(host, volume))? else { return Ok(None) };
        let held = NoMirror(Some(lock));
        Ok(if is_mirrored(host, volume)? { None } else { Some(held) })
    }

    /// Sees that what a volume's guest has written is in its file's tables.
    pub(super) fn flush_reader(&self, host: &Host, volume: VolumeKey) -> Result<()> {
        match Attachment::lock_existing(host, volume)? {
            Some(mut attachment) => block_on(attachment.flush_live()),
            None => Ok(()),
        }
    }

    /// Makes a file longer that is about to take data while a volume has it open, and sees that the volume's daemon knows.
    pub(super) fn prepare_growth(&self, host: &Host, live: Live, node: NodeId, bytes: u64) -> Result<()> {
        let image = self.checked_image(node)?;
        // Tables take a thousandth of the data, or of what may be addressed where that is known by sectors.
        let length = extent::used(&image.path)? + bytes + image.virtual_size / 512 + GROWTH;
        let file = OpenOptions::new().write(true).open(&image.path).map_err(Error::on("opening", &image.path))?;
        let metadata = file.metadata().map_err(Error::on("reading the state of", &image.path))?;
        if metadata.len() < length {
            file.set_len(length).map_err(Error::on("growing", &image.path))?;
        }
        let Some(mut attachment) = Attachment::lock_existing(host, live.volume)? else { return Ok(()) };
        if attachment.open_mode().is_some() {
            block_on(attachment.exchange(&[node], &image))?;
        }
        Ok(())
    }

    /// Makes the headers of merged nodes say what the record says, and the volume that has them open read the one that is
    /// left.
    pub(super) fn finish_relink(&mut self, host: &Host) -> Result<()> {
        let Some(Intent::Relink { nodes, open }) = self.tree.intent.clone() else { return Ok(()) };
        let mut attachment = match open {
            Some(open) => Attachment::lock_existing(host, open.volume)?.filter(|found| found.open_mode().is_some()),
            None => None,
        };
        let this = host.uuid()?;
        let is_elsewhere = match open {
            Some(open) => self.volume(open.volume)?.active.iter().any(|claim| claim.host != this),
            None => false,
        };
        let top = open.map(|open| self.volume(open.volume).map(|volume| volume.node)).transpose()?;
        for node in nodes {
            let parent = self.tree.node(node)?.parent.map(file_name);
            let path = node_path(&self.directory, node);
            if Header::read(&path)?.check_backing(parent.as_deref()).is_ok() {
                continue;
            }
            match (&mut attachment, &parent) {
                (Some(attachment), Some(parent)) if top == Some(node) => {
                    block_on(attachment.name_backing(node, parent))?;
                }
                // Its daemon knows the header, and only that of what it writes to.
                _ if is_elsewhere && top == Some(node) => {}
                // Somebody may read it; a daemon that was killed keeps QEMU's locks for a moment.
                _ if open.is_some() => header::rename_backing(&path, parent.as_deref())?,
                _ => self.relink_header(node, &self.lock)?,
            }
        }
        if is_elsewhere {
            return Ok(());
        }
        if let (Some(open), Some(attachment)) = (open, &mut attachment) {
            let known = attachment.settled_nodes().unwrap_or_default();
            let is_merged = |node: &&NodeId| [open.kept, open.dropped].contains(node);
            let gone: Vec<NodeId> = known.iter().filter(is_merged).copied().collect();
            if gone.contains(&open.dropped) {
                let fresh = self.checked_image(open.kept)?;
                block_on(attachment.exchange(&gone, &fresh))?;
            }
        }
        drop(attachment);
        self.commit(plan::rolled_back(&self.tree))?;
        self.sweep([]);
        Ok(())
    }
}

/// Tells whether a volume is the source of a mirror or copy that goes on, or has left something behind.
fn is_mirrored(host: &Host, volume: VolumeKey) -> Result<bool> {
    Ok(MirrorRecord::of_volume(host, volume)?.iter().any(|record| !record.phase.is_terminal()))
}
