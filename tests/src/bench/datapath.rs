//! Datapath calls against the same QMP commands from a client that is connected already.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::call::{self, DBG, datapath, nothing, timed};
use super::qmp::{Qmp, mirror_job, nbd_node};
use super::{Bar, Figure, Measured, Settings, Unit, in_turn};
use crate::disk::{self, Links};
use crate::nbd::Uri;
use crate::scenario::Stage;
use crate::wire::{Request, Volume};

/// The size of the disks, and what is written of each.
const DISK: u64 = 64 << 20;
const DATA: u64 = 1 << 20;
/// Layers of the longer chain, as many as a leaf with three snapshots has.
const LAYERS: usize = 4;
const AGAINST: &str = "the same QMP commands on an open connection";

pub(super) async fn measure(settings: &Settings, stage: &Stage, measured: &mut Measured) -> Result<()> {
    let (host, sr) = (&stage.source, &stage.source_sr);
    let volume = call::create(host, sr, DISK).await?;
    call::write_alone(host, &volume, [(0, DATA)], 1).await?;
    let [activate, deactivate] = without_mirror(settings, stage, &volume).await?;
    let spent = |figure: &Figure, spawn: f64| {
        let (all, qmp) = (figure.samples.median() * 1e3, figure.reference.median() * 1e3);
        let rest = all - qmp - spawn * 1e3;
        format!(
            "{all:.1} ms are {:.1} for a process that does nothing, {qmp:.1} QMP, {rest:.1} the rest",
            spawn * 1e3
        )
    };
    let spawn = spawn(settings, stage).await?;
    let bar = Bar::Times(3.0);
    let figure = |id, what: &str, (calls, references): (Vec<f64>, Vec<f64>)| {
        let figure = Figure::new(id, what, Unit::Seconds, calls).against(AGAINST, references);
        let spent = spent(&figure, spawn);
        figure.note(spent)
    };
    measured.add(figure("activate", "Datapath.activate", activate).bar(bar));
    measured.add(figure("deactivate", "Datapath.deactivate, no mirror", deactivate));
    let (ready, stats) = with_mirror(settings, stage, &volume).await?;
    measured.add(figure("deactivate-mirror", "Datapath.deactivate with a ready mirror", ready).bar(bar));
    measured.add(stats);
    for _ in 1..LAYERS {
        call::snapshot(host, sr, &volume).await?;
        call::write_alone(host, &volume, [(0, DATA)], 2).await?;
    }
    let [activate, _] = without_mirror(settings, stage, &volume).await?;
    measured.add(figure("activate-chain", &format!("Datapath.activate of {LAYERS} layers"), activate));
    for volume in host.sr_ls(DBG, sr).await? {
        call::destroy(host, sr, &volume).await?;
    }
    Ok(())
}

/// The median of some spawns of nothing.
async fn spawn(settings: &Settings, stage: &Stage) -> Result<f64> {
    let mut samples = Vec::new();
    for _ in 0..settings.scale.calls {
        samples.push(nothing(&stage.source).await?);
    }
    Ok(super::Samples(samples).median())
}

type InTurn = (Vec<f64>, Vec<f64>);

/// Activation and deactivation of a volume that stays attached, so that its daemon runs all the time.
async fn without_mirror(settings: &Settings, stage: &Stage, volume: &Volume) -> Result<[InTurn; 2]> {
    let host = &stage.source;
    call::attach(host, volume, "7").await?;
    let graph = Graph::of(stage, volume)?;
    // A monitor serves one client at a time; calls use the other one.
    let mut qmp = Qmp::connect(&graph.monitor).await?;
    let (mut closing, mut closing_bare) = (Vec::new(), Vec::new());
    let activated = in_turn(
        settings.scale.calls,
        async || {
            let (_, took) = timed(host, &datapath("Datapath.activate", volume, "7")?).await?;
            closing.push(timed(host, &datapath("Datapath.deactivate", volume, "7")?).await?.1);
            Ok(took)
        },
        async || {
            let took = graph.open(&mut qmp).await?;
            closing_bare.push(graph.close(&mut qmp).await?);
            Ok(took)
        },
    )
    .await?;
    drop(qmp);
    call::call(host, &datapath("Datapath.detach", volume, "7")?).await?;
    Ok([activated, (last(settings, closing), last(settings, closing_bare))])
}

