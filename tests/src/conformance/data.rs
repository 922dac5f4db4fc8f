//! The bytes of volumes that nobody writes to meanwhile: isolation, independence, sizes, exports.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;

use super::bench::MIB;
use super::random::{Random, seed};
use super::{Bench, Group, Need};
use crate::nbd::Client;
use crate::wire::Volume;

const SNAPSHOT: Need = Need::Method("Volume.snapshot");
const CLONE: Need = Need::Method("Volume.clone");
const RESIZE: Need = Need::Method("Volume.resize");
const READONLY: Need = Need::Method("Datapath.activate_readonly");

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("a new volume reads as zeroes", &[READONLY], blank);
    group.add("what is written to the first and the last sector is read back", &[READONLY], ends);
    group.add("writes to a volume do not show in its snapshots", &[SNAPSHOT, READONLY], isolation);
    group.add("zeroes and discards over a snapshot's data do not show in it", &[SNAPSHOT, READONLY], zeroes);
    group.add(
        "clones of one snapshot are independent of it and of each other",
        &[SNAPSHOT, CLONE, READONLY],
        independence,
    );
    group.add(
        "a clone of a leaf and the leaf do not see each other's later writes",
        &[CLONE, READONLY],
        clone_of_leaf,
    );
    group.add(
        "a write to a snapshot that is activated for writing changes no other volume",
        &[SNAPSHOT, CLONE, READONLY],
        write_snapshot,
    );
    group.add("destroying a volume does not change its snapshots and clones", &[SNAPSHOT, CLONE, READONLY], destroy);
    group.add("resize keeps the data and the new space reads as zeroes", &[RESIZE, READONLY], resize);
    group.add(
        "resize after a snapshot leaves the snapshot's data and size",
        &[RESIZE, SNAPSHOT, READONLY],
        resize_snapshot,
    );
    group.add(
        "resize of an active volume without a client is seen by the next connection",
        &[RESIZE, READONLY],
        resize_active,
    );
    group.add("resize while a client is connected is refused or safe", &[RESIZE], resize_connected);
    group.add("one export serves several connections one after the other", &[], connections);
    group.add("a connection that ends without a goodbye leaves the export usable", &[], no_goodbye);
    group.add("an export that is activated read-only refuses writes", &[READONLY], read_only);
    group.add("a volume deactivated in one domain and activated in another keeps its bytes", &[], move_domain);
    group.add("an export is flushed by NBD's flush and offers it", &[], flush);
    group.add(
        "any history of writes, snapshots, clones and destructions keeps every volume's bytes",
        &[SNAPSHOT, CLONE, READONLY],
        history,
    );
}

async fn connect(b: &Bench, volume: &Volume) -> Result<Client> {
    Ok(Client::connect(&b.plug(volume, "7").await?).await?)
}

async fn unplug(b: &Bench, volume: &Volume, client: Client) -> Result<()> {
    client.disconnect().await;
    b.unplug(volume, "7").await
}

async fn blank(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(2 * MIB + 512).await?;
    b.expect_content(&volume, &[]).await
}

async fn ends(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(3 * MIB).await?;
    let last = volume.virtual_size as u64 - 512;
    b.write(&volume, 0, 512, 1).await?;
    b.write(&volume, last, 512, 2).await?;
    b.expect_content(&volume, &[(0, 512, 1), (last, 512, 2)]).await
}

async fn isolation(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(2 * MIB).await?;
    let mut snapshots = vec![(b.snapshot(&volume.key).await?, 0)];
    for byte in 1..=3 {
        b.write(&volume, 4096, 4096, byte).await?;
        snapshots.push((b.snapshot(&volume.key).await?, byte));
    }
    b.write(&volume, 0, 64 << 10, 9).await?;
    for (snapshot, byte) in &snapshots {
        b.expect_content(snapshot, &[(4096, 4096, *byte)]).await.with_context(|| format!("snapshot {byte}"))?;
    }
    b.expect_content(&volume, &[(0, 64 << 10, 9)]).await
}

async fn zeroes(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(2 * MIB).await?;
    b.write(&volume, 0, MIB as usize, 5).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    let client = connect(&b, &volume).await?;
    client.write_zeroes(0, 64 << 10).await?;
    client.write_zeroes(100 << 10, 512).await?;
    unplug(&b, &volume, client).await?;
    b.expect_content(&snapshot, &[(0, MIB as usize, 5)]).await?;
    b.expect_content(&volume, &[(0, MIB as usize, 5), (0, 64 << 10, 0), (100 << 10, 512, 0)]).await?;
    let client = connect(&b, &volume).await?;
    client.trim(128 << 10, 128 << 10).await?;
    unplug(&b, &volume, client).await?;
    // What was discarded may read as anything that it was before or as zero, in the volume alone.
    b.expect_content(&snapshot, &[(0, MIB as usize, 5)]).await
}

