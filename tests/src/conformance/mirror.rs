//! Data.mirror from one volume to another of the same host, through the other's NBD server as it is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use uuid::Uuid;

use super::bench::{DBG, MIB, leftovers, nbd_of};
use super::live::{guest, has_all_writes, writes};
use super::relay::Relay;
use super::request::remote_of;
use super::{Bench, Group, Need, answer};
use crate::disk::qemu_img;
use crate::nbd::{Client, Uri};
use crate::wire::{MirrorStatus, Operation, Request, Volume};

const MIRROR: Need = Need::Method("Data.mirror");
const STAT: Need = Need::Method("Data.stat");
const READONLY: Need = Need::Method("Datapath.activate_readonly");
const SNAPSHOT: Need = Need::Method("Volume.snapshot");

/// Data.stat may wait for something to tell, but about a second.
const STAT_BOUND: Duration = Duration::from_millis(2500);

/// How often it may take longer in a row: the machine may be busy, but not each time.
const SLOW: usize = 4;

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("Data.stat of an unknown key says failed and not complete, and does not fail", &[STAT], unknown);
    group.add("Data.stat of a malformed key says failed and not complete, and does not fail", &[STAT], malformed);
    group.add(
        "Data.mirror of a snapshot completes by itself with the same bytes",
        &[MIRROR, READONLY, SNAPSHOT],
        snapshot,
    );
    group.add("Data.mirror of a live leaf keeps every write of its guest", &[MIRROR], live_leaf);
    group.add(
        "Data.mirror of an inactive leaf, as of a halted VM, completes with the same bytes",
        &[MIRROR],
        inactive,
    );
    group.add("Data.mirror carries zeroes over a target that is not blank", &[MIRROR], over_data);
    group.add("Data.mirror makes exactly one connection, and none after it", &[MIRROR], one_connection);
    group.add(
        "snapshots of one disk are mirrored one after the other to one export",
        &[MIRROR, READONLY, SNAPSHOT],
        tree,
    );
    group.add("Data.stat answers within about a second while a mirror cannot go on", &[MIRROR], stat_is_quick);
    group.add("Data.stat's progress stays between 0 and 1 and does not go back", &[MIRROR], progress);
    group.add("Data.ls lists a mirror", &[MIRROR, Need::Method("Data.ls")], listed);
    group.add("a mirror ends when the datapath of its source is taken down", &[MIRROR], ends_with_datapath);
}

/// A blank target and how Data.mirror is told of it.
pub(super) async fn target(b: &Bench, size: i64) -> Result<(Volume, Uri)> {
    let target = b.create(size).await?;
    let uri = b.plug(&target, "MIR0a1b2c").await?;
    Ok((target, uri))
}

/// Sees that a mirror has become what it is a mirror of. Both must be inactive.
pub(super) async fn same(b: &Bench, source: &Volume, target: &Volume) -> Result<()> {
    if b.subject.own_layout {
        let image = |key: &str| super::invariant::image_of(&b.sr.path, key);
        ensure!(qemu_img::same_content(&image(&source.key)?, &image(&target.key)?)?, "qemu-img finds a difference");
    }
    let source = Client::connect(&b.plug(source, "CP1a1b1c").await?).await?;
    let target = Client::connect(&b.plug(target, "CP2a2b2c").await?).await?;
    let mut offset = 0;
    while offset < source.export().size {
        let length = (source.export().size - offset).min(MIB as u64) as u32;
        ensure!(
            source.read(offset, length).await? == target.read(offset, length).await?,
            "they differ behind {offset}"
        );
        offset += u64::from(length);
    }
    source.disconnect().await;
    target.disconnect().await;
    Ok(())
}

pub(super) fn completed(status: &MirrorStatus) -> Result<()> {
    ensure!(status.complete && !status.failed, "the mirror did not complete: {status:?}");
    Ok(())
}

async fn quick_stat(b: &Bench, operation: &Operation) -> Result<MirrorStatus> {
    let mut slow = Vec::new();
    loop {
        let began = Instant::now();
        let status = b.data_stat(operation).await?;
        if began.elapsed() < STAT_BOUND {
            return Ok(status);
        }
        slow.push(began.elapsed());
        ensure!(slow.len() < SLOW, "Data.stat took {slow:?}");
    }
}

async fn unknown(b: Arc<Bench>) -> Result<()> {
    for operation in [Operation::Mirror(Uuid::new_v4().to_string()), Operation::Copy(Uuid::new_v4().to_string())] {
        let status = quick_stat(&b, &operation).await?;
        ensure!(status.failed && !status.complete, "{operation:?}: {status:?}");
    }
    Ok(())
}

