//! The group of the reference tree: a disk with four snapshots on two branches, migrated by the flows tree and base.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::call;
use super::random::Random;
use super::{Bar, Figure, Measured, Samples, Settings, Unit};
use crate::db::VmRef;
use crate::disk::{self, qemu_img};
use crate::host::Host;
use crate::scenario::Stage;
use crate::sxm::{self, Event, Flow, Migration, Observer};

/// How often the flows ask how far a mirror is; xapi does every half second, which would be most of a short mirror.
const POLL: Duration = Duration::from_millis(10);
/// The bytes of one change between two snapshots, and what it begins at a multiple of.
const CHANGE: u64 = 1 << 20;
const ALIGNMENT: u64 = 64 << 10;
/// The share of the disk that is written between two snapshots: a tenth.
const SHARE: u64 = 10;
/// The file in which a host's settings are.
const SETTINGS: &str = "etc/xapi-storage-qcow2.json";

pub(super) async fn measure(settings: &Settings, measured: &mut Measured) -> Result<()> {
    for (flow, full) in [Flow::Tree, Flow::Base].into_iter().zip(settings.scale.full_trees) {
        flow_of(settings, flow, full, measured).await.with_context(|| format!("flow {}", flow.name()))?;
    }
    let gib = (1u64 << 30) as f64;
    let bytes = ["tree-wire", "tree-physical", "base-wire", "base-physical"];
    measured.chart("tree-bytes", "The reference tree: bytes", ("GiB", gib), &bytes);
    measured.chart("tree-time", "The reference tree: all mirrors", ("s", 1.0), &["tree-time", "base-time"]);
    Ok(())
}

/// What one migration came to.
#[derive(Debug, Default, Clone)]
struct Run {
    wire: u64,
    unique: u64,
    source_physical: u64,
    physical: u64,
    /// The seconds of each mirror, in the order of their ends.
    mirrors: Vec<f64>,
    downtime: f64,
    /// Whether this build can be told to send differences or not.
    switchable: bool,
}

async fn flow_of(settings: &Settings, flow: Flow, full_runs: usize, measured: &mut Measured) -> Result<()> {
    let (mut runs, mut full) = (Vec::new(), Vec::new());
    for index in 0..settings.scale.trees {
        runs.push(migrate(settings, flow, true, index == 0 && settings.scale.compare).await?);
        if index < full_runs {
            full.push(migrate(settings, flow, false, false).await?);
        }
    }
    let of = |runs: &[Run], value: fn(&Run) -> f64| runs.iter().map(value).collect::<Vec<_>>();
    let name = flow.name();
    let figure = |id: &str, what: &str, unit, value: fn(&Run) -> f64| {
        Figure::new(format!("{name}-{id}"), format!("flow {name}: {what}"), unit, of(&runs, value))
    };
    measured.add(
        figure("wire", "on the wire", Unit::Bytes, |run| run.wire as f64)
            .against("unique allocated bytes of the source", of(&runs, |run| run.unique as f64))
            .bar(Bar::Times(1.05)),
    );
    measured.add(
        figure("physical", "physical at the destination", Unit::Bytes, |run| run.physical as f64)
            .against("physical at the source", of(&runs, |run| run.source_physical as f64))
            .bar(Bar::Times(1.05)),
    );
    let wire = Samples(of(&full, |run| run.wire as f64)).median();
    let downtime = Samples(of(&runs, |run| run.downtime)).median();
    if full.is_empty() {
        let why = "this scale makes no full mirrors to compare with".to_owned();
        let (id, what) = (format!("{name}-time"), format!("flow {name}: all mirrors"));
        measured.add(Figure::skipped(id, what, Unit::Seconds, Bar::Times(0.25), why));
        return Ok(());
    }
    let mut time = figure("time", "all mirrors", Unit::Seconds, |run| run.mirrors.iter().sum())
        .against("full mirrors in the same build", of(&full, |run| run.mirrors.iter().sum()))
        .bar(Bar::Times(0.25))
        .note(format!("full mirrors send {}; downtime {:.0} ms", crate::draw::size(wire as u64), downtime * 1e3));
    for (what, runs) in [("these", &runs), ("full ones", &full)] {
        let each: Vec<String> = (0..5).map(|place| format!("{:.2}", median_at(runs, place))).collect();
        time = time.note(format!("{what}, one by one: {} s", each.join(" ")));
    }
    if full.iter().any(|run| !run.switchable) {
        time = time.note("this build has no setting `difference`: what it is held against is the same");
    }
    measured.add(time);
    Ok(())
}