async fn independence(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(2 * MIB).await?;
    b.write(&volume, 0, 8192, 1).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    let (one, other) = (b.clone_of(&snapshot.key).await?, b.clone_of(&snapshot.key).await?);
    b.write(&one, 0, 4096, 2).await?;
    b.write(&other, 4096, 4096, 3).await?;
    b.write(&volume, 8192, 4096, 4).await?;
    b.expect_content(&snapshot, &[(0, 8192, 1)]).await?;
    b.expect_content(&one, &[(0, 8192, 1), (0, 4096, 2)]).await?;
    b.expect_content(&other, &[(0, 8192, 1), (4096, 4096, 3)]).await?;
    b.expect_content(&volume, &[(0, 8192, 1), (8192, 4096, 4)]).await?;
    b.sr_is_sound().await
}

async fn clone_of_leaf(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(2 * MIB).await?;
    let client = connect(&b, &volume).await?;
    client.write(0, Bytes::from(vec![1; 8192])).await?;
    client.flush().await?;
    // Also while it is active.
    let clone = b.clone_of(&volume.key).await?;
    client.write(0, Bytes::from(vec![2; 4096])).await?;
    unplug(&b, &volume, client).await?;
    b.write(&clone, 4096, 4096, 3).await?;
    b.expect_content(&volume, &[(0, 8192, 1), (0, 4096, 2)]).await?;
    b.expect_content(&clone, &[(0, 8192, 1), (4096, 4096, 3)]).await?;
    b.sr_is_sound().await
}

async fn write_snapshot(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    b.write(&volume, 0, 4096, 1).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    let clone = b.clone_of(&snapshot.key).await?;
    b.write(&snapshot, 0, 4096, 2).await?;
    b.expect_content(&volume, &[(0, 4096, 1)]).await?;
    b.expect_content(&clone, &[(0, 4096, 1)]).await?;
    b.expect_content(&snapshot, &[(0, 4096, 2)]).await?;
    b.sr_is_sound().await
}

async fn destroy(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    b.write(&volume, 0, 4096, 1).await?;
    let first = b.snapshot(&volume.key).await?;
    b.write(&volume, 4096, 4096, 2).await?;
    let second = b.snapshot(&volume.key).await?;
    let clone = b.clone_of(&first.key).await?;
    b.write(&clone, 8192, 4096, 3).await?;
    b.destroy(&volume.key).await?;
    b.expect_content(&second, &[(0, 4096, 1), (4096, 4096, 2)]).await?;
    b.destroy(&first.key).await?;
    b.expect_content(&second, &[(0, 4096, 1), (4096, 4096, 2)]).await?;
    b.expect_content(&clone, &[(0, 4096, 1), (8192, 4096, 3)]).await?;
    b.sr_is_sound().await
}

async fn resize(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB + 512).await?;
    let last = volume.virtual_size as u64 - 512;
    b.write(&volume, last, 512, 1).await?;
    for size in [MIB + 1024, 2 * MIB, 5 * MIB] {
        b.resize(&volume.key, size).await?;
        b.expect_content(&volume, &[(last, 512, 1)]).await?;
    }
    b.write(&volume, 5 * MIB as u64 - 512, 512, 2).await?;
    b.expect_content(&volume, &[(last, 512, 1), (5 * MIB as u64 - 512, 512, 2)]).await
}

async fn resize_snapshot(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    b.write(&volume, 0, MIB as usize, 1).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    b.resize(&volume.key, 2 * MIB).await?;
    b.write(&volume, MIB as u64, 4096, 2).await?;
    let clone = b.clone_of(&snapshot.key).await?;
    b.resize(&clone.key, 3 * MIB).await?;
    b.expect_content(&snapshot, &[(0, MIB as usize, 1)]).await?;
    b.expect_content(&volume, &[(0, MIB as usize, 1), (MIB as u64, 4096, 2)]).await?;
    b.expect_content(&clone, &[(0, MIB as usize, 1)]).await?;
    b.sr_is_sound().await
}

async fn resize_active(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let uri = b.plug(&volume, "7").await?;
    let client = Client::connect(&uri).await?;
    client.write(0, Bytes::from(vec![1; 4096])).await?;
    client.disconnect().await;
    b.resize(&volume.key, 2 * MIB).await?;
    let client = Client::connect(&uri).await?;
    ensure!(client.export().size == 2 * MIB as u64, "the export still has {} bytes", client.export().size);
    client.write(MIB as u64, Bytes::from(vec![2; 4096])).await?;
    unplug(&b, &volume, client).await?;
    b.expect_content(&volume, &[(0, 4096, 1), (MIB as u64, 4096, 2)]).await
}

