//! The group of single calls: what each costs as a process, several at once, and how much memory they take.

use std::ffi::OsStr;
use std::path::Path;

use anyhow::{Context, Result};

use super::call::{self, DBG, datapath, nothing, timed};
use super::{Bar, Figure, Measured, Settings, Unit, crowd, datapath as qmp, in_turn, memory};
use crate::disk;
use crate::scenario::Stage;
use crate::wire::{Request, Volume};

/// The size of the disks, of which nothing is written.
const DISK: u64 = 1 << 30;
/// What all calls are held against.
const SPAWN: &str = "/bin/true, run the same way";

pub(super) async fn measure(settings: &Settings, measured: &mut Measured) -> Result<()> {
    let stage = settings.stage(false).await?;
    let result = async {
        volumes(settings, &stage, measured).await.context("volume calls")?;
        datapaths(settings, &stage, measured).await.context("datapath calls")?;
        qmp::measure(settings, &stage, measured).await.context("datapath calls against QMP")?;
        crowd::measure(settings, &stage, measured).await.context("calls at once")?;
        memory::measure(settings, &stage, measured).await.context("memory")
    }
    .await;
    stage.close().await;
    let single: Vec<String> =
        measured.figures.iter().map(|figure| figure.id.clone()).filter(|id| id.starts_with("call-")).collect();
    let single: Vec<&str> = single.iter().map(String::as_str).collect();
    measured.chart("calls", "Single calls as processes", ("ms", 1e-3), &single);
    measured.chart(
        "datapath",
        "Datapath calls against QMP alone",
        ("ms", 1e-3),
        &["activate", "activate-chain", "deactivate", "deactivate-mirror"],
    );
    measured.chart("memory", "Memory of a script", ("MiB", 1024.0 * 1024.0), &["memory-volume", "memory-datapath"]);
    result
}

/// Samples of a call, each beside a spawn; `request` is asked anew for every one.
async fn beside_a_spawn(
    settings: &Settings,
    stage: &Stage,
    method: &'static str,
    mut request: impl AsyncFnMut() -> Result<Request>,
) -> Result<Figure> {
    let host = &stage.source;
    let (calls, spawns) = in_turn(
        settings.scale.calls,
        async || Ok(timed(host, &request().await?).await?.1),
        async || nothing(host).await,
    )
    .await?;
    let id = format!("call-{}", method.to_lowercase().replace('.', "-"));
    Ok(Figure::new(id, method, Unit::Seconds, calls).against(SPAWN, spawns))
}

async fn volumes(settings: &Settings, stage: &Stage, measured: &mut Measured) -> Result<()> {
    let (host, sr) = (&stage.source, &stage.source_sr);
    let volume = call::create(host, sr, DISK).await?;
    let query = async || Ok(Request::query(DBG));
    measured.add(beside_a_spawn(settings, stage, "Plugin.Query", query).await?);
    let stat = async || Ok(Request::sr("SR.stat", DBG, &sr.0));
    measured.add(beside_a_spawn(settings, stage, "SR.stat", stat).await?);
    let stat = async || Ok(Request::volume("Volume.stat", DBG, &sr.0, &volume.key));
    measured.add(beside_a_spawn(settings, stage, "Volume.stat", stat).await?);
    let mut number = 0;
    let set = async || {
        number += 1;
        Ok(Request::volume_set(DBG, &sr.0, &volume.key, "key", &number.to_string()))
    };
    measured.add(beside_a_spawn(settings, stage, "Volume.set", set).await?);
    let create = async || Ok(Request::volume_create(DBG, &sr.0, "a disk", "", DISK as i64, false));
    measured.add(beside_a_spawn(settings, stage, "Volume.create", create).await?);
    measured.add(snapshots(settings, stage).await?);
    let clone = async || Ok(Request::volume("Volume.clone", DBG, &sr.0, &volume.key));
    measured.add(beside_a_spawn(settings, stage, "Volume.clone", clone).await?);
    let destroy = async || {
        let volume = call::create(host, sr, DISK).await?;
        Ok(Request::volume("Volume.destroy", DBG, &sr.0, &volume.key))
    };
    measured.add(beside_a_spawn(settings, stage, "Volume.destroy", destroy).await?);
    for volume in host.sr_ls(DBG, sr).await? {
        call::destroy(host, sr, &volume).await?;
    }
    Ok(())
}

/// Volume.snapshot of a volume that nobody uses, against the qemu-img that makes an overlay on the same node.
async fn snapshots(settings: &Settings, stage: &Stage) -> Result<Figure> {
    let (host, sr) = (&stage.source, &stage.source_sr);
    let base = call::create(host, sr, DISK).await?;
    let image = disk::Sr::read(&stage.source_path)?.node_of(&base.key)?.image.clone();
    let overlay = stage.source_path.join("overlay.qcow2");
    let qemu_img = tool("qemu-img")?;
    let mut waiting: Vec<Volume> = Vec::new();
    for _ in 0..=settings.scale.calls {
        waiting.push(call::create(host, sr, DISK).await?);
    }
    let arguments: [&OsStr; 8] = [
        "create".as_ref(),
        "-q".as_ref(),
        "-f".as_ref(),
        "qcow2".as_ref(),
        "-F".as_ref(),
        "qcow2".as_ref(),
        "-b".as_ref(),
        image.as_ref(),
    ];
    let arguments = [arguments.as_slice(), &[overlay.as_ref()]].concat();
    let (calls, references) = in_turn(
        settings.scale.calls,
        async || {
            let volume = waiting.pop().context("a volume for each sample")?;
            Ok(timed(host, &Request::volume("Volume.snapshot", DBG, &sr.0, &volume.key)).await?.1)
        },
        async || {
            let took = call::program(host, &qemu_img, &arguments).await?;
            std::fs::remove_file(&overlay)?;
            Ok(took)
        },
    )
    .await?;
    Ok(Figure::new("call-volume-snapshot", "Volume.snapshot, inactive", Unit::Seconds, calls)
        .against("qemu-img create of the overlay, run the same way; it syncs nothing", references)
        .bar(Bar::Times(2.5)))
}

/// Calls of one volume from attach to detach; each sample of all is one round.
async fn datapaths(settings: &Settings, stage: &Stage, measured: &mut Measured) -> Result<()> {
    let (host, sr) = (&stage.source, &stage.source_sr);
    let volume = call::create(host, sr, DISK).await?;
    let methods = ["Datapath.attach", "Datapath.activate", "Datapath.deactivate", "Datapath.detach"];
    let mut samples: Vec<(Vec<f64>, Vec<f64>)> = vec![Default::default(); methods.len()];
    // As `in_turn` does it, with a round to get warm.
    let warm = usize::from(settings.scale.calls > 1);
    for round in 0..settings.scale.calls + warm {
        for (method, (calls, spawns)) in methods.into_iter().zip(&mut samples) {
            let (_, took) = timed(host, &datapath(method, &volume, "7")?).await?;
            let spawn = nothing(host).await?;
            if round >= warm {
                calls.push(took);
                spawns.push(spawn);
            }
        }
    }
    for (method, (calls, spawns)) in methods.into_iter().zip(samples) {
        let id = format!("call-{}", method.to_lowercase().replace('.', "-"));
        measured.add(Figure::new(id, method, Unit::Seconds, calls).against(SPAWN, spawns));
    }
    call::destroy(host, sr, &volume).await
}

/// A program of QEMU, where a shell would find it.
pub(super) fn tool(name: &str) -> Result<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut found = std::env::split_paths(&path).map(|directory| directory.join(name));
    found.find(|path| Path::new(path).is_file()).with_context(|| format!("there is no {name}"))
}
