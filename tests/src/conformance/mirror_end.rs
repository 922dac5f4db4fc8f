//! How mirrors end otherwise than by success: cancelled, destroyed, broken, snapshotted.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use uuid::Uuid;

use super::bench::{DBG, MIB, refused};
use super::live::{has_all_writes, writes};
use super::mirror::{completed, guest_of, target};
use super::relay::Relay;
use super::request::remote_of;
use super::{Bench, Group, Need, answer};
use crate::host::write_settings;
use crate::wire::{MirrorStatus, Operation, Request};

const MIRROR: Need = Need::Method("Data.mirror");
const CANCEL: Need = Need::Method("Data.cancel");
const DESTROY: Need = Need::Method("Data.destroy");
const SNAPSHOT: Need = Need::Method("Volume.snapshot");

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("Data.cancel of a running mirror makes it failed and not complete", &[MIRROR, CANCEL], cancel);
    group.add(
        "Data.cancel of a complete mirror under a guest leaves the guest undisturbed",
        &[MIRROR, CANCEL],
        cancel_live,
    );
    group.add("Data.cancel and Data.destroy of an unknown operation do no harm", &[CANCEL, DESTROY], cancel_unknown);
    group.add("after Data.destroy a mirror is unknown and not listed", &[MIRROR, DESTROY], destroy);
    group.add("a cancelled mirror can be made again and completes", &[MIRROR, CANCEL], again);
    group.add("a mirror whose peer does not exist fails, or Data.mirror does", &[MIRROR], no_peer);
    group.add("a mirror whose peer goes away half-way fails, and the source is untouched", &[MIRROR], half_way);
    group.add("a mirror that breaks after it was complete makes deactivate fail", &[MIRROR, SNAPSHOT], broken);
    group.add(
        "Volume.snapshot of a mirror's source ends the mirror as failed and snapshots",
        &[MIRROR, SNAPSHOT],
        snapshot,
    );
    group.add("a target that is too small makes the mirror fail", &[MIRROR], too_small);
}

fn failed(status: &MirrorStatus) -> Result<()> {
    ensure!(status.failed && !status.complete, "{status:?} is not failed without complete");
    Ok(())
}

async fn cancelled(b: &Bench, operation: &Operation) -> Result<()> {
    b.call(&Request::data("Data.cancel", DBG, operation)).await.map(drop)
}

async fn cancel(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(4 * MIB).await?;
    b.write(&volume, 0, 2 * MIB as usize, 1).await?;
    let (target, uri) = target(&b, 4 * MIB).await?;
    let relay = Relay::start(b.directory(), "relay", &uri, 300 << 10)?;
    b.attach(&volume, "u0_mirror").await?;
    let operation = b.mirror(&volume, "-1", &remote_of(relay.uri())).await?;
    b.data_stat(&operation).await?;
    for _ in 0..2 {
        cancelled(&b, &operation).await?;
        failed(&b.data_wait(&operation).await?)?;
    }
    b.unplug(&volume, "u0_mirror").await?;
    failed(&b.data_stat(&operation).await?)?;
    b.unplug(&target, "MIR0a1b2c").await?;
    b.expect_content(&volume, &[(0, 2 * MIB as usize, 1)]).await
}

async fn cancel_live(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(4 * MIB).await?;
    let mut guest = guest_of(&b, &volume).await?;
    let (_, uri) = target(&b, 4 * MIB).await?;
    let operation = b.mirror(&volume, "5", &remote_of(&uri)).await?;
    completed(&b.data_wait(&operation).await?)?;
    cancelled(&b, &operation).await?;
    failed(&b.data_stat(&operation).await?)?;
    writes(&guest, 50).await?;
    guest.suspend().await;
    b.unplug(&volume, "5").await.context("whoever cancels a mirror knows that it is not complete")?;
    has_all_writes(&b, &volume, &guest).await
}

async fn cancel_unknown(b: Arc<Bench>) -> Result<()> {
    for key in [Uuid::new_v4().to_string(), "../../x".to_owned(), String::new()] {
        for method in ["Data.cancel", "Data.destroy"] {
            if let Err(error) = b.call(&Request::data(method, DBG, &Operation::Mirror(key.clone()))).await {
                refused::<()>(Err(error))?;
            }
        }
    }
    Ok(())
}

async fn destroy(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(4 * MIB).await?;
    let (_, uri) = target(&b, 4 * MIB).await?;
    b.attach(&volume, "u0_mirror").await?;
    let operation = b.mirror(&volume, "-1", &remote_of(&uri)).await?;
    completed(&b.data_wait(&operation).await?)?;
    for _ in 0..2 {
        b.call(&Request::data("Data.destroy", DBG, &operation)).await?;
        failed(&b.data_stat(&operation).await?)?;
    }
    if b.script("Data.ls").is_ok() {
        let listed = answer::operations(&b.call(&Request::new("Data.ls", DBG, vec![])).await?)?;
        ensure!(listed.is_empty(), "destroyed, but listed: {listed:?}");
    }
    Ok(())
}

