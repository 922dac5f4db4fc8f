//! Changes to a volume while it is open: under its clients, or between them.

use super::Attachment;
use crate::error::{Error, Result};
use crate::id::ContentId;
use crate::qemu::{Image, graph};
use crate::store::Mode;

impl Attachment {
    /// Puts an overlay, whose file is there and empty, on the top of what is open; clients go on without noticing, and
    /// from then on write to the overlay. Does nothing when it is on top already.
    ///
    /// Gives the name of what was on top, where clients were told of a session and it was ended for this: nobody is
    /// connected then, and the next session begins.
    ///
    /// # Errors
    ///
    /// When nothing is open, or the daemon refuses, which it does while a block job runs; nothing has changed then.
    /// After a time-out [`Self::top`] tells.
    pub async fn snapshot(&mut self, overlay: &Image) -> Result<Option<ContentId>> {
        self.ready()?;
        let client = self.client().await?;
        self.learn_top(&client).await?;
        let Some(open) = &self.state.open else { return Err(self.not_open()) };
        let mode = open.mode;
        let top = match open.nodes.first() {
            Some(top) if *top == overlay.node => return Ok(None),
            Some(top) => *top,
            None => return Err(Error::Internal("an open chain without nodes".to_owned())),
        };
        let ended = self.end_session(&client).await?;
        if let Some(open) = &mut self.state.open {
            open.overlay = Some(overlay.node);
        }
        self.save()?;
        match graph::snapshot(&client, top, overlay, mode).await {
            Ok(()) => {}
            // Refused, so that everything is as it was. After any other error the next call finds out.
            Err(first) if first.is_refusal() && ended.is_some() => {
                let undone = async {
                    self.learn_top(&client).await?;
                    self.put_export_back(&client).await
                };
                return Err(first.undone(undone.await));
            }
            Err(error) => return Err(error),
        }
        if let Some(open) = &mut self.state.open {
            open.nodes.insert(0, overlay.node);
            open.overlay = None;
        }
        if ended.is_some() {
            self.go_on_after_end();
        }
        self.save()?;
        if ended.is_some() {
            self.put_export_back(&client).await?;
        }
        Ok(ended)
    }

    /// Removes what [`Self::snapshot`] opened for an overlay that did not become the top; nothing of it is fine too.
    ///
    /// # Errors
    ///
    /// When the overlay is on top.
    pub async fn drop_unused_overlay(&mut self, overlay: &Image) -> Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        self.ready()?;
        let client = self.client().await?;
        self.learn_top(&client).await?;
        graph::remove_overlay(&client, overlay.node).await
    }

    /// Writes what was written to an open volume down to its file, tables and all; clients do not notice. Nothing is to
    /// be done where nothing is open for writing.
    ///
    /// # Errors
    ///
    /// When the daemon does not answer or the flush fails.
    pub async fn flush_live(&mut self) -> Result<()> {
        if self.open_mode() != Some(Mode::ReadWrite) {
            return Ok(());
        }
        self.ready()?;
        let client = self.client().await?;
        self.learn_top(&client).await?;
        let Some(open) = &self.state.open else { return Ok(()) };
        let mut nodes = open.nodes.iter().copied();
        match nodes.next() {
            Some(top) => graph::flush(&client, top, nodes.next()).await,
            None => Ok(()),
        }
    }

    /// Gives the top a larger virtual size. The export is away for a moment, as it would not allow that.
    ///
    /// # Errors
    ///
    /// [`Error::VolumeInUse`] when a client is connected, who would not see the new size, or when the volume is open
    /// read-only; else nothing is open or the daemon refuses. The size is then as before.
    pub async fn resize(&mut self, bytes: u64) -> Result<()> {
        self.ready()?;
        let in_use = |volume: &str, reason: &str| {
            Err(Error::VolumeInUse { volume: volume.to_owned(), reason: reason.to_owned() })
        };
        let name = self.export_name();
        let client = self.client().await?;
        self.learn_top(&client).await?;
        let Some(open) = &self.state.open else { return Err(self.not_open()) };
        let Some(top) = open.nodes.first().copied() else { return Err(self.not_open()) };
        if open.mode == Mode::ReadOnly {
            return in_use(&name, "it is open read-only");
        }
        if !self.take_export_away(&client, false).await? {
            return in_use(&name, "a client is connected, which would not see the new size");
        }
        let resized = graph::resize(&client, top, bytes).await;
        self.put_export_back(&client).await?;
        resized
    }

    /// The error for a change to what is not open.
    pub(super) fn not_open(&self) -> Error {
        Error::Internal(format!("volume {} is not open on this host", self.state.volume))
    }
}
