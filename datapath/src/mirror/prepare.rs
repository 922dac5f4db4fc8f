//! What a mirror's supervisor finds out before it sends, and what it leaves known afterwards.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;

use plugin::error::{Error, Result};
use plugin::id::{ContentId, NodeId};
use plugin::mirror::{self, Announcement, Destination, Layer, Plan, Sessions};
use plugin::nbd::ExportInfo;
use plugin::qemu::qmp::Client;
use plugin::qemu::{Image, devices, graph};
use plugin::store::{LoadedTree, Sr};

use super::supervisor::Supervisor;

/// A node that is sent by a job of its own.
pub struct Inner {
    /// Its file.
    pub image: Image,
    /// The node that it lies on.
    pub parent: NodeId,
}

impl Inner {
    /// Gives the bytes that its file takes, about as many as there are to send.
    pub fn allocated(&self) -> u64 {
        fs::metadata(&self.image.path).map_or(0, |metadata| metadata.blocks() * 512)
    }
}

/// A session at the destination that this mirror has begun to write in.
#[derive(Clone, Copy)]
pub struct Begun {
    session: ContentId,
    /// What the session's content will be when everything was sent.
    content: Option<ContentId>,
}

impl Supervisor {
    /// Plans what is sent, and writes down that it is about to be: nothing may be sent before.
    ///
    /// # Errors
    ///
    /// When it cannot be written down. Whatever else goes wrong makes it a full mirror.
    pub(super) async fn prepare(&mut self, client: &Client, info: &ExportInfo) -> Result<()> {
        let (loaded, chain) = self.chain().unwrap_or_else(|error| {
            tracing::warn!(error = error.chain(), "nothing is known of the nodes of a mirror's source");
            (None, Vec::new())
        });
        let top = chain.first();
        let sessions = Sessions::lock(&self.host)?;
        let destination = Destination { description: info.description.as_deref(), size: info.size };
        let mut plan = match self.settings.difference {
            true => mirror::plan(&chain, destination, |session| sessions.find(session)),
            false => Plan::Full("the setting difference is off".to_owned()),
        };
        let announcement = info.description.as_deref().and_then(|text| text.parse::<Announcement>().ok());
        if let Some(Announcement { session, .. }) = announcement {
            let size = top.map_or(0, |top| top.virtual_size);
            sessions.begin(session, self.record.key, self.record.node, size)?;
            // Of a larger destination the end is neither sent nor known.
            let sends_all = !self.record.live && info.size == Some(size);
            let content = top.and_then(|top| top.content).filter(|_| sends_all);
            self.begun = Some(Begun { session, content });
        }
        drop(sessions);
        if let Plan::Difference { above, layers } = &plan {
            match opened(client, loaded.as_ref(), *above, layers).await {
                Ok(layers) => self.layers = layers,
                Err(error) => plan = Plan::Full(format!("the layers cannot be read apart: {}", error.chain())),
            }
        }
        tracing::info!(mirror = %self.record.key, ?plan, "what is sent");
        self.record.plan = Some(plan);
        Ok(())
    }

    /// Reads the tree of the source, and in it the chain that is sent.
    fn chain(&self) -> Result<(Option<LoadedTree>, Vec<Layer>)> {
        let loaded = Sr::attached(&self.host, self.record.sr)?.load(self.record.volume)?;
        let chain = mirror::layers(&loaded.tree, self.record.node)?;
        Ok((Some(loaded), chain))
    }

    /// Writes down that everything was sent, flushed. On failure the next mirror sends everything again.
    pub(super) fn remember(&self) {
        let Some(Begun { session, content: Some(content) }) = self.begun else { return };
        let remembered = || {
            let (_, chain) = self.chain()?;
            // What was read may have been written to if it is no longer called the same.
            if chain.first().and_then(|top| top.content) != Some(content) {
                return Ok(());
            }
            Sessions::lock(&self.host)?.complete(session, self.record.key, content)
        };
        if let Err(error) = remembered() {
            tracing::warn!(error = error.chain(), "what was sent could not be recorded");
        }
    }
}

/// Finds the files of layers, which the daemon has open, and so it has the node that they lie on.
async fn opened(
    client: &Client,
    loaded: Option<&LoadedTree>,
    above: NodeId,
    layers: &[NodeId],
) -> Result<Vec<Inner>> {
    let loaded = loaded.ok_or_else(|| Error::Internal("a plan without a tree".to_owned()))?;
    let open: BTreeSet<String> =
        devices::devices(client).await?.into_iter().filter_map(|device| device.name).collect();
    let mut parent = above;
    let mut found = Vec::with_capacity(layers.len());
    for node in layers {
        for name in [graph::node_name(parent), graph::node_name(*node)] {
            if !open.contains(&name) {
                let reason = format!("it has no node {name}");
                return Err(Error::Qemu { doing: "looking at the chain that is open".to_owned(), reason });
            }
        }
        found.push(Inner { image: loaded.checked_image(*node)?, parent });
        parent = *node;
    }
    Ok(found)
}
