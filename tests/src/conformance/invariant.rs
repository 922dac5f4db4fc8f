//! What has to hold on disk after any calls: the files, the records and the list of volumes agree.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::Bench;
use crate::disk::{Inventory, Links, RawCopy, Sr, Topology};
use crate::host::{PluginSource, outlasts_calls};

/// The administrator's program.
const PROGRAM: &str = "xapi-storage-qcow2";

impl Bench {
    /// Sees that SR.ls is what is on disk, parents form a forest, and every image is sound.
    pub async fn sr_is_sound(&self) -> Result<()> {
        let listed = self.ls().await?;
        for volume in &listed {
            let stat = self.stat(&volume.key).await?;
            ensure!(stat.uri == volume.uri && stat.virtual_size == volume.virtual_size, "{volume:?} but {stat:?}");
        }
        if !self.subject.own_layout {
            return Ok(());
        }
        let sr = Sr::read(&self.sr.path)?;
        let on_disk: BTreeSet<&str> = sr.volumes().collect();
        let keys: BTreeSet<&str> = listed.iter().map(|v| v.key.as_str()).collect();
        ensure!(keys == on_disk, "SR.ls has {keys:?}, the disk {on_disk:?}");
        let wrong = sr.contradictions()?;
        ensure!(wrong.is_empty(), "{wrong:#?}");
        let damaged = sr.check()?;
        ensure!(damaged.is_empty(), "{damaged:#?}");
        is_a_forest(&sr)?;
        unfinished(&self.sr.path)?;
        self.check_finds_nothing()
    }

    /// Sees that the administrator's program finds nothing to say of the SR and of this host, where it was built too.
    pub fn check_finds_nothing(&self) -> Result<()> {
        let PluginSource::Binaries(directory) = &self.subject.plugins else { return Ok(()) };
        let program = directory.join(PROGRAM);
        if !self.subject.own_layout || !program.exists() {
            return Ok(());
        }
        let mut command = Command::new(program);
        command.args(["check", "--fast"]).arg(&self.sr.path).env("XAPI_STORAGE_QCOW2_ROOT", self.host.root());
        let output = command.stdin(Stdio::null()).output().context("running the administrator's program")?;
        let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        ensure!(output.status.success(), "the administrator's program says: {said}");
        Ok(())
    }

    /// The paths of everything below the check's directory, and which volumes there are: what a refused call leaves.
    pub async fn everything(&self) -> Result<(BTreeSet<PathBuf>, Vec<String>)> {
        let mut paths = BTreeSet::new();
        collect(self.directory(), &mut paths);
        let runtime = self.host.runtime_dir();
        paths.retain(|path| !outlasts_calls(&runtime, path));
        let volumes = self.ls().await?;
        Ok((
            paths,
            volumes.iter().map(|v| format!("{:?}", (&v.key, &v.name, v.virtual_size, &v.keys, &v.uri))).collect(),
        ))
    }
}

/// Sees that two pictures of everything are the same.
pub fn unchanged(before: &(BTreeSet<PathBuf>, Vec<String>), after: &(BTreeSet<PathBuf>, Vec<String>)) -> Result<()> {
    let new: Vec<_> = after.0.difference(&before.0).collect();
    let gone: Vec<_> = before.0.difference(&after.0).collect();
    ensure!(new.is_empty() && gone.is_empty(), "files appeared: {new:?}, or went: {gone:?}");
    if before.1 != after.1 {
        let differing = after.1.iter().zip(&before.1).find(|(a, b)| a != b);
        bail!("SR.ls changed from {} to {} volumes, {differing:?}", before.1.len(), after.1.len());
    }
    Ok(())
}

fn collect(dir: &Path, paths: &mut BTreeSet<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            collect(&path, paths);
        }
        paths.insert(path);
    }
}

fn is_a_forest(sr: &Sr) -> Result<()> {
    for tree in sr.trees() {
        for start in tree.nodes.keys() {
            for links in [Links::Headers, Links::Records] {
                let mut seen = BTreeSet::new();
                let mut next = Some(start.as_str());
                while let Some(node) = next {
                    ensure!(seen.insert(node.to_owned()), "the parents of node {start} go round in a circle");
                    ensure!(tree.nodes.contains_key(node), "node {start} is based on {node}, which is missing");
                    next = tree.parent(node, links);
                }
            }
        }
    }
    let (headers, records) = (Topology::of(sr, Links::Headers), Topology::of(sr, Links::Records));
    let differences = headers.differences(&records);
    ensure!(differences.is_empty(), "headers and records disagree: {differences:?}");
    Ok(())
}

/// Nothing is being made or removed.
fn unfinished(sr: &Path) -> Result<()> {
    let mut paths = BTreeSet::new();
    collect(sr, &mut paths);
    let temporary = |path: &&PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with('.') || name.ends_with(".tmp")
    };
    let left: Vec<_> = paths.iter().filter(temporary).collect();
    ensure!(left.is_empty(), "unfinished: {left:?}");
    Ok(())
}

/// An SR without volumes has no files of any.
pub(super) fn nothing_on_disk(sr: &Path) -> Result<()> {
    let left = Inventory::of(sr)?;
    ensure!(left.is_empty(), "the SR is empty, but there are {left:?}");
    unfinished(sr)
}

/// The image of a volume.
pub fn image_of(sr: &Path, key: &str) -> Result<PathBuf> {
    Ok(Sr::read(sr)?.node_of(key)?.image.clone())
}

/// Holds an image's whole content against what it must be, by qemu-img.
pub(super) fn image_holds(sr: &Path, key: &str, expected: &[u8]) -> Result<()> {
    let raw = RawCopy::of(&image_of(sr, key)?)?;
    let mut found = vec![0; usize::try_from(raw.size())?];
    std::fs::File::open(raw.path())?.read_exact_at(&mut found, 0).context("reading what qemu-img wrote")?;
    ensure!(found.len() == expected.len(), "the image has {} bytes, not {}", found.len(), expected.len());
    match found.iter().zip(expected).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => bail!("qemu-img reads {:#x} at {at} of volume {key}, not {:#x}", found[at], expected[at]),
    }
}
