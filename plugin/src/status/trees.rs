//! What is shown of an SR's trees, whatever the form: these are also the fields of `--json`.

use std::fs;
use std::os::unix::fs::MetadataExt;

use serde::Serialize;
use uuid::Uuid;

use crate::attachment::{Attachment, Use};
use crate::error::Result;
use crate::host::Host;
use crate::id::{MirrorKey, NodeId, SrUuid, TreeId, VolumeKey};
use crate::mirror::MirrorRecord;
use crate::store::{LoadedTree, Mode, Sr};

/// An SR and its trees.
#[derive(Debug, Serialize)]
pub struct Picture {
    /// The SR's uuid.
    pub sr: SrUuid,
    /// Its name.
    pub name: String,
    /// Its directory.
    pub path: String,
    /// Its trees, in the order of their uuids.
    pub trees: Vec<Tree>,
}

/// A tree.
#[derive(Debug, Serialize)]
pub struct Tree {
    /// The tree's uuid.
    pub tree: TreeId,
    /// Why it cannot be shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// An operation that was begun and is not ended, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unfinished: Option<String>,
    /// Two of its nodes that are being merged, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub merging: Option<String>,
    /// Nodes of its longest chain.
    pub depth: usize,
    /// Its nodes, each after its parent.
    pub nodes: Vec<Node>,
    /// Volumes without data: only what changed in them is known.
    pub destroyed: Vec<Volume>,
}

