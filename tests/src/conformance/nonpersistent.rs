//! Disks that forget what their guest wrote, and disks that many read at once.

use std::sync::Arc;

use anyhow::{Result, ensure};
use bytes::Bytes;

use super::bench::{DBG, MIB, nbd_of, refused, uri_of};
use super::{Bench, Group, Need};
use crate::nbd::Client;
use crate::wire::{Request, Volume};

const FORGETS: Need = Need::Feature("NONPERSISTENT");
const LENGTH: usize = MIB as usize;

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("what was written after open without persistent is gone after close", &[FORGETS], closed);
    group.add("what was written after open without persistent is gone after the next open", &[FORGETS], reopened);
    group.add("what was written after open with persistent stays after close", &[FORGETS], stays);
    group.add("a disk that forgets keeps its data until close, whoever detaches", &[FORGETS], suspended);
    group.add(
        "a snapshot of a disk that forgets holds what stays, and the guest goes on",
        &[FORGETS, Need::Method("Volume.snapshot"), Need::OwnLayout],
        snapshot,
    );
    group.add(
        "open without persistent of a disk that a guest writes to is refused",
        &[FORGETS, Need::OwnLayout],
        busy,
    );
    group.add(
        "a disk that is cloned at boot is as it was after the guest",
        &[Need::Method("Volume.clone"), Need::Method("Volume.set")],
        clone_on_boot,
    );
    group.add(
        "twenty domains read one volume at once, and each may go when it likes",
        &[Need::Feature("VDI_ACTIVATE_READONLY")],
        twenty,
    );
}

async fn open(b: &Bench, volume: &Volume, persistent: bool) -> Result<()> {
    b.call(&Request::datapath_open(DBG, uri_of(volume)?, persistent)).await.map(drop)
}

async fn close(b: &Bench, volume: &Volume) -> Result<()> {
    b.call(&Request::datapath_close(DBG, uri_of(volume)?)).await.map(drop)
}

/// A volume with 1 in its first mebibyte.
async fn volume(b: &Bench) -> Result<Volume> {
    let volume = b.create(4 * MIB).await?;
    b.write(&volume, 0, LENGTH, 1).await?;
    Ok(volume)
}

async fn closed(b: Arc<Bench>) -> Result<()> {
    let volume = volume(&b).await?;
    for _ in 0..2 {
        open(&b, &volume, false).await?;
        b.write(&volume, 0, 2 * LENGTH, 2).await?;
        close(&b, &volume).await?;
        b.expect_content(&volume, &[(0, LENGTH, 1)]).await?;
    }
    b.write(&volume, 0, LENGTH, 3).await?;
    b.expect_content(&volume, &[(0, LENGTH, 3)]).await
}

async fn reopened(b: Arc<Bench>) -> Result<()> {
    let volume = volume(&b).await?;
    for persistent in [false, true] {
        open(&b, &volume, false).await?;
        b.write(&volume, 0, 2 * LENGTH, 2).await?;
        open(&b, &volume, persistent).await?;
        let client = Client::connect(&b.plug(&volume, "7").await?).await?;
        let read = client.read(0, 2 * LENGTH as u32).await?;
        client.disconnect().await;
        b.unplug(&volume, "7").await?;
        ensure!(read[..LENGTH].iter().all(|byte| *byte == 1), "what the last guest wrote is there");
        ensure!(read[LENGTH..].iter().all(|byte| *byte == 0), "what the last guest wrote is there");
        close(&b, &volume).await?;
    }
    b.expect_content(&volume, &[(0, LENGTH, 1)]).await
}

async fn stays(b: Arc<Bench>) -> Result<()> {
    let volume = volume(&b).await?;
    open(&b, &volume, false).await?;
    b.write(&volume, 0, LENGTH, 2).await?;
    close(&b, &volume).await?;
    open(&b, &volume, true).await?;
    b.write(&volume, 0, LENGTH, 3).await?;
    close(&b, &volume).await?;
    b.expect_content(&volume, &[(0, LENGTH, 3)]).await
}

