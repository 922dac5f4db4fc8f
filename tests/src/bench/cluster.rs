//! The group of cluster sizes: what the choice of one is made by.

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;

use super::call;
use super::calls::tool;
use super::daemon::Daemon;
use super::qmp::{mirror_job, nbd_node};
use super::random::Random;
use super::{Figure, Measured, Settings, Unit};
use crate::disk::qemu_img;
use crate::nbd::{Client, Uri};

/// Names and options of the kinds of images.
const KINDS: [(&str, &str); 4] = [
    ("64k", "cluster_size=64k"),
    ("128k-extended", "cluster_size=128k,extended_l2=on"),
    ("1m", "cluster_size=1M"),
    ("2m", "cluster_size=2M"),
];
/// The kind that volumes are of.
const OURS: &str = "64k";
/// Writes of 4 KiB of one round.
const WRITES: u64 = 1000;
const BLOCK: u64 = 4096;
/// The bytes of one change of the overlay, of a size that larger clusters do not suit.
const CHANGE: u64 = 256 << 10;

pub(super) async fn measure(settings: &Settings, measured: &mut Measured) -> Result<()> {
    let directory = tempfile::Builder::new().prefix("fx-").tempdir_in(&settings.place)?;
    let lab =
        Lab { directory: directory.path().to_owned(), size: settings.scale.mirror / 2, qemu_img: tool("qemu-img")? };
    let (runs, writes) = (settings.scale.mirrors, if settings.scale.calls > 1 { WRITES } else { 20 });
    let mut found = KINDS.map(|(name, _)| Found { name, ..Found::default() });
    for (name, options) in KINDS {
        lab.source(name, options).await.with_context(|| format!("a source, {name}"))?;
    }
    let unique = physical(&lab.top(OURS))? as f64;
    for _ in 0..runs {
        for (found, (name, options)) in found.iter_mut().zip(KINDS) {
            lab.round(found, options, writes).await.with_context(|| name.to_owned())?;
        }
    }
    for (found, (name, options)) in found.iter_mut().zip(KINDS) {
        found.difference_to = lab.difference(OURS, options).await.with_context(|| format!("a difference, {name}"))?;
        found.difference_both =
            lab.difference(name, options).await.with_context(|| format!("a difference, {name}"))?;
    }
    told(&found, unique, measured);
    Ok(())
}

/// What was found of one kind of images.
#[derive(Default)]
struct Found {
    name: &'static str,
    /// Seconds of full mirrors: to a destination of this kind, and where both ends are.
    to: Vec<f64>,
    both: Vec<f64>,
    /// Bytes that a difference takes at the destination, likewise.
    difference_to: f64,
    difference_both: f64,
    /// Seconds of writes to a new overlay.
    writes: Vec<f64>,
}