async fn again(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(4 * MIB).await?;
    b.write(&volume, 0, 2 * MIB as usize, 1).await?;
    let (target, uri) = target(&b, 4 * MIB).await?;
    for (n, allowance) in [0, 100 << 10, MIB as u64].into_iter().enumerate() {
        let relay = Relay::start(b.directory(), &format!("relay{n}"), &uri, allowance)?;
        b.attach(&volume, "u0_mirror").await?;
        let operation = b.mirror(&volume, "-1", &remote_of(relay.uri())).await?;
        b.data_stat(&operation).await?;
        cancelled(&b, &operation).await?;
        failed(&b.data_wait(&operation).await?)?;
        b.unplug(&volume, "u0_mirror").await?;
    }
    b.attach(&volume, "u0_mirror").await?;
    let operation = b.mirror(&volume, "-1", &remote_of(&uri)).await?;
    completed(&b.data_wait(&operation).await?)?;
    b.unplug(&volume, "u0_mirror").await?;
    b.unplug(&target, "MIR0a1b2c").await?;
    super::mirror::same(&b, &volume, &target).await
}

async fn no_peer(b: Arc<Bench>) -> Result<()> {
    shorten_patience(&b)?;
    let volume = b.create(4 * MIB).await?;
    b.attach(&volume, "u0_mirror").await?;
    let nowhere = b.directory().join("nowhere").display().to_string();
    match b.mirror(&volume, "-1", &format!("nbd+unix:///x?socket={nowhere}")).await {
        Err(error) => refused::<()>(Err(error)).map(drop),
        Ok(operation) => failed(&b.data_wait(&operation).await?),
    }
}

/// Makes this project's plugin give up on a peer sooner than an operator would like it to.
fn shorten_patience(b: &Bench) -> Result<()> {
    if b.subject.own_layout {
        let settings = r#"{"handshake_seconds": 3, "peer_silence_seconds": 4, "drain_seconds": 6}"#;
        write_settings(b.host.root(), settings)?;
    }
    Ok(())
}

async fn half_way(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(4 * MIB).await?;
    b.write(&volume, 0, 2 * MIB as usize, 1).await?;
    let (_, uri) = target(&b, 4 * MIB).await?;
    let relay = Relay::start(b.directory(), "relay", &uri, MIB as u64)?;
    b.attach(&volume, "u0_mirror").await?;
    let operation = b.mirror(&volume, "-1", &remote_of(relay.uri())).await?;
    b.data_stat(&operation).await?;
    relay.cut().await;
    failed(&b.data_wait(&operation).await?)?;
    failed(&b.data_stat(&operation).await?)?;
    b.unplug(&volume, "u0_mirror").await?;
    b.expect_content(&volume, &[(0, 2 * MIB as usize, 1)]).await
}

async fn broken(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(4 * MIB).await?;
    let mut guest = guest_of(&b, &volume).await?;
    let (_, uri) = target(&b, 4 * MIB).await?;
    let relay = Relay::start(b.directory(), "relay", &uri, u64::MAX)?;
    let operation = b.mirror(&volume, "5", &remote_of(relay.uri())).await?;
    completed(&b.data_wait(&operation).await?)?;
    writes(&guest, 20).await?;
    relay.cut().await;
    writes(&guest, 50).await.context("the guest must go on without its mirror")?;
    guest.suspend().await;
    for _ in 0..2 {
        refused(b.datapath("Datapath.deactivate", &volume, "5").await).context("silent loss of data")?;
    }
    let status = b.data_stat(&operation).await?;
    failed(&status)?;
    // This is how xapi ends a migration that has failed: the mirror is given up, and the guest may go.
    let snapshot = b.snapshot(&volume.key).await?;
    b.unplug(&volume, "5").await.context("after the snapshot")?;
    b.destroy(&snapshot.key).await?;
    has_all_writes(&b, &volume, &guest).await
}

async fn snapshot(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(4 * MIB).await?;
    let mut guest = guest_of(&b, &volume).await?;
    let (_, uri) = target(&b, 4 * MIB).await?;
    let relay = Relay::start(b.directory(), "relay", &uri, 200 << 10)?;
    for complete in [false, true] {
        let operation = b.mirror(&volume, "5", &remote_of(relay.uri())).await?;
        if complete {
            relay.allow(u64::MAX);
            completed(&b.data_wait(&operation).await?)?;
        } else {
            b.data_stat(&operation).await?;
        }
        let snapshot = b.snapshot(&volume.key).await?;
        failed(&b.data_stat(&operation).await?).with_context(|| format!("complete before: {complete}"))?;
        writes(&guest, 30).await?;
        b.destroy(&snapshot.key).await?;
    }
    guest.suspend().await;
    b.unplug(&volume, "5").await?;
    has_all_writes(&b, &volume, &guest).await?;
    b.sr_is_sound().await
}

async fn too_small(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(4 * MIB).await?;
    b.write(&volume, 3 * MIB as u64, 4096, 1).await?;
    let (_, uri) = target(&b, 2 * MIB).await?;
    b.attach(&volume, "u0_mirror").await?;
    match b.mirror(&volume, "-1", &remote_of(&uri)).await {
        Err(error) => refused::<()>(Err(error)).map(drop),
        Ok(operation) => failed(&b.data_wait(&operation).await?),
    }
}
