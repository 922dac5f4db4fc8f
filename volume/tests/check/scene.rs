//! SRs of random shape, copies of them to be damaged, and what must not change.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::support::{Bench, MIB, names, write};

/// A source of choices that a seed repeats (xorshift).
pub struct Random(u64);

impl Random {
    /// Takes the seed of the environment, or a fixed one, and a number that tells tests apart.
    pub fn new(test: u64) -> Self {
        let seed: u64 = std::env::var("CHECK_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
        Self((seed << 8 | test).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Gives a number below a bound.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 16).unwrap() % bound
    }

    /// Picks one of several.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

/// Makes volumes, snapshots and clones at random, with data; two trees at least, a node that is hidden, and a volume of
/// which only the changes are left.
pub fn random_sr(random: &mut Random) -> Bench {
    let bench = Bench::new();
    let mut volumes = vec![bench.create(4 * MIB), bench.create(MIB)];
    for pattern in 1..=6_u8 {
        let volume = random.pick(&volumes).clone();
        if bench.tree(&volume)["nodes"].as_object().unwrap().values().all(|node| node.get("parent").is_none()) {
            write(&bench.node_file(&volume), pattern, random.below(16) as u64 * 65536, 65536);
        }
        let new = if random.below(3) == 0 { bench.clone_of(&volume) } else { bench.snapshot(&volume) };
        volumes.push(new);
    }
    let root = bench.create(MIB);
    bench.call("Volume.enable_cbt", json!({"key": root}));
    write(&bench.node_file(&root), 7, 0, 65536);
    let first = bench.snapshot(&root);
    write(&bench.node_file(&root), 8, 65536, 65536);
    let destroyed = bench.snapshot(&root);
    bench.call("Volume.revert", json!({"key": root, "snapshot": first}));
    bench.call("Volume.data_destroy", json!({"key": destroyed}));
    let hidden = bench.snapshot(&root);
    bench.snapshot(&root);
    bench.destroy(&hidden);
    bench
}

/// A copy of an SR that may be damaged.
pub struct Copy {
    pub path: PathBuf,
}

impl Copy {
    /// Copies an SR to a new directory beside it.
    pub fn of(bench: &Bench, name: &str) -> Self {
        let path = bench.path.with_file_name(name);
        drop(fs::remove_dir_all(&path));
        let copied = Command::new("cp").args(["-a", "--sparse=always"]).args([&bench.path, &path]).status().unwrap();
        assert!(copied.success());
        Self { path }
    }

    /// Gives the trees' directories.
    pub fn trees(&self) -> Vec<PathBuf> {
        let trees = self.path.join("trees");
        names(&trees).iter().filter(|name| !name.starts_with('.')).map(|name| trees.join(name)).collect()
    }

    /// Gives the files of a tree whose names end in a certain way.
    pub fn files(&self, suffix: &str) -> Vec<PathBuf> {
        let of = |tree: PathBuf| names(&tree).into_iter().map(move |name| tree.join(name)).collect::<Vec<_>>();
        let files = self.trees().into_iter().flat_map(of);
        files.filter(|path| path.to_str().unwrap().ends_with(suffix)).collect()
    }

    /// Gives the symlinks of the volumes.
    pub fn links(&self) -> Vec<PathBuf> {
        let volumes = self.path.join("volumes");
        names(&volumes).iter().map(|name| volumes.join(name)).collect()
    }

    /// Reads a tree's record.
    pub fn record(tree: &Path) -> Value {
        serde_json::from_slice(&fs::read(tree.join("tree.json")).unwrap()).unwrap()
    }

    /// Gives all that a volume's bytes depend on: which node it is on, what that lies on, and what is in the files.
    pub fn content(&self) -> BTreeMap<String, Vec<Vec<u8>>> {
        let mut content = BTreeMap::new();
        for tree in self.trees() {
            let record = Self::record(&tree);
            for (key, volume) in record["volumes"].as_object().unwrap() {
                let mut chain = Vec::new();
                let mut next = volume["node"].as_str();
                while let Some(node) = next.filter(|node| record["nodes"].get(node).is_some()) {
                    chain.push(fs::read(tree.join(format!("{node}.qcow2"))).unwrap());
                    next = record["nodes"][node]["parent"].as_str();
                }
                content.insert(key.clone(), chain);
            }
        }
        content
    }
}