fn told(found: &[Found], unique: f64, measured: &mut Measured) {
    let ours = found.iter().find(|found| found.name == OURS);
    let against = format!("the same with {OURS}");
    let reference = |of: fn(&Found) -> Vec<f64>| ours.map_or_else(Vec::new, of);
    let seconds = |id: String, what: String, samples, of: fn(&Found) -> Vec<f64>| {
        Figure::new(id, what, Unit::Seconds, samples).against(&against, reference(of))
    };
    for Found { name, to, both, .. } in found {
        let what = format!("full mirror, destination {name}");
        measured.add(seconds(format!("full-to-{name}"), what, to.clone(), |found| found.to.clone()));
        let what = format!("full mirror, both ends {name}");
        measured.add(seconds(format!("full-both-{name}"), what, both.clone(), |found| found.both.clone()));
    }
    for found in found {
        for (ends, bytes) in [("destination", found.difference_to), ("both ends", found.difference_both)] {
            let id = format!("difference-{}-{}", if ends == "destination" { "to" } else { "both" }, found.name);
            let what = format!("difference, {ends} {}", found.name);
            let figure = Figure::new(id, what, Unit::Bytes, vec![bytes]);
            measured.add(figure.against(format!("what it takes at a source of {OURS}"), vec![unique]));
        }
    }
    for Found { name, writes, .. } in found {
        let mut sorted = writes.clone();
        sorted.sort_by(f64::total_cmp);
        let p99 = sorted.get(sorted.len() * 99 / 100).copied().unwrap_or_default();
        let what = format!("write of 4 KiB to a new overlay, {name}");
        let figure = seconds(format!("write-{name}"), what, writes.clone(), |found| found.writes.clone());
        measured.add(figure.note(format!("99 of 100 took at most {:.2} ms", p99 * 1e3)));
    }
    let chart = |measured: &mut Measured, file: &str, title: &str, unit, prefixes: &[&str]| {
        let ids = KINDS.iter().flat_map(|(name, _)| prefixes.iter().map(move |prefix| format!("{prefix}-{name}")));
        let ids: Vec<String> = ids.collect();
        measured.chart(file, title, unit, &ids.iter().map(String::as_str).collect::<Vec<_>>());
    };
    chart(measured, "cluster-full", "Full mirrors by cluster size", ("s", 1.0), &["full-to", "full-both"]);
    let (title, unit) = ("A difference by cluster size", ("MiB", f64::from(1 << 20)));
    chart(measured, "cluster-difference", title, unit, &["difference-to", "difference-both"]);
    chart(measured, "cluster-write", "Writes of 4 KiB to a new overlay", ("ms", 1e-3), &["write"]);
}

/// Sources of a base and an overlay that changes a tenth of it, and room for copies.
struct Lab {
    directory: PathBuf,
    size: u64,
    qemu_img: PathBuf,
}

impl Lab {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn base(&self, kind: &str) -> PathBuf {
        self.path(&format!("base-{kind}.qcow2"))
    }

    fn top(&self, kind: &str) -> PathBuf {
        self.path(&format!("top-{kind}.qcow2"))
    }

    /// One sample of all that takes time; of one kind after the other, so that no kind has the machine to itself.
    async fn round(&self, found: &mut Found, options: &str, writes: u64) -> Result<()> {
        found.to.push(self.full(OURS, options).await.context("a full mirror")?);
        let both = match found.name == OURS {
            true => found.to.last().copied().unwrap_or_default(),
            false => self.full(found.name, options).await.context("a full mirror from such a source")?,
        };
        found.both.push(both);
        found.writes.extend(self.latency(options, writes).await.context("writes")?);
        Ok(())
    }

    /// A tenth of the disk in pieces at places that are multiples of 4 KiB; each lies in a stretch of its own.
    fn changes(&self) -> impl Iterator<Item = (u64, u64)> {
        let piece = CHANGE.min(self.size / 40).next_multiple_of(BLOCK);
        let count = (self.size / 10 / piece).max(1);
        let stretch = self.size / count;
        let mut random = Random::new(2);
        (0..count).map(move |index| {
            let offset = index * stretch + random.next() % (stretch - piece);
            (offset - offset % BLOCK, piece)
        })
    }

    async fn create(&self, name: &str, options: &str, backing: Option<&str>) -> Result<PathBuf> {
        let path = self.path(name);
        let size = self.size.to_string();
        let mut arguments: Vec<&OsStr> = ["create", "-q", "-f", "qcow2", "-o", options].map(OsStr::new).to_vec();
        if let Some(backing) = backing {
            arguments.extend(["-u", "-F", "qcow2", "-b", backing].map(OsStr::new));
        }
        arguments.extend([path.as_os_str(), size.as_ref()]);
        run(&self.qemu_img, &arguments).await?;
        Ok(path)
    }

    /// Makes a base that is full of data, and an overlay that changes a tenth of it.
    async fn source(&self, kind: &str, options: &str) -> Result<()> {
        let name = format!("base-{kind}.qcow2");
        let base = self.create(&name, options, None).await?;
        let top = self.create(&format!("top-{kind}.qcow2"), options, Some(&name)).await?;
        let mut daemon = Daemon::start().await?;
        daemon.open("base", &base, None, true).await?;
        let uri = daemon.export("base", true).await?;
        call::write(&uri, [(0, self.size)], 1).await?;
        daemon.quit().await?;
        let mut daemon = Daemon::start().await?;
        daemon.open("base", &base, None, false).await?;
        daemon.open("top", &top, Some("base"), true).await?;
        let uri = daemon.export("top", true).await?;
        call::write(&uri, self.changes(), 2).await?;
        daemon.quit().await
    }