/// One image.
#[derive(Debug, Serialize)]
pub struct Node {
    /// The node's uuid.
    pub node: NodeId,
    /// The node below it.
    pub parent: Option<NodeId>,
    /// The size that a guest sees, in bytes.
    pub virtual_size: u64,
    /// What its file takes, in bytes.
    pub physical_size: u64,
    /// Whether no volume names it and others lie on it.
    pub hidden: bool,
    /// Whether it takes what a guest writes and is to be thrown away, and of which volume.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scratch_of: Option<VolumeKey>,
    /// The volume whose node it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume: Option<Volume>,
    /// What is wrong with its file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A volume.
#[derive(Debug, Serialize)]
pub struct Volume {
    /// The volume's uuid, xapi's key.
    pub volume: VolumeKey,
    /// Its name.
    pub name: String,
    /// Whether changed blocks are tracked.
    pub cbt: bool,
    /// Whether what a guest writes is thrown away.
    pub scratch: bool,
    /// Who has it active.
    pub active: Vec<Active>,
    /// Who uses it on this host, and how.
    pub domains: Vec<Domain>,
    /// Its mirrors that go on, on this host.
    pub mirrors: Vec<Mirror>,
}

/// A host that has a volume active.
#[derive(Debug, Serialize)]
pub struct Active {
    /// The host.
    pub host: Uuid,
    /// Whether it is this one.
    pub here: bool,
    /// `ro` or `rw`.
    pub mode: Mode,
}

/// A domain that uses a volume.
#[derive(Debug, Serialize)]
pub struct Domain {
    /// The domain.
    pub domain: String,
    /// `attached`, `ro` or `rw`.
    #[serde(rename = "use")]
    pub usage: Use,
}

/// A mirror that goes on.
#[derive(Debug, Serialize)]
pub struct Mirror {
    /// Its key.
    pub mirror: MirrorKey,
    /// How much of it is done, from 0 to 1.
    pub done: f64,
}

impl Picture {
    /// Looks at an SR as readers do: without a lock.
    ///
    /// # Errors
    ///
    /// When the SR cannot be listed, or the volume does not exist.
    pub fn of(host: &Host, sr: &Sr, volume: Option<VolumeKey>) -> Result<Self> {
        let here = Here::of(host);
        let trees = match volume {
            Some(key) => vec![tree_of(host, &here, &sr.load(key)?)],
            None => {
                let look = |id: TreeId| match sr.read_tree(id) {
                    Ok(Some(loaded)) => Some(tree_of(host, &here, &loaded)),
                    Ok(None) => None,
                    Err(error) => Some(Tree {
                        tree: id,
                        problem: Some(error.chain()),
                        unfinished: None,
                        merging: None,
                        depth: 0,
                        nodes: Vec::new(),
                        destroyed: Vec::new(),
                    }),
                };
                sr.tree_ids()?.into_iter().filter_map(look).collect()
            }
        };
        let path = sr.path.display().to_string();
        Ok(Self { sr: sr.record.uuid, name: sr.record.name.clone(), path, trees })
    }
}

/// What this host itself knows of volumes.
pub(super) struct Here {
    uuid: Option<Uuid>,
    /// Mirrors that go on.
    mirrors: Vec<MirrorRecord>,
}

impl Here {
    /// Looks at the host.
    pub(super) fn of(host: &Host) -> Self {
        let mut mirrors = MirrorRecord::all(host).unwrap_or_default();
        mirrors.retain(|record| record.is_running(host));
        Self { uuid: host.uuid().ok(), mirrors }
    }
}

/// Describes a tree.
pub(super) fn tree_of(host: &Host, here: &Here, loaded: &LoadedTree) -> Tree {
    let tree = &loaded.tree;
    let mut paths: Vec<Vec<NodeId>> = tree.nodes.keys().map(|id| tree.chain(*id)).collect();
    paths.iter_mut().for_each(|path| path.reverse());
    // A node's path from the root sorts right after its parent's, and before those beside it.
    paths.sort();
    let nodes = paths.iter().filter_map(|path| node_of(host, here, loaded, *path.last()?)).collect();
    let destroyed = tree.volumes.iter().filter(|(_, volume)| !tree.nodes.contains_key(&volume.node));
    let depth = paths.iter().map(Vec::len).max().unwrap_or_default();
    Tree {
        tree: loaded.id,
        problem: None,
        unfinished: tree.intent.as_ref().map(|intent| format!("{intent:?}")),
        merging: tree.merge.as_ref().map(|merge| format!("merging node {} with {} on it", merge.lower, merge.upper)),
        depth,
        nodes,
        destroyed: destroyed.map(|(key, _)| volume_of(host, here, loaded, *key)).collect(),
    }
}

fn node_of(host: &Host, here: &Here, loaded: &LoadedTree, id: NodeId) -> Option<Node> {
    let node = loaded.tree.nodes.get(&id)?;
    let volume = loaded.tree.volumes.iter().find(|(_, volume)| volume.node == id).map(|(key, _)| *key);
    let scratch_of = loaded.tree.scratch.iter().find(|(_, scratch)| scratch.node == Some(id)).map(|(key, _)| *key);
    let blocks = loaded.image(id).ok().and_then(|image| fs::symlink_metadata(image.path).ok());
    Some(Node {
        node: id,
        parent: node.parent,
        virtual_size: node.virtual_size,
        // A file's blocks are counted in 512 bytes, whatever the file system's are.
        physical_size: blocks.map_or(0, |metadata| metadata.blocks() * 512),
        hidden: volume.is_none() && scratch_of.is_none(),
        scratch_of,
        volume: volume.map(|key| volume_of(host, here, loaded, key)),
        problem: loaded.checked_image(id).err().map(|error| error.chain()),
    })
}

fn volume_of(host: &Host, here: &Here, loaded: &LoadedTree, key: VolumeKey) -> Volume {
    let volume = loaded.tree.volumes.get(&key);
    let active = volume.iter().flat_map(|volume| &volume.active);
    let seen = Attachment::seen(host, key).ok().flatten();
    let domains = seen.map(|seen| seen.domains).unwrap_or_default();
    let mirrors = here.mirrors.iter().filter(|record| record.volume == key);
    Volume {
        volume: key,
        name: volume.map(|volume| volume.name.clone()).unwrap_or_default(),
        cbt: volume.is_some_and(|volume| volume.cbt_enabled),
        scratch: loaded.tree.scratch.contains_key(&key),
        active: active
            .map(|claim| Active { host: claim.host, here: Some(claim.host) == here.uuid, mode: claim.mode })
            .collect(),
        domains: domains.into_iter().map(|(domain, usage)| Domain { domain: domain.into(), usage }).collect(),
        mirrors: mirrors.map(|record| Mirror { mirror: record.key, done: record.progress.fraction() }).collect(),
    }
}
