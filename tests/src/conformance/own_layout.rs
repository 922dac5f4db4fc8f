//! What only the files tell: physical sizes, many keys, the list of volumes against the disk.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::bench::MIB;
use super::{Bench, Group, Need};
use crate::disk::Sr;

const OWN: Need = Need::OwnLayout;

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("a volume with a hundred thousand keys is listed, changed and snapshotted", &[OWN], many_keys);
    group.add("the space that a volume takes grows with what is written to it", &[OWN], physical_size);
    group.add("files that nobody knows in an SR's directory do no harm and are left alone", &[OWN], foreign_files);
    group.add("a chain of snapshots is as long on disk as it was made", &[OWN], chain);
}

async fn many_keys(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let tree = Sr::read(&b.sr.path)?.tree_of(&volume.key).context("the volume is in a tree")?.uuid.clone();
    let path = b.sr.path.join("trees").join(tree).join("tree.json");
    let mut record: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    let keys: serde_json::Map<String, Value> =
        (0..100_000).map(|n| (format!("key {n}"), json!(format!("{n}")))).collect();
    record["volumes"][&volume.key]["keys"] = Value::Object(keys);
    std::fs::write(&path, serde_json::to_vec(&record)?)?;
    let began = Instant::now();
    ensure!(b.stat(&volume.key).await?.keys.len() == 100_000, "Volume.stat has not all keys");
    ensure!(b.ls().await?[0].keys.len() == 100_000, "SR.ls has not all keys");
    b.set(&volume.key, "one more", "x").await?;
    b.unset(&volume.key, "key 7").await?;
    b.snapshot(&volume.key).await?;
    ensure!(b.stat(&volume.key).await?.keys.len() == 100_000, "keys were lost");
    ensure!(began.elapsed() < Duration::from_secs(20), "it took {:?}", began.elapsed());
    b.destroy(&volume.key).await
}

async fn physical_size(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(64 * MIB).await?;
    b.write(&volume, 0, 8 * MIB as usize, 1).await?;
    let after = b.stat(&volume.key).await?;
    let grown = after.physical_utilisation - volume.physical_utilisation;
    ensure!((8 * MIB..12 * MIB).contains(&grown), "8 MiB were written, and it grew by {grown}");
    let space = b.sr_stat().await?;
    ensure!(space.free_space <= space.total_space, "{space:?}");
    Ok(())
}

async fn foreign_files(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    std::fs::create_dir(b.sr.path.join("lost+found"))?;
    std::fs::write(b.sr.path.join("README"), "x")?;
    ensure!(b.ls().await? == [volume.clone()], "SR.ls is confused");
    b.destroy(&volume.key).await?;
    ensure!(b.sr.path.join("README").exists() && b.sr.path.join("lost+found").exists(), "they were removed");
    Ok(())
}

async fn chain(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    for byte in 1..=20u8 {
        b.write(&volume, u64::from(byte) * 4096, 4096, byte).await?;
        b.snapshot(&volume.key).await?;
    }
    let image = super::invariant::image_of(&b.sr.path, &volume.key)?;
    let length = crate::disk::qemu_img::chain(&image)?.len();
    ensure!(length == 21, "the chain has {length} images");
    let stretches: Vec<_> = (1..=20u8).map(|n| (u64::from(n) * 4096, 4096, n)).collect();
    b.expect_content(&volume, &stretches).await?;
    b.sr_is_sound().await
}
