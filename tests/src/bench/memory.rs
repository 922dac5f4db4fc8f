//! How much memory a script holds at most.
//!
//! A process that was forked counts its parent's memory in its ru_maxrss, so that is not what is read: a script's
//! standard output is a pipe that is full, and when the script waits for room in it, its work done, /proc says what its
//! most was.

use std::io::{PipeReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::call::{self, DBG, datapath, directory};
use super::{Bar, Figure, Measured, Settings, Unit};
use crate::host::Host;
use crate::scenario::Stage;
use crate::script::script_path;
use crate::wire::{Operation, Request};

const DISK: u64 = 64 << 20;
/// No script of a measurement takes longer, unless it hangs.
const BOUND: Duration = Duration::from_secs(60);
/// What a script may hold.
pub(super) const LIMIT: f64 = (8 << 20) as f64;

pub(super) async fn measure(settings: &Settings, stage: &Stage, measured: &mut Measured) -> Result<()> {
    let (host, other) = (&stage.source, &stage.destination);
    let (sr, other_sr) = (&stage.source_sr, &stage.destination_sr);
    let (volume, target) = (call::create(host, sr, DISK).await?, call::create(other, other_sr, DISK).await?);
    call::write_alone(host, &volume, [(0, 1 << 20)], 1).await?;
    let of = |method| Request::volume(method, DBG, &sr.0, &volume.key);
    let mut sizes = Vec::new();
    for _ in 0..settings.scale.calls.min(5) {
        let create = Request::volume_create(DBG, &sr.0, "a disk", "", DISK as i64, false);
        for request in [create, of("Volume.snapshot"), of("Volume.stat"), Request::sr("SR.ls", DBG, &sr.0)] {
            sizes.push((request.method, peak(host, &request).await?.1));
        }
    }
    measured.add(figure("memory-volume", "the volume plugin's scripts, the largest", sizes));

    let remote = call::plug(other, &target, "MIR0be9c4").await?;
    let mut sizes = Vec::new();
    for _ in 0..settings.scale.calls.min(5) {
        for method in ["Datapath.attach", "Datapath.activate"] {
            sizes.push((method, peak(host, &datapath(method, &volume, "7")?).await?.1));
        }
        let uri = volume.uri.first().context("the volume has no URI")?;
        let to = format!("nbd+unix:///{}?socket={}", remote.export(), remote.socket().display());
        let (answer, size) = peak(host, &Request::data_mirror(DBG, uri, "7", &to)).await?;
        let operation = Operation::decode(&answer)?;
        sizes.push(("Data.mirror", size));
        call::complete(host, &operation).await?;
        sizes.push(("Data.stat", peak(host, &Request::data("Data.stat", DBG, &operation)).await?.1));
        for method in ["Datapath.deactivate", "Datapath.detach"] {
            sizes.push((method, peak(host, &datapath(method, &volume, "7")?).await?.1));
        }
    }
    measured.add(figure("memory-datapath", "the datapath plugin's scripts, the largest", sizes));

    let operation = {
        call::plug(host, &volume, "7").await?;
        let operation = call::mirror(host, &volume, "7", &remote).await?;
        call::complete(host, &operation).await?;
        operation
    };
    let processes = host.leftovers().processes;
    let supervisor = processes.iter().find(|(_, command)| command.contains("mirror-supervisor"));
    if let Some((pid, _)) = supervisor {
        let bytes = peak_of(*pid)?;
        measured.add(Figure::new("memory-supervisor", "a mirror's supervisor", Unit::Bytes, vec![bytes as f64]));
    }
    call::unplug(host, &volume, "7").await?;
    call::call(host, &Request::data("Data.destroy", DBG, &operation)).await?;
    call::unplug(other, &target, "MIR0be9c4").await?;
    call::destroy(other, other_sr, &target).await?;
    for volume in host.sr_ls(DBG, sr).await? {
        call::destroy(host, sr, &volume).await?;
    }
    Ok(())
}

/// Of each method the most, and of these the largest as the figure.
fn figure(id: &str, what: &str, sizes: Vec<(&'static str, u64)>) -> Figure {
    let mut most = std::collections::BTreeMap::new();
    for (method, size) in sizes {
        let entry: &mut u64 = most.entry(method).or_default();
        *entry = (*entry).max(size);
    }
    let largest = most.values().copied().max().unwrap_or_default();
    let told: Vec<String> =
        most.iter().map(|(method, size)| format!("{method} {}", crate::draw::size(*size))).collect();
    Figure::new(id, what, Unit::Bytes, vec![largest as f64]).bar(Bar::Value(LIMIT)).note(told.join(", "))
}

/// Runs a script as [`crate::script::Runner`] does; its answer, and the most bytes of memory that it held.
pub(super) async fn peak(host: &Host, request: &Request) -> Result<(crate::wire::Json, u64)> {
    let script = script_path(directory(host, request.method)?, request.method)?;
    let (root, input) = (host.root().to_owned(), request.encode());
    let (answer, bytes) = tokio::task::spawn_blocking(move || run(&script, &root, &input)).await??;
    let text = String::from_utf8_lossy(&answer).into_owned();
    let answer = crate::wire::Json::parse(&answer).with_context(|| format!("{}: {text}", request.method))?;
    Ok((answer, bytes))
}

fn run(script: &Path, root: &Path, input: &str) -> Result<(Vec<u8>, u64)> {
    let (reader, mut writer) = std::io::pipe()?;
    rustix::pipe::fcntl_setpipe_size(&writer, 4096)?;
    let full = rustix::pipe::fcntl_getpipe_size(&writer)?;
    writer.write_all(&vec![b' '; full])?;
    let mut child = Command::new(script)
        .arg("--json")
        .current_dir("/")
        .env("XAPI_STORAGE_QCOW2_ROOT", root)
        .stdin(Stdio::piped())
        .stdout(Stdio::from(writer))
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| script.display().to_string())?;
    let outcome = watch(&mut child, reader, input, full);
    if outcome.is_err() {
        let _ = child.kill();
    }
    let status = child.wait()?;
    let (answer, bytes) = outcome.with_context(|| script.display().to_string())?;
    ensure!(status.success(), "{}: {status}: {}", script.display(), String::from_utf8_lossy(&answer));
    Ok((answer, bytes))
}

fn watch(child: &mut Child, mut reader: PipeReader, input: &str, full: usize) -> Result<(Vec<u8>, u64)> {
    let mut stdin = child.stdin.take().context("no stdin")?;
    stdin.write_all(input.as_bytes())?;
    drop(stdin);
    let pid = child.id();
    let deadline = Instant::now() + BOUND;
    loop {
        // Where in the kernel it sleeps; a name like pipe_write in every version.
        let place = std::fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
        if place.contains("pipe_write") {
            break;
        }
        ensure!(child.try_wait()?.is_none(), "it ended without writing an answer");
        ensure!(Instant::now() < deadline, "it never waits to write its answer, or the kernel does not tell");
        std::thread::sleep(Duration::from_micros(200));
    }
    let bytes = peak_of(pid)?;
    let mut answer = Vec::new();
    reader.read_to_end(&mut answer)?;
    Ok((answer.split_off(full), bytes))
}

/// The most memory that a process ever held, in bytes.
fn peak_of(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}