    /// A mirror of all of a base to another daemon; its seconds.
    async fn full(&self, from: &str, options: &str) -> Result<f64> {
        let copy = self.create("copy.qcow2", options, None).await?;
        let mut other = Daemon::start().await?;
        other.open("copy", &copy, None, true).await?;
        let uri = other.export("copy", true).await?;
        let mut daemon = Daemon::start().await?;
        daemon.open("base", &self.base(from), None, false).await?;
        let took = mirror(&mut daemon, "base", &uri, "full").await?;
        daemon.quit().await?;
        other.quit().await?;
        std::fs::remove_file(&copy)?;
        Ok(took)
    }

    /// The bytes that an overlay's difference takes where it arrives on a copy of the base.
    async fn difference(&self, from: &str, options: &str) -> Result<f64> {
        // The base itself is as good as a copy of it: nobody writes to it.
        let base = self.base(from);
        let name = base.file_name().context("a base without a name")?.to_string_lossy().into_owned();
        let copy = self.create("difference.qcow2", options, Some(&name)).await?;
        let mut other = Daemon::start().await?;
        other.open("base", &base, None, false).await?;
        other.open("copy", &copy, Some("base"), true).await?;
        let uri = other.export("copy", true).await?;
        let mut daemon = Daemon::start().await?;
        daemon.open("base", &base, None, false).await?;
        daemon.open("top", &self.top(from), Some("base"), false).await?;
        mirror(&mut daemon, "top", &uri, "top").await?;
        daemon.quit().await?;
        other.quit().await?;
        ensure!(qemu_img::same_content(&self.top(from), &copy)?, "the difference arrived wrong");
        let taken = physical(&copy)?;
        std::fs::remove_file(&copy)?;
        Ok(taken as f64)
    }

    /// The seconds of writes of 4 KiB, one after the other, to a new overlay: each in a cluster of its own, as far as
    /// there are as many, so that the rest of it has to be copied.
    async fn latency(&self, options: &str, count: u64) -> Result<Vec<f64>> {
        let overlay = self.create("overlay.qcow2", options, Some(&format!("base-{OURS}.qcow2"))).await?;
        let mut daemon = Daemon::start().await?;
        daemon.open("base", &self.base(OURS), None, false).await?;
        daemon.open("overlay", &overlay, Some("base"), true).await?;
        let uri = daemon.export("overlay", true).await?;
        let client = Client::connect(&uri).await?;
        let blocks = self.size / BLOCK;
        let mut samples = Vec::new();
        for index in 0..count {
            // A step that has no divisor in common with a power of two meets every block before any comes again.
            let offset = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) % blocks * BLOCK;
            let began = Instant::now();
            client.write(offset, Bytes::from(vec![1; BLOCK as usize])).await?;
            samples.push(began.elapsed().as_secs_f64());
        }
        client.disconnect().await;
        daemon.quit().await?;
        std::fs::remove_file(&overlay)?;
        Ok(samples)
    }
}

async fn mirror(daemon: &mut Daemon, node: &str, to: &Uri, sync: &str) -> Result<f64> {
    let began = Instant::now();
    daemon.qmp.execute("blockdev-add", nbd_node("target", to.socket(), to.export())).await?;
    let mut job = mirror_job("mirror", node, "target");
    job["sync"] = sync.into();
    daemon.qmp.mirror(job).await?;
    daemon.qmp.end_mirror("mirror").await?;
    Ok(began.elapsed().as_secs_f64())
}

fn physical(path: &Path) -> Result<u64> {
    Ok(std::fs::metadata(path)?.blocks() * 512)
}

async fn run(program: &Path, arguments: &[&OsStr]) -> Result<()> {
    let output = tokio::process::Command::new(program).args(arguments).output().await?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{arguments:?}: {stderr}");
    Ok(())
}