async fn malformed(b: Arc<Bench>) -> Result<()> {
    for key in ["", "mkey", "../../../etc/passwd", "a/b", "ü\u{0}\n", &"x".repeat(1 << 20)] {
        let status = quick_stat(&b, &Operation::Mirror(key.to_owned())).await?;
        ensure!(status.failed && !status.complete, "{status:?}");
    }
    Ok(())
}

async fn snapshot(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(8 * MIB).await?;
    b.write(&volume, 64 << 10, MIB as usize, 1).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    b.write(&volume, 0, MIB as usize, 2).await?;
    let (target, uri) = target(&b, 8 * MIB).await?;
    b.plug_readonly(&snapshot, "CP0a1b2c").await?;
    let operation = b.mirror(&snapshot, "CP0a1b2c", &remote_of(&uri)).await?;
    completed(&b.data_wait(&operation).await?)?;
    b.unplug(&snapshot, "CP0a1b2c").await?;
    // What has completed stays so, also when its datapath is gone.
    completed(&quick_stat(&b, &operation).await?)?;
    b.unplug(&target, "MIR0a1b2c").await?;
    same(&b, &snapshot, &target).await
}

async fn live_leaf(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(16 * MIB).await?;
    let mut guest = guest(&b.plug(&volume, "5").await?, 11).await?;
    writes(&guest, 300).await?;
    let (target, uri) = target(&b, 16 * MIB).await?;
    b.attach(&volume, "u0_mirror_vbd_5_xvda").await?;
    let operation = b.mirror(&volume, "5", &remote_of(&uri)).await?;
    completed(&b.data_wait(&operation).await?)?;
    writes(&guest, 300).await?;
    // The datapath of the migration itself is taken down while the mirror goes on.
    b.unplug(&volume, "u0_mirror_vbd_5_xvda").await?;
    writes(&guest, 100).await?;
    completed(&quick_stat(&b, &operation).await?)?;
    guest.suspend().await;
    b.unplug(&volume, "5").await.context("the mirror must be drained and closed by deactivate")?;
    quick_stat(&b, &operation).await?;
    b.unplug(&target, "MIR0a1b2c").await?;
    has_all_writes(&b, &target, &guest).await?;
    same(&b, &volume, &target).await
}

async fn inactive(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(8 * MIB).await?;
    b.write(&volume, MIB as u64, MIB as usize, 3).await?;
    let (target, uri) = target(&b, 8 * MIB).await?;
    b.attach(&volume, "u0_mirror_vbd_x").await?;
    let operation = b.mirror(&volume, "-1", &remote_of(&uri)).await?;
    completed(&b.data_wait(&operation).await?)?;
    b.unplug(&volume, "u0_mirror_vbd_x").await?;
    b.unplug(&target, "MIR0a1b2c").await?;
    same(&b, &volume, &target).await
}

async fn over_data(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(4 * MIB).await?;
    b.write(&volume, 0, 4096, 1).await?;
    let (target, uri) = target(&b, 4 * MIB).await?;
    let client = Client::connect(&uri).await?;
    client.write(MIB as u64, vec![9; MIB as usize].into()).await?;
    client.disconnect().await;
    b.snapshot(&target.key).await?;
    b.attach(&volume, "u0_mirror").await?;
    let operation = b.mirror(&volume, "-1", &remote_of(&uri)).await?;
    completed(&b.data_wait(&operation).await?)?;
    b.unplug(&volume, "u0_mirror").await?;
    b.unplug(&target, "MIR0a1b2c").await?;
    same(&b, &volume, &target).await
}

async fn one_connection(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(4 * MIB).await?;
    let mut guest = guest_of(&b, &volume).await?;
    let (target, uri) = target(&b, 16 * MIB).await?;
    let relay = Relay::start(b.directory(), "relay", &uri, u64::MAX)?;
    let operation = b.mirror(&volume, "5", &remote_of(relay.uri())).await?;
    completed(&b.data_wait(&operation).await?)?;
    guest.suspend().await;
    b.unplug(&volume, "5").await?;
    ensure!(relay.connections() == 1, "{} connections were made", relay.connections());
    b.unplug(&target, "MIR0a1b2c").await
}

/// A guest on the first mebibytes of a small volume.
pub(super) async fn guest_of(b: &Bench, volume: &Volume) -> Result<crate::guest::Guest> {
    let region = crate::plan::Extent { offset: 0, length: 2 * MIB as u64 };
    let settings =
        crate::guest::Settings { writes_per_second: Some(400), depth: 4, ..crate::guest::Settings::new(region, 21) };
    let mut guest = crate::guest::Guest::new(settings)?;
    guest.start(&b.plug(volume, "5").await?).await?;
    Ok(guest)
}