/// The median over some runs of the seconds of their mirrors at one place in the order.
fn median_at(runs: &[Run], place: usize) -> f64 {
    Samples(runs.iter().filter_map(|run| run.mirrors.get(place).copied()).collect()).median()
}

/// Makes the tree and migrates it, the VM running without writing.
async fn migrate(settings: &Settings, flow: Flow, difference: bool, compare: bool) -> Result<Run> {
    let stage = settings.stage(false).await?;
    let result = async {
        let mut run = Run { switchable: true, ..Run::default() };
        if !difference {
            run.switchable = switch_off(&stage).await?;
        }
        let vm = history(&stage, settings.scale.tree).await?;
        (run.unique, run.source_physical) = sizes(stage.source_path.clone(), true).await?;
        stage.xapi.vm_start(vm).await?;
        let mut migration = Migration::new(vm, &stage.destination, &stage.destination_sr, flow);
        migration.poll = POLL;
        let watch = Watch::new(&stage, compare);
        let migrated = sxm::migrate(&stage.xapi, &migration, &watch).await?;
        run.mirrors = watch.seconds();
        if compare {
            watch.compared()?;
        }
        run.wire = migrated.wires.iter().map(|wire| wire.to_destination()).sum();
        run.downtime = migrated.downtime.map_or(0.0, |downtime| downtime.as_secs_f64());
        stage.xapi.vm_shutdown(vm).await?;
        run.physical = sizes(stage.destination_path.clone(), false).await?.1;
        anyhow::Ok(run)
    }
    .await;
    stage.close().await;
    result
}

/// The bytes of data in an SR's images, if asked for, and what they take.
async fn sizes(path: PathBuf, allocated: bool) -> Result<(u64, u64)> {
    let read = move || {
        let sr = disk::Sr::read(&path)?;
        anyhow::Ok((if allocated { sr.allocated_bytes()? } else { 0 }, sr.physical_bytes()?))
    };
    tokio::task::spawn_blocking(read).await?
}

/// Has both hosts mirror everything; false if this build knows no such setting.
async fn switch_off(stage: &Stage) -> Result<bool> {
    let files = [&stage.source, &stage.destination].map(|host: &std::sync::Arc<Host>| host.root().join(SETTINGS));
    for file in &files {
        std::fs::write(file, "{\"difference\": false, \"gc\": false}\n")?;
    }
    // A setting that is not known is an error of every call that reads the settings, as one that takes a lock does.
    let (host, sr) = (&stage.source, &stage.source_sr);
    let known = match call::create(host, sr, 1 << 20).await {
        Ok(volume) => call::destroy(host, sr, &volume).await.is_ok(),
        Err(_) => false,
    };
    if !known {
        for file in &files {
            std::fs::remove_file(file)?;
        }
        for volume in host.sr_ls(call::DBG, sr).await? {
            call::destroy(host, sr, &volume).await?;
        }
    }
    Ok(known)
}

/// A disk full of data; snap1, snap2, back to snap1, snap3, snap4, and on: a tenth changed before each but the first.
async fn history(stage: &Stage, size: u64) -> Result<VmRef> {
    let vm = stage.xapi.vm_create("vm", &stage.source, &stage.source_sr, &[size]).await?;
    let mut first = None;
    for (index, name) in ["snap1", "snap2", "snap3", "snap4", "leaf"].into_iter().enumerate() {
        let disks = match (name, first) {
            ("snap3", Some(first)) => {
                stage.xapi.vm_revert(first).await?;
                stage.xapi.vm_start(vm).await?
            }
            ("snap1", _) => stage.xapi.vm_start(vm).await?,
            _ => Vec::new(),
        };
        let uri = match disks.first() {
            Some(disk) => disk.uri.clone(),
            None => running(stage, vm)?,
        };
        let seed = index as u64 + 1;
        if index == 0 {
            call::write(&uri, [(0, size)], seed).await?;
        } else {
            call::write(&uri, changes(size, seed), seed).await?;
        }
        if name != "leaf" {
            let snapshot = stage.xapi.vm_snapshot(vm, name).await?;
            first = first.or(Some(snapshot));
        }
    }
    stage.xapi.vm_shutdown(vm).await?;
    Ok(vm)
}

