//! Opening and closing the graph, with every step written down before it is done.

use super::Attachment;
use super::session::{Said, Session};
use super::state::{Open, Phase};
use crate::error::{Error, Result};
use crate::id::{ContentId, NodeId};
use crate::qemu::graph::{self, Export};
use crate::qemu::qmp::Client;
use crate::qemu::{self, Image};
use crate::store::Mode;

impl Attachment {
    /// Finishes what a killed call left half done: a graph that was being opened is closed, as nobody was told of it;
    /// one that was being closed is closed; an export that was away for a moment comes back; nodes that were being
    /// exchanged are.
    ///
    /// Where the daemon does not play along, that is kept in `trouble`, and whatever needs the graph fails with it.
    pub(super) fn settle(&mut self) {
        if self.state.open.as_ref().is_none_or(|open| open.phase == Phase::Open && open.exchange.is_none()) {
            return;
        }
        if let Err(error) = qemu::block_on(self.settle_graph()) {
            tracing::warn!(error = error.chain(), "what a killed call left could not be finished");
            self.trouble = Some(error);
        }
    }

    async fn settle_graph(&mut self) -> Result<()> {
        let client = self.client().await?;
        match self.state.open.as_ref().map(|open| open.phase) {
            Some(Phase::Opening | Phase::Removing) => {
                graph::close(&client).await?;
                self.state.open = None;
                self.save()
            }
            Some(Phase::Closing) => {
                self.finish_exchange(&client).await?;
                if let Err(error) = self.close_graph(&client).await {
                    // Kept with the domains it concerns, for whoever deactivates them.
                    tracing::error!(error = error.chain(), "closing what a killed call left open");
                }
                if self.state.open.is_some() {
                    Err(Error::Internal("it is still open".to_owned()))
                } else {
                    self.save()
                }
            }
            Some(Phase::Exporting) => {
                self.learn_top(&client).await?;
                self.put_export_back(&client).await?;
                self.finish_exchange(&client).await
            }
            Some(Phase::Open) => self.finish_exchange(&client).await,
            None => Ok(()),
        }
    }

    /// Fails when something that a killed call left could not be finished.
    pub(super) fn ready(&mut self) -> Result<()> {
        self.trouble.take().map_or(Ok(()), Err)
    }

    /// Opens a chain and exports it, for writing in a session. When it is refused nothing is open. That it is open is for
    /// the caller to write down, with whom it is for: until then nobody has been told.
    pub(super) async fn open_graph(
        &mut self,
        client: &Client,
        images: &[Image],
        mode: Mode,
        session: Option<Session>,
    ) -> Result<()> {
        let nodes = images.iter().map(|image| image.node).collect();
        let session = session.filter(|_| mode == Mode::ReadWrite);
        self.state.open = Some(Open { mode, nodes, overlay: None, exchange: None, session, phase: Phase::Opening });
        self.closed = None;
        self.save()?;
        let name = self.export_name();
        let announces = session.and_then(|session| session.announcement());
        let export = Export { name: &name, mode, announces };
        let mut opened = graph::open(client, images, &export).await;
        if opened.as_ref().is_err_and(Error::is_refusal) {
            // A call that was killed before its record was written may have left nodes.
            opened = match graph::close(client).await {
                Ok(()) => graph::open(client, images, &export).await,
                Err(error) => Err(error),
            };
        }
        if let Err(first) = opened {
            if !first.is_refusal() {
                // No answer: what became of it is found out by the next call.
                return Err(first);
            }
            if let Err(undo) = graph::close(client).await {
                return Err(first.undone(Err(undo)));
            }
            self.state.open = None;
            self.save()?;
            return Err(first);
        }
        if let Some(open) = &mut self.state.open {
            open.phase = Phase::Open;
        }
        Ok(())
    }

    /// Closes what is open: clients are cut off if they do not go, and what was written is flushed.
    ///
    /// A flush that fails is kept for every active domain that writes, and returned, but everything is closed all
    /// the same: nothing can be won by keeping it open. That it is closed is for the caller to write down.
    pub(super) async fn close_graph(&mut self, client: &Client) -> Result<()> {
        self.learn_top(client).await?;
        let Some(open) = self.state.open.clone() else { return graph::close(client).await };
        self.set_phase(Phase::Closing)?;
        self.end_device(true)?;
        graph::remove_export(client, true).await?;
        let flushed = match open.mode {
            Mode::ReadWrite => self.flush(client, &open).await,
            Mode::ReadOnly => Ok(()),
        };
        if flushed.as_ref().is_err_and(|error| !error.is_refusal()) {
            // No answer to the flush: the next call asks again.
            return flushed;
        }
        self.set_phase(Phase::Removing)?;
        graph::remove_nodes(client, &open.nodes).await?;
        self.state.open = None;
        self.closed = held_by(&open).filter(|_| flushed.is_ok());
        flushed
    }

