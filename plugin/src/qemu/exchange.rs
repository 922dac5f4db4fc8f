//! Exchanging nodes in the middle of an open chain for a file that is opened anew: its tables have changed since.
//!
//! ```text
//!     q above            q above            q above            q above
//!        │                  │                  │                  │
//!     q gone             r fresh            r fresh            q fresh
//!        │         ──►      │         ──►      │         ──►      │
//!     q gone, …          q below            q below            q below
//!        │                                  (q fresh added)
//!     q below
//! ```
//!
//! The name of a node is what its file is known by, and the old node has it until it is gone. So the file is opened under
//! another name first, and then again under its own. A guest reads the same at every moment. Each [`Step`] may be done
//! again, whatever of it was done before.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Image;
use super::graph::{self, Layer};
use super::qmp::Client;
use crate::error::{Error, Result};
use crate::id::NodeId;
use crate::store::Mode;

/// What is exchanged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exchange {
    /// The node that lies on those that go.
    pub above: NodeId,
    /// The nodes that go, from the upper one down.
    pub gone: Vec<NodeId>,
    /// The file that is opened instead.
    pub fresh: Image,
    /// The node that it lies on.
    pub below: Option<NodeId>,
    /// What is done next.
    pub step: Step,
}

/// A step of an [`Exchange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The file is opened under another name, and put in the old nodes' place.
    Substitute,
    /// The old nodes are removed, and the file is opened under its own name.
    Replace,
    /// The node with that name is put in its place, and the other one removed.
    Link,
}

impl Exchange {
    /// Tells whether a node of the chain is still there afterwards.
    pub fn keeps(&self, node: NodeId) -> bool {
        node == self.fresh.node || !self.gone.contains(&node)
    }

    /// Does the next step, and gives the one after it. `mode` is how the node above is open.
    ///
    /// # Errors
    ///
    /// When the daemon refuses or does not answer. The chain reads as before, and the step may be done again.
    pub async fn carry_out(&self, client: &Client, mode: Mode) -> Result<Option<Step>> {
        let own = Layer::own(self.fresh.node);
        let other = Layer::substitute(self.fresh.node);
        match self.step {
            Step::Substitute => {
                self.add(client, &other).await?;
                graph::relink(client, self.above, mode, Some(&other.format)).await?;
                Ok(Some(Step::Replace))
            }
            Step::Replace => {
                for node in &self.gone {
                    graph::remove_layer(client, &Layer::own(*node)).await?;
                }
                self.add(client, &own).await?;
                Ok(Some(Step::Link))
            }
            Step::Link => {
                graph::relink(client, self.above, mode, Some(&own.format)).await?;
                graph::remove_layer(client, &other).await?;
                Ok(None)
            }
        }
    }

    /// Opens the file under the names given, as far as it is not.
    async fn add(&self, client: &Client, layer: &Layer) -> Result<()> {
        let present = graph::nodes(client).await?;
        let commands = graph::layer_commands(&self.fresh, layer, self.below)?;
        let missing: Vec<(&'static str, Value)> = [&layer.file, &layer.format]
            .into_iter()
            .zip(commands)
            .filter(|(name, _)| !present.contains(name))
            .map(|(_, command)| command)
            .collect();
        match missing.as_slice() {
            [] => Ok(()),
            // The tables that it has read are older than those of the file below it, if they are of another life.
            [_] if present.contains(&layer.format) => {
                Err(Error::Internal(format!("node {} is open without its file", layer.format)))
            }
            _ => graph::carry_out(client, missing).await,
        }
    }
}
