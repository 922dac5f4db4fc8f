//! The pairs of a migration held against each other, and disks held against a plan's model.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;

use super::{Links, RawCopy, Sr, Topology, qemu_img};
use crate::guest::Ledger;
use crate::plan::Disk;
use crate::report::Node;

/// A volume and what a migration made of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// What people call it, e.g. the snapshot's name.
    pub name: String,
    /// The volume at the source.
    pub source: String,
    /// The volume at the destination.
    pub destination: String,
}

/// What came of holding two SRs against each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    /// One entry a pair, in their order.
    pub nodes: Vec<Node>,
    /// Whether every volume is based on the same one at the destination, by headers and by records alike.
    pub topology: bool,
    /// Whether every volume reads the same.
    pub content: bool,
    /// What is wrong, for people.
    pub problems: Vec<String>,
}

/// What the destination's topology is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// The source's own.
    Same,
    /// Every volume for itself: what is left of a tree that was copied volume by volume.
    Flat,
}

/// Compares every pair by content and the two SRs by topology, while both are there and nobody writes to them.
///
/// # Errors
/// If an SR or an image cannot be read; a volume that is missing is a problem in the judgement instead.
pub fn judge(source: &Path, destination: &Path, pairs: &[Pair], shape: Shape) -> Result<Judgement> {
    let (source, destination) = (Sr::read(source)?, Sr::read(destination)?);
    let mut problems = Vec::new();
    let headers = Topology::of(&source, Links::Headers);
    let mut nodes = Vec::new();
    for pair in pairs {
        let identical = match (source.node_of(&pair.source), destination.node_of(&pair.destination)) {
            (Ok(one), Ok(other)) => {
                one.virtual_size <= other.virtual_size && qemu_img::same_content(&one.image, &other.image)?
            }
            (Err(error), _) | (_, Err(error)) => {
                problems.push(format!("{}: {error}", pair.name));
                false
            }
        };
        if !identical {
            problems.push(format!("{}: {} reads differently from {}", pair.name, pair.destination, pair.source));
        }
        nodes.push(Node {
            name: pair.name.clone(),
            source: pair.source.clone(),
            destination: pair.destination.clone(),
            parent: headers.parent(&pair.source).map(str::to_owned),
            identical,
        });
    }
    let content = nodes.iter().all(|node| node.identical);
    let wrong_links = compare_topologies(&source, &destination, pairs, shape);
    let topology = wrong_links.is_empty();
    problems.extend(wrong_links);
    Ok(Judgement { nodes, topology, content, problems })
}

/// Where the topologies differ, each volume called by its pair's name.
fn compare_topologies(source: &Sr, destination: &Sr, pairs: &[Pair], shape: Shape) -> Vec<String> {
    let of_source: BTreeMap<_, _> = pairs.iter().map(|pair| (pair.source.as_str(), &pair.name)).collect();
    let of_destination: BTreeMap<_, _> = pairs.iter().map(|pair| (pair.destination.as_str(), &pair.name)).collect();
    let wanted = match shape {
        Shape::Same => {
            Topology::of(source, Links::Headers).renamed(|volume| of_source.get(volume).map(|name| (*name).clone()))
        }
        Shape::Flat => Topology::new(pairs.iter().map(|pair| (pair.name.clone(), None))),
    };
    let mut found = Vec::new();
    for (links, place) in [(Links::Headers, "headers"), (Links::Records, "records")] {
        let there = Topology::of(destination, links);
        let there = there.renamed(|volume| of_destination.get(volume).map(|name| (*name).clone()));
        found.extend(
            wanted.differences(&there).into_iter().map(|what| format!("{what}, by the destination's {place}")),
        );
    }
    found
}

/// Holds an image against what a plan says it must hold; bytes that a guest may have changed are left to its own ledger.
///
/// # Errors
/// If the image cannot be read; what is wrong with it is the answer.
pub fn model_holds(image: &Path, model: &Disk, guest: Option<&Ledger>) -> Result<Option<String>> {
    const PIECE: u64 = 1 << 20;
    const BLOCK: usize = 4096;
    let copy = RawCopy::of(image)?;
    let file = std::fs::File::open(copy.path())?;
    if copy.size() < model.size() {
        return Ok(Some(format!("the disk has {} bytes, not {}", copy.size(), model.size())));
    }
    let mut buffer = vec![0; PIECE as usize];
    for offset in (0..copy.size()).step_by(PIECE as usize) {
        let part = &mut buffer[..PIECE.min(copy.size() - offset) as usize];
        std::os::unix::fs::FileExt::read_exact_at(&file, part, offset)?;
        if model.check(offset, part).is_ok() {
            continue;
        }
        for (index, block) in part.chunks(BLOCK).enumerate() {
            let place = offset + (index * BLOCK) as u64;
            let changed = guest.is_some_and(|guest| guest.may_have_changed(place));
            if let Err(mismatch) = model.check(place, block)
                && !changed
            {
                return Ok(Some(mismatch.to_string()));
            }
        }
    }
    Ok(None)
}
