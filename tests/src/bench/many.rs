//! The group of SRs with many volumes: what a call costs as their number grows.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::call::{self, DBG, nothing, timed};
use super::report::Chart;
use super::site::Copier;
use super::svg::Lines;
use super::{Bar, Figure, Measured, Settings, Unit, in_turn, memory};
use crate::disk::qemu_img;
use crate::scenario::Stage;
use crate::smapiv2::Sr;
use crate::wire::{Request, Volume};

const DISK: u64 = 1 << 30;
/// How much slower a stat may be in the largest SR than in the smallest: what is left to chance.
const GROWTH: f64 = 1.1;

/// Samples, by the number of volumes of the SR.
type BySize = Vec<(usize, Vec<f64>)>;

pub(super) async fn measure(settings: &Settings, measured: &mut Measured) -> Result<()> {
    let stage = settings.stage(true).await?;
    let result = grow(settings, &stage, measured).await;
    stage.close().await;
    result
}

async fn grow(settings: &Settings, stage: &Stage, measured: &mut Measured) -> Result<()> {
    let (host, sr, scale) = (&stage.source, &stage.source_sr, &settings.scale);
    // One tree in three has a snapshot; the others are lone disks.
    for _ in 0..3 {
        call::create(host, sr, DISK).await?;
    }
    let real = host.sr_ls(DBG, sr).await?;
    call::snapshot(host, sr, real.first().context("no volume")?).await?;
    let mut copier = Copier::of(&stage.source_path)?;
    let (mut stats, mut scans) = (BySize::new(), BySize::new());
    let (mut stat_spawns, mut scan_spawns) = (Vec::new(), Vec::new());
    let mut memories = Vec::new();
    for count in scale.volumes {
        let path = stage.source_path.clone();
        copier = tokio::task::spawn_blocking(move || -> Result<Copier> {
            copier.fill(&path, count)?;
            Ok(copier)
        })
        .await??;
        let listed = Volume::decode_list(&call::call(host, &Request::sr("SR.ls", DBG, &sr.0)).await?)?;
        ensure!(listed.len() == count, "SR.ls has {} volumes, not {count}", listed.len());
        let asked: Vec<&Volume> = listed.iter().step_by((count / 7).max(1)).collect();
        let mut next = asked.iter().cycle();
        let (calls, spawns) = in_turn(
            scale.calls,
            async || {
                let volume = next.next().context("an SR without volumes")?;
                Ok(timed(host, &Request::volume("Volume.stat", DBG, &sr.0, &volume.key)).await?.1)
            },
            async || nothing(host).await,
        )
        .await?;
        stats.push((count, calls));
        stat_spawns = if count == scale.volumes[2] { spawns } else { stat_spawns };
        let (calls, spawns) = in_turn(
            scale.scans,
            async || Ok(timed(host, &Request::sr("SR.ls", DBG, &sr.0)).await?.1),
            async || nothing(host).await,
        )
        .await?;
        scans.push((count, calls));
        memories.push(memory::peak(host, &Request::sr("SR.ls", DBG, &sr.0)).await?.1 as f64);
        scan_spawns = if count == scale.volumes[2] { spawns } else { scan_spawns };
    }
    check(&stage.source_path, copier.copies())?;
    growth(settings, stage, measured).await?;
    told(scale.volumes, &stats, &scans, (stat_spawns, scan_spawns), measured);

    let [.., many, most] = scale.volumes;
    let figure = |id: &str, count: usize, bytes| {
        let what = format!("memory of SR.ls, SR of {count} volumes");
        Figure::new(id, what, Unit::Bytes, vec![bytes])
    };
    let [.., of_many, of_most] = memories[..] else { bail!("an SR was not measured") };
    measured.add(figure("scan-memory", many, of_many).bar(Bar::Value(memory::LIMIT)));
    measured.add(figure("scan-memory-most", most, of_most));
    // A copied volume is one like any other.
    let copied = Volume::decode_list(&call::call(host, &Request::sr("SR.ls", DBG, &sr.0)).await?)?;
    let copied = copied.iter().find(|volume| real.iter().all(|one| one.key != volume.key));
    let copied = copied.context("no volume was copied")?;
    call::write_alone(host, copied, [(0, 1 << 16)], 1).await?;
    call::snapshot(host, sr, copied).await.map(drop)
}

