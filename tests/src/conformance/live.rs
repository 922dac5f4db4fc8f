//! A guest writes while its volume is snapshotted, and nothing that it was told to be written is lost.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::bench::{MIB, until};
use super::{Bench, Group, Need};
use crate::disk::RawCopy;
use crate::guest::{Durability, Guest, Settings, verify_export, verify_raw};
use crate::nbd::{Client, Uri};
use crate::plan::Extent;
use crate::wire::Volume;

const SNAPSHOT: Need = Need::Method("Volume.snapshot");

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("snapshots under a writing guest keep every acknowledged write in the volume", &[SNAPSHOT], snapshots);
    group.add("a snapshot under a writing guest holds what was acknowledged before it", &[SNAPSHOT], before_snapshot);
    group.add(
        "clones and destroyed snapshots under a writing guest lose nothing",
        &[SNAPSHOT, Need::Method("Volume.clone")],
        clones,
    );
    group.add("a migration's target can be snapshotted while its client is connected", &[SNAPSHOT], target);
    group.add("a guest is not held up for long by a snapshot", &[SNAPSHOT], latency);
}

/// A guest that writes to the first 8 MiB as fast as it can.
pub(super) async fn guest(uri: &Uri, seed: u64) -> Result<Guest> {
    let region = Extent { offset: 0, length: 8 * MIB as u64 };
    let mut guest = Guest::new(Settings { flush_every: 100, ..Settings::new(region, seed) })?;
    guest.start(uri).await?;
    Ok(guest)
}

/// Waits until a guest has written so many times more.
pub(super) async fn writes(guest: &Guest, more: u64) -> Result<()> {
    let target = guest.acknowledged() + more;
    until("the guest writes on", || guest.acknowledged() >= target || !guest.is_writing()).await?;
    ensure!(guest.is_writing(), "the guest's disk failed: {:?}", guest.account().errors);
    Ok(())
}

/// Sees that a volume has every write of a guest that was suspended in order.
pub(super) async fn has_all_writes(b: &Bench, volume: &Volume, guest: &Guest) -> Result<()> {
    let account = guest.account();
    ensure!(account.failed == 0, "the guest saw errors: {:?}", account.errors);
    let client = Client::connect(&b.plug(volume, "CP0a0b0c").await?).await?;
    let verdict = verify_export(&guest.ledger(), &client, Durability::Acknowledged).await?;
    client.disconnect().await;
    b.unplug(volume, "CP0a0b0c").await?;
    ensure!(verdict.holds() && verdict.checked > 0, "{verdict:?}");
    if b.subject.own_layout {
        let raw = RawCopy::of(&super::invariant::image_of(&b.sr.path, &volume.key)?)?;
        let verdict = verify_raw(&guest.ledger(), raw.path(), Durability::Acknowledged)?;
        ensure!(verdict.holds(), "by qemu-img: {verdict:?}");
    }
    Ok(())
}

async fn snapshots(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(16 * MIB).await?;
    let mut guest = guest(&b.plug(&volume, "7").await?, 1).await?;
    for _ in 0..6 {
        writes(&guest, 200).await?;
        b.snapshot(&volume.key).await?;
    }
    writes(&guest, 200).await?;
    guest.suspend().await;
    b.unplug(&volume, "7").await?;
    has_all_writes(&b, &volume, &guest).await?;
    b.sr_is_sound().await
}

async fn before_snapshot(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(16 * MIB).await?;
    let uri = b.plug(&volume, "7").await?;
    let mut first = guest(&uri, 1).await?;
    writes(&first, 500).await?;
    first.suspend().await;
    // What the first has written does not change any more, while another part is written to.
    let region = Extent { offset: 8 * MIB as u64, length: 4 * MIB as u64 };
    let mut second = Guest::new(Settings::new(region, 2))?;
    second.start(&uri).await?;
    writes(&second, 200).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    writes(&second, 200).await?;
    second.suspend().await;
    b.unplug(&volume, "7").await?;
    has_all_writes(&b, &snapshot, &first).await?;
    has_all_writes(&b, &volume, &first).await?;
    has_all_writes(&b, &volume, &second).await
}

async fn clones(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(16 * MIB).await?;
    let mut guest = guest(&b.plug(&volume, "7").await?, 3).await?;
    for _ in 0..4 {
        writes(&guest, 100).await?;
        let snapshot = b.snapshot(&volume.key).await?;
        let clone = b.clone_of(&volume.key).await?;
        writes(&guest, 100).await?;
        b.destroy(&snapshot.key).await?;
        b.destroy(&clone.key).await?;
    }
    writes(&guest, 100).await?;
    guest.suspend().await;
    b.unplug(&volume, "7").await?;
    has_all_writes(&b, &volume, &guest).await?;
    b.sr_is_sound().await
}

async fn target(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(16 * MIB).await?;
    let mut guest = guest(&b.plug(&volume, "MIR0a1b2c").await?, 4).await?;
    writes(&guest, 200).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    writes(&guest, 200).await?;
    guest.suspend().await;
    let clone = b.clone_of(&snapshot.key).await?;
    b.unplug(&volume, "MIR0a1b2c").await?;
    has_all_writes(&b, &volume, &guest).await?;
    b.destroy(&volume.key).await?;
    b.destroy(&snapshot.key).await?;
    b.write(&clone, 12 * MIB as u64, 4096, 1).await?;
    b.sr_is_sound().await
}

async fn latency(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(16 * MIB).await?;
    let mut guest = guest(&b.plug(&volume, "7").await?, 5).await?;
    writes(&guest, 100).await?;
    let mut longest = Duration::ZERO;
    let snapshots = async {
        for _ in 0..5 {
            b.snapshot(&volume.key).await?;
        }
        anyhow::Ok(())
    };
    let watching = async {
        loop {
            longest = longest.max(guest.waiting());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        made = snapshots => made?,
        () = watching => {}
    }
    ensure!(longest < Duration::from_secs(3), "a write waited {longest:?}");
    guest.suspend().await;
    b.unplug(&volume, "7").await?;
    has_all_writes(&b, &volume, &guest).await
}
