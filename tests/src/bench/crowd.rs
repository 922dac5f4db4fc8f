//! Calls at once on as many disks: whether they run side by side, and whether one waits for another's lock.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::task::JoinSet;

use super::call::{self, DBG, datapath};
use super::{Bar, Figure, Measured, Settings, Unit, in_turn};
use crate::host::Host;
use crate::scenario::Stage;
use crate::wire::{Request, Volume};

const DISK: u64 = 1 << 30;
/// How long calls on other disks may take while one disk's lock is held.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) async fn measure(settings: &Settings, stage: &Stage, measured: &mut Measured) -> Result<()> {
    let (host, sr) = (&stage.source, &stage.source_sr);
    let mut volumes = Vec::new();
    for _ in 0..settings.scale.crowd {
        volumes.push(call::create(host, sr, DISK).await?);
    }
    let count = volumes.len();
    let snapshots: Vec<Request> =
        volumes.iter().map(|volume| Request::volume("Volume.snapshot", DBG, &sr.0, &volume.key)).collect();
    let runs = settings.scale.crowd_runs;
    let (at_once, in_a_row) =
        in_turn(runs, async || all_at_once(host, &snapshots).await, async || one_by_one(host, &snapshots).await)
            .await?;
    let after = "the same, one after another";
    measured.add(
        Figure::new("crowd-snapshot", format!("{count} × Volume.snapshot at once"), Unit::Seconds, at_once)
            .against(after, in_a_row)
            .bar(Bar::Times(0.7)),
    );
    measured.add(waiting(stage, &volumes).await?);

    for volume in &volumes {
        call::attach(host, volume, "7").await?;
    }
    let of = |method| volumes.iter().map(|volume| datapath(method, volume, "7")).collect::<Result<Vec<_>>>();
    let (activate, deactivate) = (of("Datapath.activate")?, of("Datapath.deactivate")?);
    let (at_once, in_a_row) = in_turn(
        runs,
        async || {
            let took = all_at_once(host, &activate).await?;
            all_at_once(host, &deactivate).await?;
            Ok(took)
        },
        async || {
            let took = one_by_one(host, &activate).await?;
            all_at_once(host, &deactivate).await?;
            Ok(took)
        },
    )
    .await?;
    measured.add(
        Figure::new("crowd-activate", format!("{count} × Datapath.activate at once"), Unit::Seconds, at_once)
            .against(after, in_a_row)
            .bar(Bar::Times(0.7)),
    );
    all_at_once(host, &of("Datapath.detach")?).await?;
    for volume in host.sr_ls(DBG, sr).await? {
        call::destroy(host, sr, &volume).await?;
    }
    measured.chart("crowd", "Calls on many disks", ("s", 1.0), &["crowd-snapshot", "crowd-activate"]);
    Ok(())
}

async fn one_by_one(host: &Host, requests: &[Request]) -> Result<f64> {
    let began = Instant::now();
    for request in requests {
        call::call(host, request).await?;
    }
    Ok(began.elapsed().as_secs_f64())
}

async fn all_at_once(host: &Arc<Host>, requests: &[Request]) -> Result<f64> {
    let began = Instant::now();
    let mut calls = start(host, requests);
    while let Some(ended) = calls.join_next().await {
        ended??;
    }
    Ok(began.elapsed().as_secs_f64())
}

fn start(host: &Arc<Host>, requests: &[Request]) -> JoinSet<Result<()>> {
    let mut calls = JoinSet::new();
    for request in requests {
        let (host, request) = (Arc::clone(host), request.clone());
        calls.spawn(async move { call::call(&host, &request).await.map(drop) });
    }
    calls
}

/// How many calls do not end while somebody holds the lock of a disk that they are not about.
async fn waiting(stage: &Stage, volumes: &[Volume]) -> Result<Figure> {
    let (host, sr) = (&stage.source, &stage.source_sr);
    let (locked, others) = volumes.split_first().context("no disks")?;
    // The tree's lock, which every call that changes the disk takes.
    let path = stage.source_path.join("volumes").join(&locked.key).join("lock");
    let lock = File::open(&path).with_context(|| path.display().to_string())?;
    lock.lock()?;
    let snapshot = |volume: &Volume| Request::volume("Volume.snapshot", DBG, &sr.0, &volume.key);
    let mut held = start(host, &[snapshot(locked)]);
    let mut free = start(host, &others.iter().map(snapshot).collect::<Vec<_>>());
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while let Ok(Some(ended)) = tokio::time::timeout_at(deadline, free.join_next()).await {
        ended??;
    }
    let waited = free.len();
    let kept = held.try_join_next().is_none();
    lock.unlock()?;
    while let Some(ended) = free.join_next().await {
        ended??;
    }
    while let Some(ended) = held.join_next().await {
        ended??;
    }
    let note = if kept { "the call on the locked disk waited" } else { "the call on the locked disk DID NOT WAIT" };
    let what = format!("of {} calls, those that wait for another disk's lock", others.len());
    Ok(Figure::new("crowd-waiting", what, Unit::Count, vec![waited as f64]).bar(Bar::Value(0.0)).note(note))
}