/// Where the disk of a running VM is written.
fn running(stage: &Stage, vm: VmRef) -> Result<crate::nbd::Uri> {
    let record = stage.xapi.vm(vm)?;
    let disk = record.vbds.first().context("a VM without disks")?;
    let socket = stage.source.runtime_dir().join("volumes").join(&disk.vdi.0).join("nbd.sock");
    Ok(crate::nbd::Uri::new(socket, disk.vdi.0.clone()))
}

/// A tenth of a disk in pieces at places that follow from a seed, some of which meet, as a guest's writes do.
fn changes(size: u64, seed: u64) -> Vec<(u64, u64)> {
    let piece = CHANGE.min(size / SHARE / 4).next_multiple_of(ALIGNMENT);
    let places = (size - piece) / ALIGNMENT + 1;
    let mut random = Random::new(seed);
    (0..(size / SHARE / piece).max(1)).map(|_| (random.next() % places * ALIGNMENT, piece)).collect()
}

/// Adds up the time of the mirrors, and compares the copies before their sources go.
struct Watch {
    source: PathBuf,
    destination: PathBuf,
    compare: bool,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    /// When each mirror began that goes on.
    started: BTreeMap<String, Instant>,
    seconds: Vec<f64>,
    /// Where each source volume arrived.
    arrived: BTreeMap<String, String>,
    compared: Option<Result<()>>,
}

impl Watch {
    fn new(stage: &Stage, compare: bool) -> Self {
        let (source, destination) = (stage.source_path.clone(), stage.destination_path.clone());
        Self { source, destination, compare, seen: Mutex::default() }
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seconds(&self) -> Vec<f64> {
        self.seen().seconds.clone()
    }

    fn compared(&self) -> Result<()> {
        self.seen().compared.take().unwrap_or_else(|| bail!("the copies were not compared"))
    }

    fn judge(&self, arrived: &BTreeMap<String, String>) -> Result<()> {
        let (source, destination) = (disk::Sr::read(&self.source)?, disk::Sr::read(&self.destination)?);
        ensure!(arrived.len() == 5, "{} volumes arrived", arrived.len());
        for (from, to) in arrived {
            let (one, other) = (source.node_of(from)?, destination.node_of(to)?);
            ensure!(qemu_img::same_content(&one.image, &other.image)?, "the copy of {from} differs");
        }
        Ok(())
    }
}

impl Observer for Watch {
    fn event(&self, event: &Event) {
        match event {
            Event::Started { source, destination } => {
                let mut seen = self.seen();
                seen.started.insert(source.0.clone(), Instant::now());
                // What nobody says the arrival of is the leaf, which becomes what it was mirrored into.
                seen.arrived.insert(source.0.clone(), destination.0.clone());
            }
            Event::Complete { source } => {
                let mut seen = self.seen();
                if let Some(started) = seen.started.remove(&source.0) {
                    let seconds = started.elapsed().as_secs_f64();
                    seen.seconds.push(seconds);
                }
            }
            Event::Arrived { source, destination } => {
                self.seen().arrived.insert(source.0.clone(), destination.0.clone());
            }
            Event::Phase("destroy source") if self.compare => {
                let arrived = self.seen().arrived.clone();
                let compared = self.judge(&arrived);
                self.seen().compared = Some(compared);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_about_a_tenth_within_the_disk_and_follow_from_the_seed() {
        for (size, seed) in [(2 << 30, 2), (4 << 20, 3)] {
            let pieces = changes(size, seed);
            let all = pieces.iter().map(|(_, length)| length).sum::<u64>();
            assert!((size / 12..=size / 10).contains(&all), "{all} of {size}");
            assert!(pieces.iter().all(|(offset, length)| offset + length <= size));
            assert!(pieces.iter().any(|(offset, _)| *offset > size / 2));
        }
        assert_eq!(changes(2 << 30, 2), changes(2 << 30, 2));
        assert_ne!(changes(2 << 30, 2), changes(2 << 30, 3));
    }
}