async fn resize_connected(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let client = connect(&b, &volume).await?;
    client.write(0, Bytes::from(vec![1; 4096])).await?;
    if let Err(error) = b.resize(&volume.key, 2 * MIB).await {
        super::bench::refused::<()>(Err(error))?;
        ensure!(b.stat(&volume.key).await?.virtual_size == MIB, "refused, but resized");
    }
    client.write(4096, Bytes::from(vec![2; 4096])).await.context("the client that was connected")?;
    unplug(&b, &volume, client).await?;
    b.expect_content(&volume, &[(0, 4096, 1), (4096, 4096, 2)]).await
}

async fn connections(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let uri = b.plug(&volume, "MIR0a1b2c").await?;
    let mut expected = Vec::new();
    for n in 1..=10u8 {
        let client = Client::connect(&uri).await.with_context(|| format!("connection {n}"))?;
        let offset = u64::from(n) * 4096;
        client.write(offset, Bytes::from(vec![n; 4096])).await?;
        client.disconnect().await;
        expected.push((offset, 4096, n));
    }
    b.unplug(&volume, "MIR0a1b2c").await?;
    b.expect_content(&volume, &expected).await
}

async fn no_goodbye(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let uri = b.plug(&volume, "7").await?;
    for byte in 1..=5u8 {
        let client = Client::connect(&uri).await?;
        client.write(0, Bytes::from(vec![byte; 512])).await?;
        drop(client);
    }
    b.unplug(&volume, "7").await?;
    b.expect_content(&volume, &[(0, 512, 5)]).await
}

async fn read_only(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    b.write(&volume, 0, 4096, 1).await?;
    let uri = b.plug_readonly(&volume, "7").await?;
    let client = Client::connect(&uri).await?;
    ensure!(client.export().read_only(), "the export's flags do not say read-only");
    client.disconnect().await;
    // Another client that does not care for the flag.
    let out = tokio::process::Command::new("nbdsh")
        .args(["-c", "h.set_strict_mode(0)", "-c", "h.set_export_name(__import__('os').environ['E'])"])
        .args(["-c", "h.connect_unix(__import__('os').environ['S'])", "-c", "h.pwrite(b'x' * 512, 0)"])
        .env("E", uri.export())
        .env("S", uri.socket())
        .output()
        .await;
    if let Ok(out) = out {
        ensure!(!out.status.success(), "a write to a read-only export succeeded");
    }
    b.unplug(&volume, "7").await?;
    b.expect_content(&volume, &[(0, 4096, 1)]).await
}

async fn move_domain(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    // The next domain attaches before the first is gone, as at the end of a migration.
    for (from, to, byte) in [("1", "2", 1u8), ("2", "3", 2), ("3", "4", 3)] {
        let uri = b.plug(&volume, from).await?;
        let client = Client::connect(&uri).await?;
        let offset = u64::from(byte) * 4096;
        if byte > 1 {
            ensure!(
                client.read(offset - 4096, 4096).await?.iter().all(|b| *b == byte - 1),
                "domain {from} reads old data"
            );
        }
        client.write(offset, Bytes::from(vec![byte; 4096])).await?;
        b.attach(&volume, to).await?;
        client.disconnect().await;
        b.unplug(&volume, from).await?;
    }
    b.unplug(&volume, "4").await?;
    b.expect_content(&volume, &[(4096, 4096, 1), (8192, 4096, 2), (12288, 4096, 3)]).await
}

async fn flush(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let client = connect(&b, &volume).await?;
    client.flush().await.context("a guest needs NBD_CMD_FLUSH")?;
    client.write_zeroes(0, 4096).await.context("a mirror needs NBD_CMD_WRITE_ZEROES")?;
    client.trim(0, 65536).await.context("a guest's discards need NBD_CMD_TRIM")?;
    unplug(&b, &volume, client).await
}

async fn history(b: Arc<Bench>) -> Result<()> {
    let seed = seed();
    any_history(&b, &mut Random::from_seed(seed)).await.with_context(|| format!("CONFORMANCE_SEED={seed}"))
}

/// A stretch of one byte: where, how many, which.
type Stretch = (u64, usize, u8);

async fn any_history(b: &Bench, random: &mut Random) -> Result<()> {
    let mut volumes: Vec<(Volume, Vec<Stretch>)> = vec![(b.create(MIB).await?, Vec::new())];
    for step in 1..=24u8 {
        let which = random.below(volumes.len());
        let (volume, content) = volumes[which].clone();
        match random.below(6) {
            0 => volumes.push((b.snapshot(&volume.key).await?, content)),
            1 => volumes.push((b.clone_of(&volume.key).await?, content)),
            2 if volumes.len() > 2 => {
                b.destroy(&volume.key).await?;
                volumes.remove(which);
            }
            _ => {
                let offset = random.below(200) as u64 * 4096;
                b.write(&volume, offset, 4096, step).await?;
                volumes[which].1.push((offset, 4096, step));
            }
        }
    }
    for (volume, content) in &volumes {
        b.expect_content(volume, content).await?;
    }
    b.sr_is_sound().await
}
