//! An SR's directory: what its qcow2 headers and its records say, read side by side.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::{known, qemu_img, quiet};

/// Where the parent of a node is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// In the qcow2 header.
    Headers,
    /// In tree.json.
    Records,
}

/// All trees of an SR.
#[derive(Debug, Clone)]
pub struct Sr {
    path: PathBuf,
    trees: Vec<Tree>,
}

/// One tree: its node files, and which volume names which node.
#[derive(Debug, Clone)]
pub struct Tree {
    /// Its UUID.
    pub uuid: String,
    /// Its nodes by UUID, as the files in its directory are named.
    pub nodes: BTreeMap<String, Node>,
    /// The node of each volume, by the volume's UUID, as tree.json says.
    pub volumes: BTreeMap<String, String>,
    /// The volumes whose data was destroyed, whose nodes need no file.
    pub without_data: BTreeSet<String>,
    /// The nodes that have a record of what they changed.
    history: BTreeSet<String>,
}

/// One qcow2 file.
#[derive(Debug, Clone)]
pub struct Node {
    /// The file.
    pub image: PathBuf,
    /// The size of its content in bytes.
    pub virtual_size: u64,
    /// What its header is based on: a sibling's UUID.
    pub backing: Option<String>,
    /// What tree.json says that it is based on.
    pub parent: Option<String>,
    /// Whether tree.json names it.
    pub recorded: bool,
}

/// What an SR holds, by name, to see what a migration has left or added.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// The volumes' UUIDs.
    pub volumes: BTreeSet<String>,
    /// The node files below trees/.
    pub images: BTreeSet<PathBuf>,
}

#[derive(Deserialize)]
struct TreeRecord {
    nodes: BTreeMap<String, NodeRecord>,
    volumes: BTreeMap<String, VolumeRecord>,
    #[serde(default)]
    history: BTreeMap<String, NodeRecord>,
}

#[derive(Deserialize)]
struct NodeRecord {
    parent: Option<String>,
}

#[derive(Deserialize)]
struct VolumeRecord {
    node: String,
    #[serde(default)]
    data_destroyed: bool,
}

impl Sr {
    /// Reads an SR that nobody is changing; the plugin's own garbage collection is waited for.
    ///
    /// # Errors
    /// If a file cannot be read, or a header names something that is not a sibling.
    pub fn read(path: &Path) -> Result<Self> {
        quiet::wait(path)?;
        let mut trees = Vec::new();
        for directory in entries(&path.join("trees"))? {
            if directory.is_dir() {
                trees.push(read_tree(&directory).with_context(|| format!("in {}", directory.display()))?);
            }
        }
        Ok(Self { path: path.to_owned(), trees })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its trees.
    pub fn trees(&self) -> &[Tree] {
        &self.trees
    }

    /// Its volumes' UUIDs.
    pub fn volumes(&self) -> impl Iterator<Item = &str> {
        self.trees.iter().flat_map(|tree| tree.volumes.keys()).map(String::as_str)
    }

    /// The tree that a volume is in.
    pub fn tree_of(&self, volume: &str) -> Option<&Tree> {
        self.trees.iter().find(|tree| tree.volumes.contains_key(volume))
    }

    /// The file of the node that a volume names and those of all that it is based on by the headers, top first.
    ///
    /// # Errors
    /// As [`Self::node_of`].
    pub fn chain_of(&self, volume: &str) -> Result<Vec<&Path>> {
        let mut node = self.node_of(volume)?;
        let nodes = self.tree_of(volume).map(|tree| &tree.nodes);
        let mut chain = vec![node.image.as_path()];
        while let Some(below) = nodes.and_then(|nodes| nodes.get(node.backing.as_ref()?)) {
            ensure!(!chain.contains(&below.image.as_path()), "{} is based on itself", below.image.display());
            chain.push(&below.image);
            node = below;
        }
        Ok(chain)
    }

    /// The node that a volume names.
    ///
    /// # Errors
    /// If there is no such volume, or its node has no file.
    pub fn node_of(&self, volume: &str) -> Result<&Node> {
        let tree = self.tree_of(volume).with_context(|| format!("{} has no volume {volume}", self.path.display()))?;
        let node = &tree.volumes[volume];
        tree.nodes.get(node).with_context(|| format!("volume {volume} names node {node}, which has no file"))
    }

    /// What does not fit together: records against headers, volumes against links, files that nothing needs.
    pub fn contradictions(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for tree in &self.trees {
            tree.contradictions(&mut found);
        }
        let mut links = BTreeSet::new();
        for link in entries(&self.path.join("volumes"))? {
            let name = file_name(&link);
            let target = std::fs::read_link(&link).with_context(|| format!("{} is no link", link.display()))?;
            match self.tree_of(&name) {
                Some(tree) if target == Path::new("../trees").join(&tree.uuid) => {}
                Some(tree) => {
                    found.push(format!("volume {name} of tree {} links to {}", tree.uuid, target.display()))
                }
                None => found.push(format!("volume {name} is linked to {}, which has none", target.display())),
            }
            links.insert(name);
        }
        let unlinked = self.volumes().filter(|volume| !links.contains(*volume));
        found.extend(unlinked.map(|volume| format!("volume {volume} has no link")));
        Ok(found)
    }

    /// Checks every node file's metadata; what is wrong, by file. Leaks are allowed for.
    ///
    /// # Errors
    /// If a check could not be made.
    pub fn check(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for node in self.trees.iter().flat_map(|tree| tree.nodes.values()) {
            let check = known::of(&[&node.image], || qemu_img::check(&node.image))?;
            if check.corruptions > 0 || check.check_errors > 0 {
                found.push(format!("{}: {check:?}", node.image.display()));
            }
        }
        Ok(found)
    }

    /// Bytes that the node files take on their file system.
    ///
    /// # Errors
    /// If a file is gone.
    pub fn physical_bytes(&self) -> Result<u64> {
        let images = self.trees.iter().flat_map(|tree| tree.nodes.values());
        images.map(|node| Ok(std::fs::metadata(&node.image)?.blocks() * 512)).sum()
    }

    /// Bytes of data in all node files, each file for itself: what a migration has to carry at least.
    ///
    /// # Errors
    /// If a file cannot be mapped.
    pub fn allocated_bytes(&self) -> Result<u64> {
        self.trees.iter().flat_map(|tree| tree.nodes.values()).map(|node| qemu_img::allocated(&node.image)).sum()
    }
}

impl Tree {
    /// The node that a node is based on.
    pub fn parent(&self, node: &str, links: Links) -> Option<&str> {
        let node = self.nodes.get(node)?;
        match links {
            Links::Headers => node.backing.as_deref(),
            Links::Records => node.parent.as_deref(),
        }
    }

