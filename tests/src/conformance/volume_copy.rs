//! Volume.copy, Volume.compare and Volume.similar_content: volumes beside each other.

use std::sync::Arc;

use anyhow::{Result, ensure};
use uuid::Uuid;

use super::bench::{AttachedSr, DBG, MIB, refused, refused_with};
use super::{Bench, Group, Need};
use crate::nbd::Client;
use crate::wire::{Blocks, Json, Request, Volume};

const COPY: Need = Need::Method("Volume.copy");
const COMPARE: Need = Need::Method("Volume.compare");
const SIMILAR: Need = Need::Method("Volume.similar_content");
const SNAPSHOT: Need = Need::Method("Volume.snapshot");
/// A mebibyte, as an offset and as a length.
const AT: u64 = MIB as u64;
const LENGTH: usize = MIB as usize;

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("Volume.copy makes another volume with the same bytes and the same size", &[COPY], content);
    group.add("what is written to a volume or to its copy is not seen in the other", &[COPY], apart);
    group.add("Volume.copy of a snapshot has what the snapshot has, and outlives it", &[COPY, SNAPSHOT], of_snapshot);
    group.add("Volume.copy into another SR makes the copy there and changes nothing here", &[COPY], elsewhere);
    group.add("Volume.copy of an unknown volume, or into an unknown SR, is refused", &[COPY], unknown);
    group.add("Volume.copy while a guest writes is refused or right, and the guest goes on", &[COPY], in_use);
    group.add("Volume.compare lists every block that differs from a snapshot", &[COMPARE, SNAPSHOT], compared);
    group.add(
        "Volume.compare with an unknown volume lists every block that is not empty",
        &[COMPARE],
        compared_alone,
    );
    group.add("Volume.similar_content names other volumes of the SR, each once", &[SIMILAR, SNAPSHOT], similar);
}

async fn copy(b: &Bench, volume: &Volume, to: &AttachedSr) -> Result<Volume> {
    b.volume_answer(&Request::volume_copy(DBG, &b.sr.sr, &volume.key, &to.sr)).await
}

/// A volume with data, zeroes that were written, and blocks that never were.
async fn filled(b: &Bench) -> Result<Volume> {
    let volume = b.create(4 * MIB).await?;
    b.write(&volume, AT, LENGTH, 1).await?;
    b.write(&volume, 2 * AT, LENGTH, 0).await?;
    Ok(volume)
}

const FILLED: &[(u64, usize, u8)] = &[(AT, LENGTH, 1)];

async fn content(b: Arc<Bench>) -> Result<()> {
    let volume = filled(&b).await?;
    let copied = copy(&b, &volume, &b.sr).await?;
    ensure!(copied.key != volume.key, "the copy has the volume's key");
    ensure!(copied.uri != volume.uri, "the copy has the volume's uri");
    ensure!(copied.virtual_size == volume.virtual_size, "the copy has {} bytes", copied.virtual_size);
    let listed = b.ls().await?;
    ensure!(listed.contains(&copied), "SR.ls has {listed:?}, and the copy is {copied:?}");
    b.expect_content(&copied, FILLED).await?;
    b.expect_content(&volume, FILLED).await
}

async fn apart(b: Arc<Bench>) -> Result<()> {
    let volume = filled(&b).await?;
    let copied = copy(&b, &volume, &b.sr).await?;
    b.write(&volume, 0, LENGTH, 2).await?;
    b.write(&copied, 3 * AT, LENGTH, 3).await?;
    b.expect_content(&volume, &[(0, LENGTH, 2), (AT, LENGTH, 1)]).await?;
    b.expect_content(&copied, &[(AT, LENGTH, 1), (3 * AT, LENGTH, 3)]).await?;
    b.destroy(&volume.key).await?;
    b.expect_content(&copied, &[(AT, LENGTH, 1), (3 * AT, LENGTH, 3)]).await
}

async fn of_snapshot(b: Arc<Bench>) -> Result<()> {
    let volume = filled(&b).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    b.write(&volume, AT, LENGTH, 9).await?;
    let copied = copy(&b, &snapshot, &b.sr).await?;
    b.destroy(&snapshot.key).await?;
    b.destroy(&volume.key).await?;
    b.expect_content(&copied, FILLED).await
}

