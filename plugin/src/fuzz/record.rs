//! A file in the place of a record: of a tree, an SR, a volume's life, a mirror, and the others.

use std::fmt::Debug;
use std::path::Path;

use super::judge;
use crate::attachment::fuzzed as attachment;
use crate::device::Connection;
use crate::error::{Error, Result};
use crate::gc;
use crate::mirror::{Blocks, MirrorRecord, Session};
use crate::qemu::fuzzed::Findings;
use crate::record::{self, Record};
use crate::store::fuzzed::{AttachedRecord, Changed, State};
use crate::store::{SrRecord, Tree};

/// What an error has to name.
const PATH: &str = "/sr/trees/t/record.json";

/// Reads the input as a record of the kind that its first byte says.
pub(super) fn run(input: &[u8]) {
    let Some((kind, bytes)) = input.split_first() else { return };
    match kind {
        b't' => drop(read(bytes).map(|tree| check(&tree))),
        b's' => drop(read::<SrRecord>(bytes)),
        b'a' => drop(read::<AttachedRecord>(bytes)),
        b'c' => drop(read(bytes).map(|changed| fill(&changed))),
        b'v' => drop(read(bytes).map(|state: attachment::State| state.needed())),
        b'm' => drop(read(bytes).map(|mirror: MirrorRecord| mirror.progress.fraction())),
        b'b' => drop(read(bytes).map(|blocks: Blocks| blocks.bytes())),
        b'x' => drop(read::<Session>(bytes)),
        b'p' => drop(read::<Findings>(bytes)),
        b'g' => drop(read::<gc::State>(bytes)),
        b'd' => drop(read::<Connection>(bytes)),
        _ => {}
    }
}

/// Decodes a record; what was decoded is the same when it was encoded and decoded again.
fn read<R: Record + PartialEq + Debug>(bytes: &[u8]) -> Result<R> {
    let path = Path::new(PATH);
    let found = record::parse::<R>(path, bytes);
    match &found {
        Ok(record) => {
            let encoded = record::encode(record).unwrap();
            let again: R = record::parse(path, &encoded).unwrap();
            assert_eq!((&again, record::encode(&again).unwrap()), (record, encoded));
        }
        Err(error) => {
            assert!(matches!(error, Error::DamagedRecord { .. } | Error::NewerFormat { .. }), "{error:?}");
            judge(error, PATH);
        }
    }
    found
}

/// Walks a tree as calls do, whether it is sound or not; of one that is, everything is where it should be.
fn check(tree: &Tree) {
    let sound = tree.check();
    assert!(tree.needed_format() <= Tree::FORMAT);
    for (node, record) in &tree.nodes {
        let (chain, lineage) = (tree.chain(*node), tree.lineage(*node));
        assert!(lineage.len() <= tree.nodes.len() + tree.history.len() + 1);
        if sound.is_ok() {
            let root = chain.last().unwrap();
            assert_eq!(tree.nodes[root].parent, None, "{node} does not end at the root");
            assert_eq!(tree.is_frozen(*node), tree.is_frozen(*node) || tree.children(*node).next().is_some());
            assert!(record.virtual_size > 0);
        }
    }
    for (key, volume) in &tree.volumes {
        assert!(tree.volume(*key).is_ok());
        if sound.is_ok() {
            assert!(tree.virtual_size(volume.node).is_ok());
            assert!(volume.data_destroyed || tree.has_needed_data(volume.node));
        }
    }
    if let Err(reason) = sound {
        assert!(!reason.is_empty() && reason.len() <= 2000);
    }
}

/// Asks what a node changed of some blocks.
fn fill(changed: &Changed) {
    if changed.check().is_err() {
        return;
    }
    for first in [0, 1, 7, 1 << 20] {
        let mut states = [State::Unset; 64];
        changed.fill(first, &mut states);
        for (at, state) in states.iter().enumerate() {
            let mut one = [State::Unset];
            changed.fill(first + at as u64, &mut one);
            assert_eq!(one[0], *state, "{first} {at}");
        }
    }
}