async fn tree(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(4 * MIB).await?;
    let (target, uri) = target(&b, 4 * MIB).await?;
    let mut pairs = Vec::new();
    for byte in 1..=3u8 {
        b.write(&volume, u64::from(byte - 1) * 65536, 128 << 10, byte).await?;
        let snapshot = b.snapshot(&volume.key).await?;
        b.plug_readonly(&snapshot, "CP0a1b2c").await?;
        let operation = b.mirror(&snapshot, "CP0a1b2c", &remote_of(&uri)).await?;
        completed(&b.data_wait(&operation).await?).with_context(|| format!("snapshot {byte}"))?;
        b.unplug(&snapshot, "CP0a1b2c").await?;
        pairs.push((snapshot, b.snapshot(&target.key).await?));
    }
    b.unplug(&target, "MIR0a1b2c").await?;
    for (source, target) in &pairs {
        same(&b, source, target).await?;
        for (volume, domain) in [(source, "CP1a1b1c"), (target, "CP2a2b2c")] {
            b.unplug(volume, domain).await?;
        }
    }
    b.sr_is_sound().await
}

async fn stat_is_quick(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(4 * MIB).await?;
    b.write(&volume, 0, 2 * MIB as usize, 1).await?;
    let (target, uri) = target(&b, 4 * MIB).await?;
    // Nothing goes through, then the handshake alone, then everything.
    let relay = Relay::start(b.directory(), "relay", &uri, 0)?;
    b.attach(&volume, "u0_mirror").await?;
    let operation = b.mirror(&volume, "-1", &remote_of(relay.uri())).await?;
    for allowance in [0, 64 << 10, 256 << 10] {
        relay.allow(allowance);
        for _ in 0..2 {
            let status = quick_stat(&b, &operation).await?;
            ensure!(!status.complete && !status.failed, "{allowance} bytes were let through: {status:?}");
        }
        b.check_finds_nothing()?;
    }
    relay.allow(u64::MAX);
    completed(&b.data_wait(&operation).await?)?;
    ensure!(relay.carried() >= 2 * MIB as u64, "{} bytes were carried", relay.carried());
    b.unplug(&volume, "u0_mirror").await?;
    b.unplug(&target, "MIR0a1b2c").await?;
    same(&b, &volume, &target).await
}

async fn progress(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(16 * MIB).await?;
    b.write(&volume, 0, 8 * MIB as usize, 1).await?;
    let (_, uri) = target(&b, 16 * MIB).await?;
    let relay = Relay::start(b.directory(), "relay", &uri, 0)?;
    b.attach(&volume, "u0_mirror").await?;
    let operation = b.mirror(&volume, "-1", &remote_of(relay.uri())).await?;
    let mut before = 0.0;
    for step in 1..=4u64 {
        relay.allow(step * MIB as u64);
        let status = quick_stat(&b, &operation).await?;
        let now = status.progress.unwrap_or(before);
        ensure!((0.0..=1.0).contains(&now) && now >= before, "{before} was followed by {status:?}");
        before = now;
    }
    relay.allow(u64::MAX);
    completed(&b.data_wait(&operation).await?)
}

async fn listed(b: Arc<Bench>) -> Result<()> {
    let list = Request::new("Data.ls", DBG, vec![]);
    ensure!(answer::operations(&b.call(&list).await?)?.is_empty(), "there are operations that nobody started");
    let volume = b.create(4 * MIB).await?;
    let (_, uri) = target(&b, 4 * MIB).await?;
    b.attach(&volume, "u0_mirror").await?;
    let operation = b.mirror(&volume, "-1", &remote_of(&uri)).await?;
    let listed = answer::operations(&b.call(&list).await?)?;
    ensure!(listed == [operation.clone()], "{listed:?} is not just {operation:?}");
    completed(&b.data_wait(&operation).await?)
}

async fn ends_with_datapath(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(4 * MIB).await?;
    b.write(&volume, 0, 2 * MIB as usize, 1).await?;
    let (target, uri) = target(&b, 4 * MIB).await?;
    let relay = Relay::start(b.directory(), "relay", &uri, 64 << 10)?;
    nbd_of(&b.attach(&volume, "u0_mirror").await?)?;
    let operation = b.mirror(&volume, "-1", &remote_of(relay.uri())).await?;
    quick_stat(&b, &operation).await?;
    b.unplug(&volume, "u0_mirror").await?;
    let status = quick_stat(&b, &operation).await?;
    ensure!(status.failed && !status.complete, "taken down half-way, but {status:?}");
    b.unplug(&target, "MIR0a1b2c").await?;
    let left = leftovers(&b.host).await;
    ensure!(left.processes.is_empty() && left.sockets.is_empty(), "{left:?}");
    Ok(())
}