async fn elsewhere(b: Arc<Bench>) -> Result<()> {
    let other = b.new_sr("another").await?;
    let volume = filled(&b).await?;
    let copied = copy(&b, &volume, &other).await?;
    let listed = b.ls().await?;
    ensure!(listed.iter().map(|v| &v.key).eq([&volume.key]), "the volume's SR has {listed:?}");
    let there = b.volume_answer(&Request::volume("Volume.stat", DBG, &other.sr, &copied.key)).await?;
    ensure!(there == copied, "it was {copied:?} and is {there:?}");
    let client = Client::connect(&b.plug_readonly(&copied, "CP0dd5ee").await?).await?;
    let read = client.read(AT, LENGTH as u32).await?;
    ensure!(read.iter().all(|byte| *byte == 1), "the copy lacks what the volume has");
    client.disconnect().await;
    b.unplug(&copied, "CP0dd5ee").await?;
    b.call(&Request::volume("Volume.destroy", DBG, &other.sr, &copied.key)).await?;
    b.expect_content(&volume, FILLED).await
}

async fn unknown(b: Arc<Bench>) -> Result<()> {
    let volume = filled(&b).await?;
    let nobody = Volume { key: Uuid::new_v4().to_string(), ..volume.clone() };
    refused_with(copy(&b, &nobody, &b.sr).await, "Volume_does_not_exist")?;
    let to = Uuid::new_v4().to_string();
    refused(b.call(&Request::volume_copy(DBG, &b.sr.sr, &volume.key, &to)).await)?;
    let listed = b.ls().await?;
    ensure!(listed.iter().map(|v| &v.key).eq([&volume.key]), "a copy that was refused left {listed:?}");
    Ok(())
}

async fn in_use(b: Arc<Bench>) -> Result<()> {
    let volume = filled(&b).await?;
    let guest = Client::connect(&b.plug(&volume, "7").await?).await?;
    let copied = copy(&b, &volume, &b.sr).await;
    guest.write(0, bytes::Bytes::from(vec![7; LENGTH])).await?;
    guest.flush().await?;
    guest.disconnect().await;
    b.unplug(&volume, "7").await?;
    match copied {
        Ok(copied) => b.expect_content(&copied, FILLED).await?,
        Err(_) => drop(refused(copied)?),
    }
    b.expect_content(&volume, &[(0, LENGTH, 7), (AT, LENGTH, 1)]).await
}

/// The bytes that a list of blocks says may differ.
async fn listed(b: &Bench, volume: &Volume, other: &str) -> Result<Vec<(u64, u64)>> {
    let answer = b.call(&Request::volume_compare(DBG, &b.sr.sr, &volume.key, other)).await?;
    let Blocks { blocksize, ranges } = Blocks::decode(&answer)?;
    ensure!(blocksize > 0, "blocks of {blocksize} bytes");
    let mut bytes = Vec::new();
    for (first, count) in ranges {
        ensure!(first >= 0 && count > 0, "a range of {count} blocks from {first} on");
        let (start, length) = ((first * blocksize) as u64, (count * blocksize) as u64);
        ensure!(start < volume.virtual_size as u64, "a range begins at {start}, behind the volume's end");
        bytes.push((start, start + length));
    }
    Ok(bytes)
}

/// Sees that every byte of a stretch is in a list.
fn covers(listed: &[(u64, u64)], from: u64, to: u64) -> Result<()> {
    let mut at = from;
    while at < to {
        let range = listed.iter().find(|(start, end)| (*start..*end).contains(&at));
        let Some((_, end)) = range else { anyhow::bail!("byte {at} is not listed in {listed:?}") };
        at = *end;
    }
    Ok(())
}

async fn compared(b: Arc<Bench>) -> Result<()> {
    let volume = filled(&b).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    b.write(&volume, 3 * AT, LENGTH, 5).await?;
    b.write(&volume, AT, LENGTH, 0).await?;
    for (one, other) in [(&volume, &snapshot), (&snapshot, &volume)] {
        let listed = listed(&b, one, &other.key).await?;
        covers(&listed, 3 * AT, 4 * AT)?;
        covers(&listed, AT, 2 * AT)?;
    }
    Ok(())
}

async fn compared_alone(b: Arc<Bench>) -> Result<()> {
    let volume = filled(&b).await?;
    covers(&listed(&b, &volume, &Uuid::new_v4().to_string()).await?, AT, 2 * AT)?;
    let other = b.create(4 * MIB).await?;
    covers(&listed(&b, &volume, &other.key).await?, AT, 2 * AT)
}

async fn similar(b: Arc<Bench>) -> Result<()> {
    let volume = filled(&b).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    let answer = b.call(&Request::volume("Volume.similar_content", DBG, &b.sr.sr, &volume.key)).await?;
    let keys = Json::strings(&answer, "similar volumes")?;
    let known = b.ls().await?;
    for (at, key) in keys.iter().enumerate() {
        ensure!(*key != volume.key, "a volume is said to be similar to itself");
        ensure!(!keys[..at].contains(key), "volume {key} is named twice");
        ensure!(known.iter().any(|v| v.key == *key), "there is no volume {key}");
    }
    ensure!(keys.is_empty() || keys.contains(&snapshot.key), "the snapshot is less similar than {keys:?}");
    Ok(())
}