    /// Makes a writable graph read-only for the domains that stay, once what was written is flushed. A client that
    /// is connected keeps it writable: the flush is then left to its end.
    pub(super) async fn downgrade_graph(&mut self, client: &Client) -> Result<()> {
        self.learn_top(client).await?;
        let Some(mut open) = self.state.open.clone() else { return Ok(()) };
        if !self.take_export_away(client, false).await? {
            return Ok(());
        }
        let flushed = self.flush(client, &open).await;
        self.closed = held_by(&open).filter(|_| flushed.is_ok());
        open.mode = Mode::ReadOnly;
        open.session = None;
        open.phase = Phase::Exporting;
        self.state.open = Some(open);
        self.save()?;
        self.put_export_back(client).await?;
        flushed
    }

    /// Flushes a writable graph whose export is gone, and keeps the failure for the domains that wrote.
    async fn flush(&mut self, client: &Client, open: &Open) -> Result<()> {
        let Some(top) = open.nodes.first() else { return Ok(()) };
        let Err(error) = graph::flush_and_freeze(client, *top, open.nodes.get(1).copied()).await else {
            return Ok(());
        };
        if !error.is_refusal() {
            return Err(error);
        }
        let reason = error.chain();
        let writers = self.state.domains.iter().filter(|(_, usage)| usage.mode() == Some(Mode::ReadWrite));
        let unflushed: Vec<_> = writers.map(|(domain, _)| (domain.clone(), reason.clone())).collect();
        self.state.unflushed.extend(unflushed);
        self.save()?;
        Err(error)
    }

    /// Takes the export away for a moment, until it is put back. False, with the export in place, when a client stays
    /// connected that is not cut off: only with `force` one is.
    pub(super) async fn take_export_away(&mut self, client: &Client, force: bool) -> Result<bool> {
        self.set_phase(Phase::Exporting)?;
        match graph::remove_export(client, force).await {
            Ok(()) => Ok(true),
            Err(Error::Qmp { .. }) => self.set_phase(Phase::Open).map(|()| false),
            Err(error) => Err(error),
        }
    }

    /// Adds the export again where it is missing, after a moment without it. What no longer holds is not said again.
    pub(super) async fn put_export_back(&mut self, client: &Client) -> Result<()> {
        let name = self.export_name();
        if let Some(open) = &mut self.state.open
            && let Some(top) = open.nodes.first()
            && !graph::is_exported(client).await?
        {
            if let Some(session) = open.session.as_mut().filter(|session| session.said == Said::Stale) {
                session.said = Said::Nothing;
            }
            let announces = open.session.and_then(|session| session.announcement());
            graph::add_export(client, *top, &Export { name: &name, mode: open.mode, announces }).await?;
        }
        self.set_phase(Phase::Open)
    }

    /// Finds out whether the overlay of a snapshot that was not recorded to its end is the top.
    pub(super) async fn learn_top(&mut self, client: &Client) -> Result<()> {
        let Some(overlay) = self.state.open.as_ref().and_then(|open| open.overlay) else { return Ok(()) };
        let switched = match self.exported_top(client).await? {
            Some(top) => top == overlay,
            None => graph::has_backing(client, overlay).await?,
        };
        if !switched {
            graph::remove_overlay(client, overlay).await?;
        }
        let mut is_away = false;
        if let Some(open) = &mut self.state.open {
            open.overlay = None;
            if switched {
                open.nodes.insert(0, overlay);
                is_away = open.phase == Phase::Exporting;
            }
        }
        if is_away {
            self.go_on_after_end();
        }
        self.save()
    }

    /// Writes down how far the graph is.
    pub(super) fn set_phase(&mut self, phase: Phase) -> Result<()> {
        if let Some(open) = &mut self.state.open {
            open.phase = phase;
        }
        self.save()
    }
}

/// Gives the top of what was open for writing, with the name of what it holds once it is flushed.
fn held_by(open: &Open) -> Option<(NodeId, ContentId)> {
    let session = open.session.filter(|_| open.mode == Mode::ReadWrite)?;
    Some((*open.nodes.first()?, session.token))
}
