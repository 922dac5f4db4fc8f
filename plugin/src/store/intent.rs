//! Operations that reach beyond the record: begun by writing an intent down, ended by taking it out again.
//!
//! ```text
//!   overlay made ─► intent committed ─► daemon switched ─► change committed
//!        │                 │                   │
//!     garbage          not switched:        switched, or the daemon is gone:
//!                      rolled back          rolled forward
//! ```
//!
//! An overlay that was never written to reads as what it lies on, so that rolling forward is right whenever the
//! daemon is gone; while it runs, it is asked.

use std::collections::BTreeMap;

use super::header::Header;
use super::locked::LockedTree;
use super::tree::{Change, Intent, Mode, Tree};
use super::{content, plan};
use crate::attachment::Attachment;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::id::{ContentId, VolumeKey};
use crate::qemu::{self, Image, img};

/// What became of an operation that was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    Undone,
}

impl LockedTree {
    /// Carries out a change in which a volume moves that may be open for writing on this host: its guest goes on
    /// in the overlay from one moment to the next.
    ///
    /// # Errors
    ///
    /// When it cannot be done; nothing of it is left then.
    pub fn switch(&mut self, host: &Host, change: Change) -> Result<()> {
        self.refuse_second_intent()?;
        let Some(moves) = change.moves else {
            return Err(Error::Internal("a switch without a volume that moves".to_owned()));
        };
        // The guest of such a volume writes to a node of its own, and goes on with that.
        if self.scratch(moves.volume).is_some() {
            return self.apply(&change);
        }
        let attachment = Attachment::lock_existing(host, moves.volume)?;
        let Some(mut attachment) = attachment.filter(|found| found.open_mode() == Some(Mode::ReadWrite)) else {
            return self.apply(&change);
        };
        let overlay = self.image_of(&change, moves.overlay)?;
        self.prepare(&change)?;
        let added: Vec<VolumeKey> = change.volumes.keys().copied().collect();
        let begun = plan::with_intent(&self.tree, Intent::Switch(change)).and_then(|tree| self.commit(tree));
        if let Err(error) = begun {
            self.sweep(added);
            return Err(error);
        }
        let switched = qemu::block_on(attachment.snapshot(&overlay));
        // What it knows of the daemon may have become wrong.
        drop(attachment);
        let ended = match &switched {
            Ok(left) => self.end_switch(Outcome::Done, *left).map(|()| Outcome::Done),
            Err(_) => self.find_outcome(host, moves.volume, &overlay).and_then(|outcome| {
                self.end_switch(outcome, None)?;
                Ok(outcome)
            }),
        };
        if ended.is_err() {
            self.withhold_volumes();
        }
        match (switched, ended) {
            (_, Ok(Outcome::Done)) => Ok(()),
            (Err(first), Ok(Outcome::Undone)) => Err(first),
            (Err(first), Err(undo)) => Err(first.undone(Err(undo))),
            (Ok(_), Ok(Outcome::Undone)) => Err(Error::Internal("a switch that was made was undone".to_owned())),
            (Ok(_), Err(error)) => Err(error),
        }
    }

    /// Takes the volumes out of a switch that could not be ended. The caller is told that there is no snapshot, and so
    /// whoever ends the switch is not to make one.
    fn withhold_volumes(&mut self) {
        let Some(Intent::Switch(change)) = self.tree.intent.clone() else { return };
        let withheld = Change { volumes: BTreeMap::new(), ..change.clone() };
        match self.commit(Tree { intent: Some(Intent::Switch(withheld)), ..self.tree.clone() }) {
            Ok(()) => self.sweep(change.volumes.into_keys()),
            Err(error) => tracing::warn!(error = error.chain(), "a snapshot that failed may be listed later"),
        }
    }

    /// Grows the node of a volume that nobody has open, and that nothing lies on.
    ///
    /// # Errors
    ///
    /// When it cannot be grown; it then has its old size, or its new one if only the last step failed and is done
    /// by the next call.
    pub fn grow(&mut self, key: VolumeKey, virtual_size: u64) -> Result<()> {
        let image = self.checked_image(self.tree.volume_with_data(key)?.node)?;
        self.begin_resize(key, virtual_size)?;
        let grown = img::resize(&image.path, virtual_size, Some(&self.lock));
        let ended = self.end_resize();
        grown.and(ended)
    }

    /// Grows the node of a volume that is open for writing on this host.
    ///
    /// # Errors
    ///
    /// [`Error::VolumeInUse`] while a client is connected to its export, or while what it writes is thrown away; else as [`Self::grow`].
    pub fn grow_live(&mut self, host: &Host, key: VolumeKey, virtual_size: u64) -> Result<()> {
        self.refuse_scratch(key)?;
        let attachment = Attachment::lock_existing(host, key)?;
        let Some(mut attachment) = attachment.filter(|found| found.open_mode().is_some()) else {
            return self.grow(key, virtual_size);
        };
        self.begin_resize(key, virtual_size)?;
        let grown = qemu::block_on(attachment.resize(virtual_size));
        let ended = self.end_resize();
        grown.and(ended)
    }

