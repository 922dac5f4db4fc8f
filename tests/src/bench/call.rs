//! Calls of scripts as xapi makes them, and how long they took.

use std::ffi::OsStr;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;

use crate::host::Host;
use crate::nbd::{Client, Uri};
use crate::plan::fill;
use crate::script::Exit;
use crate::smapiv2::Sr;
use crate::wire::{Attached, Json, MirrorStatus, Operation, Request, Volume};

/// What xapi would put here: the task's reference.
pub(super) const DBG: &str = "OpaqueRef:bench";
/// The SR type of the volume plugin.
pub(super) const KIND: &str = "qcow2";

/// Bytes of one write that fills a volume.
const PIECE: u64 = 1 << 20;

/// Calls a script.
pub(super) async fn call(host: &Host, request: &Request) -> Result<Json> {
    let answer = host.runner().call(directory(host, request.method)?, request).await;
    answer.with_context(|| request.method)
}

/// Calls a script and says how many seconds that took, from before the process was made until its output was read.
pub(super) async fn timed(host: &Host, request: &Request) -> Result<(Json, f64)> {
    let began = Instant::now();
    let answer = call(host, request).await?;
    Ok((answer, began.elapsed().as_secs_f64()))
}

/// The directory of the plugin that has a method.
pub(super) fn directory<'a>(host: &'a Host, method: &str) -> Result<&'a Path> {
    if method.starts_with("Data") {
        let plugin = host.datapath_plugins.get("qsd").context("there is no datapath plugin")?;
        return Ok(&plugin.dir);
    }
    Ok(&host.volume_plugin(KIND)?.dir)
}

/// Runs a program in the way of a script; its seconds.
pub(super) async fn program(host: &Host, path: &Path, arguments: &[&OsStr]) -> Result<f64> {
    let began = Instant::now();
    let output = host.runner().run_program(path, arguments).await?;
    let took = began.elapsed().as_secs_f64();
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.exit == Exit::Success, "{} ended with {:?}: {stderr}", path.display(), output.exit);
    Ok(took)
}

/// What every call is held against: the same way to a process that does nothing.
pub(super) async fn nothing(host: &Host) -> Result<f64> {
    program(host, Path::new("/bin/true"), &[]).await
}

/// `Volume.create`
pub(super) async fn create(host: &Host, sr: &Sr, bytes: u64) -> Result<Volume> {
    let request = Request::volume_create(DBG, &sr.0, "a disk", "of a measurement", i64::try_from(bytes)?, false);
    Ok(Volume::decode(&call(host, &request).await?, "Volume.create")?)
}

/// `Volume.snapshot`
pub(super) async fn snapshot(host: &Host, sr: &Sr, volume: &Volume) -> Result<Volume> {
    let request = Request::volume("Volume.snapshot", DBG, &sr.0, &volume.key);
    Ok(Volume::decode(&call(host, &request).await?, "Volume.snapshot")?)
}

/// `Volume.destroy`
pub(super) async fn destroy(host: &Host, sr: &Sr, volume: &Volume) -> Result<()> {
    call(host, &Request::volume("Volume.destroy", DBG, &sr.0, &volume.key)).await.map(drop)
}

/// The request of a datapath call for a volume.
pub(super) fn datapath(method: &'static str, volume: &Volume, domain: &str) -> Result<Request> {
    let uri = volume.uri.first().context("the volume has no URI")?;
    Ok(Request::datapath(method, DBG, uri, domain))
}

/// `Datapath.attach`; the NBD server.
pub(super) async fn attach(host: &Host, volume: &Volume, domain: &str) -> Result<Uri> {
    let answer = call(host, &datapath("Datapath.attach", volume, domain)?).await?;
    let attached = Attached::decode(&answer)?;
    Ok(Uri::parse(attached.nbd().context("no NBD server in the answer of attach")?)?)
}

/// `Datapath.attach` and `activate`; the NBD server.
pub(super) async fn plug(host: &Host, volume: &Volume, domain: &str) -> Result<Uri> {
    let uri = attach(host, volume, domain).await?;
    call(host, &datapath("Datapath.activate", volume, domain)?).await?;
    Ok(uri)
}

/// `Datapath.deactivate` and `detach`
pub(super) async fn unplug(host: &Host, volume: &Volume, domain: &str) -> Result<()> {
    for method in ["Datapath.deactivate", "Datapath.detach"] {
        call(host, &datapath(method, volume, domain)?).await?;
    }
    Ok(())
}

/// `Data.mirror` to an NBD server behind a Unix socket.
pub(super) async fn mirror(host: &Host, volume: &Volume, domain: &str, to: &Uri) -> Result<Operation> {
    let uri = volume.uri.first().context("the volume has no URI")?;
    let remote = format!("nbd+unix:///{}?socket={}", to.export(), to.socket().display());
    let answer = call(host, &Request::data_mirror(DBG, uri, domain, &remote)).await?;
    Ok(Operation::decode(&answer)?)
}

/// Asks, without a pause, until a mirror is complete.
pub(super) async fn complete(host: &Host, operation: &Operation) -> Result<()> {
    loop {
        let answer = call(host, &Request::data("Data.stat", DBG, operation)).await?;
        let status = MirrorStatus::decode(&answer)?;
        if status.complete {
            return Ok(());
        }
        ensure!(!status.failed, "the mirror failed");
    }
}

/// Writes bytes that nothing can compress to ranges of an export, and flushes.
pub(super) async fn write(uri: &Uri, ranges: impl IntoIterator<Item = (u64, u64)>, seed: u64) -> Result<()> {
    let client = Client::connect(uri).await?;
    let mut writes = tokio::task::JoinSet::new();
    for (offset, length) in ranges {
        let mut done = 0;
        while done < length {
            let (at, size) = (offset + done, PIECE.min(length - done));
            let client = client.clone();
            writes.spawn(async move {
                let mut data = vec![0; size as usize];
                fill(&mut data, at, seed);
                client.write(at, Bytes::from(data)).await
            });
            done += size;
            while writes.len() >= 8 {
                let Some(written) = writes.join_next().await else { break };
                written??;
            }
        }
    }
    while let Some(written) = writes.join_next().await {
        written??;
    }
    client.flush().await?;
    client.disconnect().await;
    Ok(())
}

/// Writes to a volume that nobody uses, as a guest that is started and shut down for it.
pub(super) async fn write_alone(
    host: &Host,
    volume: &Volume,
    ranges: impl IntoIterator<Item = (u64, u64)>,
    seed: u64,
) -> Result<()> {
    let uri = plug(host, volume, "7").await?;
    write(&uri, ranges, seed).await?;
    unplug(host, volume, "7").await
}
