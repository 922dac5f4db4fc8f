//! Exchanging nodes of an open chain, for files whose tables have changed since they were opened.

use super::Attachment;
use super::state::Phase;
use crate::error::{Error, Result};
use crate::id::NodeId;
use crate::qemu::exchange::{Exchange, Step};
use crate::qemu::qmp::Client;
use crate::qemu::{Image, graph};
use crate::store::Mode;

impl Attachment {
    /// Gives the nodes that are open, top first, where nothing is being done with them. Nothing where the daemon is not
    /// known to have just these.
    pub fn settled_nodes(&self) -> Option<&[NodeId]> {
        let open = self.state.open.as_ref()?;
        let is_settled = open.phase == Phase::Open && open.overlay.is_none() && open.exchange.is_none();
        (is_settled && self.trouble.is_none()).then_some(&open.nodes)
    }

    /// Opens a file of the chain anew, in place of itself and others right above or below it, which go. Clients do not
    /// notice: it reads as these together.
    ///
    /// # Errors
    ///
    /// When `gone` is not what lies in a row in the middle of the chain, or the daemon refuses or does not answer: whoever
    /// locks the attachment next goes on with it then.
    pub async fn exchange(&mut self, gone: &[NodeId], fresh: &Image) -> Result<()> {
        self.ready()?;
        let client = self.client().await?;
        self.learn_top(&client).await?;
        let Some(open) = &mut self.state.open else { return Err(self.not_open()) };
        let at = open.nodes.windows(gone.len()).position(|nodes| nodes == gone);
        let above = at.and_then(|at| open.nodes.get(at.checked_sub(1)?)).copied();
        let (Some(at), Some(above), true) = (at, above, gone.contains(&fresh.node)) else {
            return Err(Error::Internal(format!("nodes {gone:?} are not in the middle of what is open")));
        };
        let below = open.nodes.get(at + gone.len()).copied();
        let (gone, fresh) = (gone.to_vec(), fresh.clone());
        open.exchange = Some(Exchange { above, gone, fresh, below, step: Step::Substitute });
        self.save()?;
        self.finish_exchange(&client).await
    }

    /// Makes the header of the top name another backing file, where the top is open for writing.
    ///
    /// # Errors
    ///
    /// When the daemon refuses or does not answer.
    pub async fn name_backing(&mut self, top: NodeId, backing: &str) -> Result<()> {
        self.ready()?;
        graph::name_backing(&self.client().await?, top, backing).await
    }

    /// Goes on with an exchange that was begun, if there is one.
    pub(super) async fn finish_exchange(&mut self, client: &Client) -> Result<()> {
        while let Some(open) = &mut self.state.open
            && let Some(exchange) = &mut open.exchange
        {
            let is_top = open.nodes.first() == Some(&exchange.above);
            let mode = if is_top { open.mode } else { Mode::ReadOnly };
            match exchange.carry_out(client, mode).await? {
                Some(next) => exchange.step = next,
                None => {
                    let done = exchange.clone();
                    open.nodes.retain(|node| done.keeps(*node));
                    open.exchange = None;
                }
            }
            self.save()?;
        }
        Ok(())
    }
}
