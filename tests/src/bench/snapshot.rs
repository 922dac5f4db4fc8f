//! The group of snapshots under a guest: the longest write around one, and while what a deleted one leaves is merged.

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;

use super::call;
use super::random::Random;
use super::report::Chart;
use super::svg::Lines;
use super::{Bar, Figure, Measured, Settings, Unit};
use crate::nbd::{Client, Uri};
use crate::scenario::Stage;
use crate::wire::Volume;

/// Bytes of one write.
const BLOCK: u64 = 4096;
const DISK: u64 = 1 << 30;

pub(super) async fn measure(settings: &Settings, measured: &mut Measured) -> Result<()> {
    let stage = settings.stage(true).await?;
    let snapshots = with_guest(settings, &stage, measured).await;
    let result = match snapshots {
        Ok(()) => merging(settings, &stage, measured).await,
        failed => failed,
    };
    stage.close().await;
    result
}

/// Measures the longest write while the nodes of a snapshot that was destroyed are merged.
async fn merging(settings: &Settings, stage: &Stage, measured: &mut Measured) -> Result<()> {
    let (host, sr, scale) = (&stage.source, &stage.source_sr, &settings.scale);
    let volume = call::create(host, sr, DISK).await?;
    let uri = call::plug(host, &volume, "8").await?;
    call::write(&uri, [(0, scale.guest)], 1).await?;
    let mut guest = Guest::start(&uri, scale.guest).await?;
    let script = std::fs::canonicalize(call::directory(host, "Volume.destroy")?.join("Volume.destroy"))?;
    let arguments: [&OsStr; 2] = ["gc".as_ref(), sr.0.as_ref()];
    let (mut during, mut without, mut took) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..scale.snapshots.div_ceil(4) {
        let snapshot = call::snapshot(host, sr, &volume).await?;
        // What is written to its overlay is what there is to merge.
        guest.longest_in(scale.window, async || Ok(())).await?;
        call::destroy(host, sr, &snapshot).await?;
        let began = Instant::now();
        let merge = async || {
            took.push(call::program(host, &script, &arguments).await?);
            Ok(())
        };
        during.push(guest.longest_in(scale.window, merge).await?);
        // The longest of many is longer than that of a few: it is watched for as long, and on a new overlay too.
        let as_long = began.elapsed();
        let snapshot = call::snapshot(host, sr, &volume).await?;
        without.push(guest.longest_in(as_long, async || Ok(())).await?);
        call::destroy(host, sr, &snapshot).await?;
    }
    let (count, median) = guest.stop().await?;
    call::unplug(host, &volume, "8").await?;
    let took = super::Samples(took).median();
    let note = format!(
        "{count} writes of 4 KiB at queue depth 1, half of them in {:.2} ms; half of the merges took {took:.1} s",
        median * 1e3
    );
    measured.add(
        Figure::new("merge", "the longest write while nodes are merged", Unit::Seconds, during)
            .against("the same time without, on a new overlay too", without)
            .bar(Bar::More(0.050))
            .note(note),
    );
    Ok(())
}

async fn with_guest(settings: &Settings, stage: &Stage, measured: &mut Measured) -> Result<()> {
    let (host, sr, scale) = (&stage.source, &stage.source_sr, &settings.scale);
    let volume = call::create(host, sr, DISK).await?;
    let uri = call::plug(host, &volume, "7").await?;
    call::write(&uri, [(0, scale.guest)], 1).await?;
    let mut guest = Guest::start(&uri, scale.guest).await?;
    let (mut around, mut without) = (Vec::new(), Vec::new());
    for _ in 0..scale.snapshots {
        without.push(guest.longest_in(scale.window, async || Ok(())).await?);
        around.push(guest.longest_in(scale.window, async || snapshot(stage, &volume).await).await?);
    }
    let (count, median) = guest.stop().await?;
    call::unplug(host, &volume, "7").await?;

    let points = |samples: &[f64]| (1u32..).map(f64::from).zip(samples.iter().map(|s| s * 1e3)).collect();
    let lines = vec![("with a snapshot".to_owned(), points(&around)), ("without".to_owned(), points(&without))];
    measured.charts.push((
        "snapshot".to_owned(),
        Chart::Lines(Lines {
            title: "Longest write of a guest around a live snapshot".to_owned(),
            x: "snapshot".to_owned(),
            y: "ms".to_owned(),
            logarithmic: false,
            lines,
        }),
    ));
    let note = format!("{count} writes of 4 KiB at queue depth 1, half of them in {:.2} ms", median * 1e3);
    measured.add(
        Figure::new("snapshot", "the longest write around a live snapshot", Unit::Seconds, around)
            .against("the same time without one", without)
            .bar(Bar::More(0.010))
            .note(note),
    );
    Ok(())
}

async fn snapshot(stage: &Stage, volume: &Volume) -> Result<()> {
    call::snapshot(&stage.source, &stage.source_sr, volume).await.map(drop)
}

/// Writes one block after the other, each when the one before is acknowledged.
struct Guest {
    stopping: Arc<AtomicBool>,
    writes: tokio::sync::mpsc::UnboundedReceiver<(Instant, Instant)>,
    task: tokio::task::JoinHandle<Result<()>>,
    seen: Vec<(Instant, Instant)>,
}

impl Guest {
    async fn start(uri: &Uri, region: u64) -> Result<Self> {
        let client = Client::connect(uri).await?;
        let stopping = Arc::new(AtomicBool::new(false));
        let (tell, writes) = tokio::sync::mpsc::unbounded_channel();
        let task = {
            let stopping = Arc::clone(&stopping);
            tokio::spawn(async move {
                let mut random = Random::new(1);
                while !stopping.load(Ordering::Acquire) {
                    let number = random.next();
                    let offset = number % (region / BLOCK) * BLOCK;
                    let data = Bytes::from(vec![number as u8 | 1; BLOCK as usize]);
                    let sent = Instant::now();
                    client.write(offset, data).await?;
                    if tell.send((sent, Instant::now())).is_err() {
                        break;
                    }
                }
                client.disconnect().await;
                Ok(())
            })
        };
        Ok(Self { stopping, writes, task, seen: Vec::new() })
    }

    /// The longest write of those that a window saw, in the middle of which something is done; in seconds.
    async fn longest_in(&mut self, window: Duration, done: impl AsyncFnOnce() -> Result<()>) -> Result<f64> {
        let began = Instant::now();
        tokio::time::sleep(window / 2).await;
        done().await?;
        // However long it took, the time after it is watched too.
        tokio::time::sleep(window / 2).await;
        let ended = Instant::now();
        // The write that was under way when the window ended counts: it is waited for.
        loop {
            let write = self.writes.recv().await.context("the guest has stopped")?;
            self.seen.push(write);
            if write.1 >= ended {
                break;
            }
        }
        let seen = self.seen.iter().rev().take_while(|(_, acknowledged)| *acknowledged >= began);
        let longest = seen.map(|(sent, acknowledged)| *acknowledged - *sent).max();
        Ok(longest.context("the guest wrote nothing")?.as_secs_f64())
    }

    /// Stops it: how many writes there were, and how many seconds the median took.
    async fn stop(mut self) -> Result<(usize, f64)> {
        self.stopping.store(true, Ordering::Release);
        self.task.await??;
        while let Ok(write) = self.writes.try_recv() {
            self.seen.push(write);
        }
        ensure!(!self.seen.is_empty(), "the guest wrote nothing");
        let samples = self.seen.iter().map(|(sent, acknowledged)| (*acknowledged - *sent).as_secs_f64()).collect();
        Ok((self.seen.len(), super::Samples(samples).median()))
    }
}