async fn suspended(b: Arc<Bench>) -> Result<()> {
    let volume = volume(&b).await?;
    open(&b, &volume, false).await?;
    for written in 2..5_u8 {
        // Suspended and resumed: detached, but not closed.
        let client = Client::connect(&b.plug(&volume, "7").await?).await?;
        let read = client.read(0, 512).await?;
        ensure!(read.iter().all(|byte| *byte == written - 1), "{read:?} instead of {}", written - 1);
        client.write(0, Bytes::from(vec![written; 512])).await?;
        client.flush().await?;
        client.disconnect().await;
        b.unplug(&volume, "7").await?;
    }
    close(&b, &volume).await?;
    b.expect_content(&volume, &[(0, LENGTH, 1)]).await
}

async fn snapshot(b: Arc<Bench>) -> Result<()> {
    let volume = volume(&b).await?;
    open(&b, &volume, false).await?;
    let client = Client::connect(&b.plug(&volume, "7").await?).await?;
    client.write(0, Bytes::from(vec![2; 512])).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    let read = client.read(0, 512).await?;
    ensure!(read.iter().all(|byte| *byte == 2), "the guest lost what it wrote: {read:?}");
    client.write(512, Bytes::from(vec![3; 512])).await?;
    client.flush().await?;
    client.disconnect().await;
    b.unplug(&volume, "7").await?;
    close(&b, &volume).await?;
    b.expect_content(&snapshot, &[(0, LENGTH, 1)]).await?;
    b.expect_content(&volume, &[(0, LENGTH, 1)]).await
}

async fn busy(b: Arc<Bench>) -> Result<()> {
    let volume = volume(&b).await?;
    let client = Client::connect(&b.plug(&volume, "7").await?).await?;
    refused(open(&b, &volume, false).await)?;
    client.write(0, Bytes::from(vec![2; LENGTH])).await?;
    client.flush().await?;
    client.disconnect().await;
    b.unplug(&volume, "7").await?;
    b.expect_content(&volume, &[(0, LENGTH, 2)]).await
}

/// What xapi-storage-script does by itself where the datapath has no NONPERSISTENT (xen-api
/// `ocaml/xapi-storage-script/main.ml`, vdi_epoch_begin_impl).
async fn clone_on_boot(b: Arc<Bench>) -> Result<()> {
    let volume = volume(&b).await?;
    let mut temporary: Option<Volume> = None;
    for _ in 0..2 {
        // The second boot finds what the first left, as after a crash.
        if let Some(old) = temporary.take() {
            b.destroy(&old.key).await?;
        }
        let clone = b.clone_of(&volume.key).await?;
        b.set(&volume.key, "clone-on-boot", &clone.key).await?;
        b.write(&clone, 0, 2 * LENGTH, 2).await?;
        let key = b.stat(&volume.key).await?;
        ensure!(key.key_value("clone-on-boot") == Some(&clone.key), "{key:?}");
        temporary = Some(clone);
    }
    if let Some(last) = temporary {
        b.destroy(&last.key).await?;
    }
    b.unset(&volume.key, "clone-on-boot").await?;
    b.expect_content(&volume, &[(0, LENGTH, 1)]).await?;
    // VDI.destroy of such a disk destroys the volume twice.
    b.destroy(&volume.key).await?;
    b.destroy(&volume.key).await
}

async fn twenty(b: Arc<Bench>) -> Result<()> {
    let volume = volume(&b).await?;
    let domains: Vec<String> = (0..20).map(|number| format!("u0_reader_{number}")).collect();
    let mut clients = Vec::new();
    for domain in &domains {
        let attached = b.attach(&volume, domain).await?;
        b.datapath("Datapath.activate_readonly", &volume, domain).await?;
        clients.push(Client::connect(&nbd_of(&attached)?).await?);
    }
    for (domain, client) in domains.iter().zip(clients) {
        let read = client.read(0, LENGTH as u32).await?;
        ensure!(read.iter().all(|byte| *byte == 1), "domain {domain} reads something else");
        client.disconnect().await;
        b.unplug(&volume, domain).await?;
    }
    b.write(&volume, 0, LENGTH, 2).await?;
    b.expect_content(&volume, &[(0, LENGTH, 2)]).await
}