/// Deactivation of a volume whose live mirror is ready; and Data.stat of that mirror.
async fn with_mirror(settings: &Settings, stage: &Stage, volume: &Volume) -> Result<(InTurn, Figure)> {
    let (host, other) = (&stage.source, &stage.destination);
    let target = call::create(other, &stage.destination_sr, DISK).await?;
    let remote = call::plug(other, &target, "MIR0be9c4").await?;
    let (mut stats, mut spawns) = (Vec::new(), Vec::new());
    let taken = in_turn(
        settings.scale.calls,
        async || {
            call::plug(host, volume, "7").await?;
            let operation = call::mirror(host, volume, "7", &remote).await?;
            call::complete(host, &operation).await?;
            stats.push(timed(host, &Request::data("Data.stat", DBG, &operation)).await?.1);
            spawns.push(nothing(host).await?);
            let (_, took) = timed(host, &datapath("Datapath.deactivate", volume, "7")?).await?;
            call::call(host, &datapath("Datapath.detach", volume, "7")?).await?;
            Ok(took)
        },
        async || {
            call::attach(host, volume, "7").await?;
            let graph = Graph::of(stage, volume)?;
            let mut qmp = Qmp::connect(&graph.monitor).await?;
            graph.open(&mut qmp).await?;
            let took = graph.mirror_and_close(&mut qmp, &remote).await?;
            drop(qmp);
            call::call(host, &datapath("Datapath.detach", volume, "7")?).await?;
            Ok(took)
        },
    )
    .await?;
    call::unplug(other, &target, "MIR0be9c4").await?;
    call::destroy(other, &stage.destination_sr, &target).await?;
    let (what, samples) = ("Data.stat of a ready mirror", last(settings, stats));
    let stat = Figure::new("call-data-stat", what, Unit::Seconds, samples);
    Ok((taken, stat.against("/bin/true, run the same way", last(settings, spawns))))
}

/// The samples without those of a round to get warm.
fn last(settings: &Settings, mut samples: Vec<f64>) -> Vec<f64> {
    samples.split_off(samples.len().saturating_sub(settings.scale.calls))
}

/// What the plugin opens for a volume, to be opened by hand in the same daemon.
struct Graph {
    monitor: PathBuf,
    export: String,
    /// The images, the root first.
    images: Vec<PathBuf>,
}

impl Graph {
    fn of(stage: &Stage, volume: &Volume) -> Result<Self> {
        let monitor = stage.source.runtime_dir().join("volumes").join(&volume.key).join("mirror.sock");
        let sr = disk::Sr::read(&stage.source_path)?;
        let tree = sr.tree_of(&volume.key).context("a volume without a tree")?;
        let mut images = Vec::new();
        let mut next = tree.volumes.get(&volume.key).map(String::as_str);
        while let Some(node) = next {
            images.insert(0, tree.nodes.get(node).context("a node without a file")?.image.clone());
            next = tree.parent(node, Links::Records);
        }
        Ok(Self { monitor, export: volume.key.clone(), images })
    }

    fn top(&self) -> usize {
        self.images.len() - 1
    }

    fn format(&self, layer: usize, read_only: bool) -> Value {
        let backing = layer.checked_sub(1).map_or(Value::Null, |below| format!("bench-q{below}").into());
        json!({
            "driver": "qcow2", "node-name": format!("bench-q{layer}"), "file": format!("bench-f{layer}"),
            "read-only": read_only, "auto-read-only": false, "discard": "unmap", "backing": backing,
            "detect-zeroes": if read_only { "off" } else { "unmap" },
        })
    }

    /// Opens the chain and exports it; the seconds.
    async fn open(&self, qmp: &mut Qmp) -> Result<f64> {
        let began = Instant::now();
        for (layer, image) in self.images.iter().enumerate() {
            let read_only = layer < self.top();
            let file = json!({
                "driver": "file", "node-name": format!("bench-f{layer}"), "filename": image, "read-only": read_only,
                "auto-read-only": false, "discard": "unmap", "cache": {"direct": true}, "aio": "io_uring",
            });
            qmp.execute("blockdev-add", file).await?;
            qmp.execute("blockdev-add", self.format(layer, read_only)).await?;
        }
        let top = format!("bench-q{}", self.top());
        let export = json!({"type": "nbd", "id": "bench", "name": self.export, "node-name": top, "writable": true});
        qmp.execute("block-export-add", export).await?;
        Ok(began.elapsed().as_secs_f64())
    }

    /// Removes the export, flushes, and closes the chain; the seconds.
    async fn close(&self, qmp: &mut Qmp) -> Result<f64> {
        let began = Instant::now();
        qmp.execute("block-export-del", json!({"id": "bench", "mode": "hard"})).await?;
        qmp.event(|name, _| name == "BLOCK_EXPORT_DELETED").await?;
        qmp.execute("blockdev-reopen", json!({"options": [self.format(self.top(), true)]})).await?;
        for layer in (0..self.images.len()).rev() {
            for kind in ["q", "f"] {
                qmp.execute("blockdev-del", json!({"node-name": format!("bench-{kind}{layer}")})).await?;
            }
        }
        Ok(began.elapsed().as_secs_f64())
    }

    /// Mirrors until it is ready, then ends that and closes all; the seconds of the latter.
    async fn mirror_and_close(&self, qmp: &mut Qmp, remote: &Uri) -> Result<f64> {
        qmp.execute("blockdev-add", nbd_node("bench-target", remote.socket(), remote.export())).await?;
        qmp.mirror(mirror_job("bench", &format!("bench-q{}", self.top()), "bench-target")).await?;
        let began = Instant::now();
        qmp.end_mirror("bench").await?;
        qmp.execute("blockdev-del", json!({"node-name": "bench-target"})).await?;
        self.close(qmp).await?;
        Ok(began.elapsed().as_secs_f64())
    }
}
