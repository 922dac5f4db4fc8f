//! Volume.similar_content: lists the volumes that have much in common with another.

use std::collections::BTreeMap;

use plugin::error::Result;
use plugin::host::Host;
use plugin::id::VolumeKey;
use serde::Deserialize;

use crate::request::{SrName, VolumeName};

/// The key under which xapi keeps an identifier of a volume's content.
const CONTENT_ID: &str = "content_id";

/// The volume.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    sr: SrName,
    key: VolumeName,
}

/// Lists the other volumes with data of the same disk's tree, and those whose content xapi has found to be the same, the
/// most similar first: the same content, then the fewest steps from node to node.
///
/// # Errors
///
/// When the volume does not exist, or any tree of the SR cannot be read.
pub fn execute(host: &Host, parameters: Parameters) -> Result<Vec<VolumeKey>> {
    let sr = parameters.sr.open(host)?;
    let key = parameters.key.key()?;
    let tree = sr.load(key)?.tree;
    let volume = tree.volume(key)?;
    let line = tree.lineage(volume.node);
    let mut distances: BTreeMap<VolumeKey, usize> = BTreeMap::new();
    for (other, record) in tree.volumes.iter().filter(|(_, record)| !record.data_destroyed) {
        let theirs = tree.lineage(record.node);
        let met = theirs.iter().enumerate().find_map(|(up, node)| {
            let down = line.iter().position(|ours| ours == node)?;
            Some(up + down)
        });
        distances.extend(met.map(|steps| (*other, steps)));
    }
    if let Some(content) = volume.keys.get(CONTENT_ID).filter(|content| !content.is_empty()) {
        for id in sr.tree_ids()? {
            let Some(loaded) = sr.read_tree(id)? else { continue };
            let same = loaded.tree.volumes.iter().filter(|(_, record)| has_content(record, content));
            distances.extend(same.map(|(other, _)| (*other, 0)));
        }
    }
    distances.remove(&key);
    let mut similar: Vec<(usize, VolumeKey)> = distances.into_iter().map(|(other, steps)| (steps, other)).collect();
    similar.sort();
    Ok(similar.into_iter().map(|(_, other)| other).collect())
}

fn has_content(record: &plugin::store::Volume, content: &str) -> bool {
    !record.data_destroyed && record.keys.get(CONTENT_ID).is_some_and(|found| found == content)
}
