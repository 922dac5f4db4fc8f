//! What is judged at the switch: content, topology, acknowledged writes, sizes, and the picture of both sides.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::Subject;
use super::witness::Volume;
use crate::disk::{Judgement, Links, Pair, RawCopy, Shape, Sr, Topology, judge, qemu_img};
use crate::draw::{self, Branch};
use crate::guest::{Durability, Ledger, verify_raw};

/// Where source and destination are, and what was to be migrated.
pub(super) struct Place {
    pub subject: Subject,
    pub shape: Shape,
    pub source: PathBuf,
    pub destination: PathBuf,
}

/// What came of it.
#[derive(Debug)]
pub struct Judged {
    /// The pairs against each other.
    pub judgement: Judgement,
    /// Whether every acknowledged write is at the destination.
    pub acknowledged_writes: bool,
    /// Whether every destination volume holds what its history says.
    pub history: bool,
    /// Bytes that the destination's node files take.
    pub physical_bytes: u64,
    /// Bytes that the source's node files take.
    pub source_physical_bytes: u64,
    /// Bytes of data in the source's node files.
    pub unique_allocated_bytes: u64,
    /// Source and destination side by side.
    pub drawing: String,
    /// How long all this took.
    pub took: Duration,
}

impl Place {
    /// Judges while nobody writes to either side. Blocks.
    pub fn judge(
        &self,
        pairs: &[Pair],
        volumes: &BTreeMap<String, Volume>,
        ledgers: &BTreeMap<usize, Ledger>,
    ) -> Result<Judged> {
        let began = Instant::now();
        let mut judgement = judge(&self.source, &self.destination, pairs, self.shape)?;
        for volume in volumes.iter().filter(|(source, _)| !pairs.iter().any(|pair| pair.source == **source)) {
            judgement.content = false;
            judgement.problems.push(format!("{} never arrived", volume.1.name));
        }
        let (source, destination) = (Sr::read(&self.source)?, Sr::read(&self.destination)?);
        let (mut acknowledged_writes, mut history) = (true, true);
        for pair in pairs {
            let (Some(volume), Ok(node)) = (volumes.get(&pair.source), destination.node_of(&pair.destination)) else {
                continue;
            };
            let ledger = ledgers.get(&volume.disk).filter(|_| volume.snapshot.is_none());
            if let Some(wrong) = self.subject.check(volume.snapshot.as_deref(), volume.disk, &node.image, ledger)? {
                history = false;
                judgement.problems.push(format!("{} at the destination: {wrong}", pair.name));
            }
            if let Some(ledger) = ledger {
                let copy = RawCopy::of(&node.image)?;
                let verdict = verify_raw(ledger, copy.path(), Durability::Acknowledged)?;
                if let Some(first) = verdict.violations.first() {
                    acknowledged_writes = false;
                    let (wrong, checked) = (verdict.wrong, verdict.checked);
                    judgement.problems.push(format!("{}: {wrong} of {checked} blocks are wrong, {first}", pair.name));
                }
            }
        }
        let drawing = drawing(&source, &destination, pairs)?;
        Ok(Judged {
            judgement,
            acknowledged_writes,
            history,
            physical_bytes: destination.physical_bytes()?,
            source_physical_bytes: source.physical_bytes()?,
            unique_allocated_bytes: source.allocated_bytes()?,
            drawing,
            took: began.elapsed(),
        })
    }
}

fn drawing(source: &Sr, destination: &Sr, pairs: &[Pair]) -> Result<String> {
    let by_source: BTreeMap<_, _> = pairs.iter().map(|pair| (pair.source.as_str(), pair.name.as_str())).collect();
    let by_destination: BTreeMap<_, _> =
        pairs.iter().map(|pair| (pair.destination.as_str(), pair.name.as_str())).collect();
    let (left, right) = (branches(source, &by_source)?, branches(destination, &by_destination)?);
    Ok(draw::side_by_side(("source", &left), ("destination", &right)))
}

/// The trees of an SR as they are, by names where there are some.
fn branches(sr: &Sr, names: &BTreeMap<&str, &str>) -> Result<Vec<Branch>> {
    below(sr, &Topology::of(sr, Links::Headers), None, names)
}

fn below(sr: &Sr, topology: &Topology, parent: Option<&str>, names: &BTreeMap<&str, &str>) -> Result<Vec<Branch>> {
    let mut branches = Vec::new();
    for volume in topology.children(parent) {
        let bytes = qemu_img::allocated(&sr.node_of(volume)?.image)?;
        let name = names.get(volume).copied().unwrap_or(volume);
        let children = below(sr, topology, Some(volume), names)?;
        branches.push(Branch { children, ..Branch::new(name, draw::size(bytes)) });
    }
    branches.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(branches)
}