    fn contradictions(&self, found: &mut Vec<String>) {
        let mut needed = BTreeSet::new();
        for (volume, node) in &self.volumes {
            let recorded = self.without_data.contains(volume) && self.history.contains(node);
            if !recorded && !self.nodes.contains_key(node) {
                found.push(format!("volume {volume} names node {node}, which has no file"));
            }
            let mut next = Some(node.as_str());
            while let Some(node) = next.filter(|node| needed.insert(*node)) {
                next = self.parent(node, Links::Headers);
            }
        }
        for (uuid, node) in &self.nodes {
            if !node.recorded {
                found.push(format!("{} is named by no record", node.image.display()));
            } else if node.backing != node.parent {
                let (header, record) = (&node.backing, &node.parent);
                found.push(format!("node {uuid} is based on {header:?} by its header, on {record:?} by the record"));
            }
            if !needed.contains(uuid.as_str()) {
                found.push(format!("{} belongs to no volume", node.image.display()));
            }
        }
    }
}

impl Inventory {
    /// What an SR holds; also of one that could not be read as a whole. The plugin's own garbage collection is waited for.
    ///
    /// # Errors
    /// If a directory cannot be read.
    pub fn of(sr: &Path) -> Result<Self> {
        quiet::wait(sr)?;
        let mut inventory = Self::default();
        inventory.volumes.extend(entries(&sr.join("volumes"))?.iter().map(|path| file_name(path)));
        for tree in entries(&sr.join("trees"))? {
            if tree.is_dir() {
                let images =
                    entries(&tree)?.into_iter().filter(|path| path.extension().is_some_and(|e| e == "qcow2"));
                inventory.images.extend(images);
            }
        }
        Ok(inventory)
    }

    /// Whether there is no volume and no node file.
    pub fn is_empty(&self) -> bool {
        self.volumes.is_empty() && self.images.is_empty()
    }

    /// What is here and was not there, for people.
    pub fn beyond(&self, before: &Self) -> Vec<String> {
        let volumes = self.volumes.difference(&before.volumes).map(|volume| format!("volume {volume}"));
        let images = self.images.difference(&before.images).map(|image| image.display().to_string());
        volumes.chain(images).collect()
    }
}

fn read_tree(directory: &Path) -> Result<Tree> {
    let path = directory.join("tree.json");
    let record: TreeRecord = match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| format!("{} is unreadable", path.display()))?,
        // Garbage that waits for a collection: node files without a record.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            TreeRecord { nodes: BTreeMap::new(), volumes: BTreeMap::new(), history: BTreeMap::new() }
        }
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let mut nodes = BTreeMap::new();
    for image in entries(directory)? {
        if image.extension().is_none_or(|extension| extension != "qcow2") {
            continue;
        }
        let uuid = image.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        // Of it all that does not depend on where the file is.
        let info = known::of(&[&image], || qemu_img::info(&image))?;
        let backing = info.backing_filename.as_deref().map(|name| sibling(&image, name)).transpose()?;
        let recorded = record.nodes.get(&uuid);
        let parent = recorded.and_then(|node| node.parent.clone());
        let node = Node { image, virtual_size: info.virtual_size, backing, parent, recorded: recorded.is_some() };
        nodes.insert(uuid, node);
    }
    let destroyed = record.volumes.iter().filter(|(_, record)| record.data_destroyed);
    let without_data = destroyed.map(|(volume, _)| volume.clone()).collect();
    let volumes = record.volumes.into_iter().map(|(volume, record)| (volume, record.node)).collect();
    let history = record.history.into_keys().collect();
    Ok(Tree { uuid: file_name(directory), nodes, volumes, without_data, history })
}

/// The UUID in a backing string, which is the plain name of a file in the same directory.
fn sibling(image: &Path, name: &str) -> Result<String> {
    let stem = name.strip_suffix(".qcow2").filter(|stem| !stem.contains('/'));
    let stem = stem.with_context(|| format!("{} is based on {name:?}, which is no sibling", image.display()))?;
    ensure!(image.with_file_name(name).exists(), "{} is based on {name:?}, which is missing", image.display());
    Ok(stem.to_owned())
}

/// A directory's entries in the order of their names; none if it does not exist.
fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let listing = match std::fs::read_dir(directory) {
        Ok(listing) => listing,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot list {}", directory.display())),
    };
    let paths = listing.map(|entry| Ok(entry?.path())).collect::<Result<BTreeSet<_>>>()?;
    Ok(paths.into_iter().collect())
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