    /// Finishes an operation that a killed call left. One on a volume that another host has is left to that host,
    /// whose daemon knows how far it came.
    ///
    /// # Errors
    ///
    /// When it cannot be finished now: the daemon does not answer, or the record cannot be written.
    pub(super) fn finish(&mut self, host: &Host) -> Result<()> {
        let Some(intent) = self.tree.intent.clone() else {
            return Ok(());
        };
        let (Some(volume), false) = (intent.volume(), matches!(intent, Intent::Relink { .. })) else {
            return self.finish_relink(host);
        };
        let this = host.uuid()?;
        if self.volume(volume)?.active.iter().any(|activation| activation.host != this) {
            return Ok(());
        }
        tracing::info!(tree = %self.id, %volume, "finishing what a killed call began");
        match intent {
            Intent::Compose { volume, parent, onto } => self.finish_compose(host, volume, parent, onto),
            Intent::Switch(change) => {
                let Some(moves) = change.moves else {
                    return Err(Error::Internal("a switch without a volume that moves".to_owned()));
                };
                let overlay = self.image_of(&change, moves.overlay)?;
                let outcome = self.find_outcome(host, volume, &overlay)?;
                self.end_switch(outcome, None)
            }
            Intent::Resize { .. } => {
                if let Some(attachment) = Attachment::lock_existing(host, volume)? {
                    // Answered once the daemon is through with what it was told before.
                    qemu::block_on(attachment.top())?;
                }
                self.end_resize()
            }
            Intent::Relink { .. } => self.finish_relink(host),
        }
    }

    /// Refuses an operation that needs an intent while there is one, which only another host can finish.
    pub(super) fn refuse_second_intent(&self) -> Result<()> {
        let Some(volume) = self.tree.intent.as_ref().and_then(Intent::volume) else {
            return Ok(());
        };
        match self.volume(volume)?.active.first() {
            Some(holder) => Err(Error::ActivatedOnAnotherHost { volume: volume.to_string(), host: holder.host }),
            None => Err(Error::Internal("an operation was begun before another was finished".to_owned())),
        }
    }

    /// Finds whether the daemon was switched to an overlay; one that runs and was not lets go of the overlay.
    fn find_outcome(&self, host: &Host, volume: VolumeKey, overlay: &Image) -> Result<Outcome> {
        let attachment = Attachment::lock_existing(host, volume)?;
        let Some(mut attachment) = attachment.filter(|found| found.open_mode().is_some()) else {
            return Ok(Outcome::Done);
        };
        qemu::block_on(async {
            match attachment.top().await? {
                Some(top) if top == overlay.node => Ok(Outcome::Done),
                Some(_) => attachment.drop_unused_overlay(overlay).await.map(|()| Outcome::Undone),
                None => Err(Error::Internal(format!("volume {volume} is open and has no export"))),
            }
        })
    }

    /// Ends a switch whose outcome is known. `left` names what is in the node that was written to before, where the one
    /// that switched the daemon saw to it that this is all it was told to name.
    fn end_switch(&mut self, outcome: Outcome, left: Option<ContentId>) -> Result<()> {
        let Some(Intent::Switch(change)) = self.tree.intent.clone() else {
            return Ok(());
        };
        match outcome {
            Outcome::Done => {
                for key in change.volumes.keys() {
                    self.sr().link(*key, self.id)?;
                }
                self.sr().sync_links()?;
                let mut after = plan::rolled_forward(&self.tree);
                content::left(&mut after, &change, left.unwrap_or_else(ContentId::random));
                self.commit(after)
            }
            Outcome::Undone => {
                self.commit(plan::rolled_back(&self.tree))?;
                self.sweep(change.volumes.into_keys());
                Ok(())
            }
        }
    }

    /// Writes down that a volume's node is being grown.
    fn begin_resize(&mut self, key: VolumeKey, virtual_size: u64) -> Result<()> {
        self.refuse_second_intent()?;
        let node = self.volume(key)?.node;
        self.commit(plan::with_intent(&self.tree, Intent::Resize { volume: key, node, virtual_size })?)
    }

    /// Ends a resize as far as it came, which the file's header tells.
    fn end_resize(&mut self) -> Result<()> {
        let Some(Intent::Resize { node, virtual_size, .. }) = self.tree.intent else {
            return Ok(());
        };
        let header = Header::read(&self.image(node)?.path)?;
        let grown = header.virtual_size == virtual_size;
        self.commit(if grown { plan::rolled_forward(&self.tree) } else { plan::rolled_back(&self.tree) })
    }
}