/// Volume.stat in the largest SR and in one as small as the smallest was, by turns.
async fn growth(settings: &Settings, stage: &Stage, measured: &mut Measured) -> Result<()> {
    let (host, scale) = (&stage.source, &settings.scale);
    let [few, .., most] = scale.volumes;
    for _ in 0..few {
        call::create(host, &stage.destination_sr, DISK).await?;
    }
    let mut asked = Vec::new();
    for sr in [&stage.source_sr, &stage.destination_sr] {
        let volumes = Volume::decode_list(&call::call(host, &Request::sr("SR.ls", DBG, &sr.0)).await?)?;
        let step = (volumes.len() / 7).max(1);
        asked.push((sr, volumes.into_iter().step_by(step).collect::<Vec<_>>()));
    }
    let [(large, of_large), (small, of_small)] = &asked[..] else { bail!("two SRs were listed") };
    let (mut of_large, mut of_small) = (of_large.iter().cycle(), of_small.iter().cycle());
    let stat = async |sr: &Sr, volume: Option<&Volume>| {
        let volume = volume.context("an SR without volumes")?;
        Ok(timed(host, &Request::volume("Volume.stat", DBG, &sr.0, &volume.key)).await?.1)
    };
    let (large, small) = in_turn(
        scale.calls,
        async || stat(large, of_large.next()).await,
        async || stat(small, of_small.next()).await,
    )
    .await?;
    let figure = Figure::new("stat-growth", format!("Volume.stat, SR of {most} volumes"), Unit::Seconds, large);
    measured.add(figure.against(format!("in one of {few}, by turns"), small).bar(Bar::Times(GROWTH)));
    Ok(())
}

/// The figures of the issue and the chart over all sizes.
fn told(
    volumes: [usize; 4],
    stats: &BySize,
    scans: &BySize,
    (stat_spawns, scan_spawns): (Vec<f64>, Vec<f64>),
    measured: &mut Measured,
) {
    let of = |samples: &BySize, count: usize| {
        samples.iter().find(|(of, _)| *of == count).map_or_else(Vec::new, |(_, samples)| samples.clone())
    };
    let [.., many, most] = volumes;
    let spawn = "/bin/true, run the same way";
    let figure = |id, what: String, samples, against: String, reference, times| {
        Figure::new(id, what, Unit::Seconds, samples).against(against, reference).bar(Bar::Times(times))
    };
    let name = |what: &str, count| format!("{what}, SR of {count} volumes");
    let stat = |count| name("Volume.stat", count);
    measured.add(figure("stat", stat(many), of(stats, many), spawn.into(), stat_spawns, 4.0));
    let scan = |count| name("SR.ls", count);
    measured.add(figure("scan", scan(many), of(scans, many), spawn.into(), scan_spawns, 40.0));
    measured.add(figure("scan-growth", scan(most), of(scans, most), scan(many), of(scans, many), 12.0));
    let line = |name: &str, samples: &BySize| {
        let point =
            |(count, samples): &(usize, Vec<f64>)| (*count as f64, super::Samples(samples.clone()).median() * 1e3);
        (name.to_owned(), samples.iter().map(point).collect())
    };
    let lines = Lines {
        title: "Calls in SRs of many volumes".to_owned(),
        x: "volumes".to_owned(),
        y: "ms".to_owned(),
        logarithmic: true,
        lines: vec![line("Volume.stat", stats), line("SR.ls", scans)],
    };
    measured.charts.push(("scale".to_owned(), Chart::Lines(lines)));
}

/// Sees by qemu-img that some of the copied images are what they say.
fn check(sr: &Path, copies: &[String]) -> Result<()> {
    for tree in copies.iter().step_by((copies.len() / 5).max(1)) {
        for entry in std::fs::read_dir(sr.join("trees").join(tree))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "qcow2") {
                let check = qemu_img::check(&path)?;
                ensure!(check.corruptions == 0 && check.check_errors == 0, "{}: {check:?}", path.display());
            }
        }
    }
    Ok(())
}
