//! Changed block tracking: what is told of the changes, and what is left of a snapshot without its data.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;

use super::bench::{DBG, refused};
use super::random::{Random, seed};
use super::{Bench, Group, Need};
use crate::nbd::Client;
use crate::wire::{ChangedBlocks, Request, Volume};

/// The granularity that xapi's own interface promises: it passes on the bitmap alone.
const BLOCK: u64 = 64 << 10;

const ENABLE: Need = Need::Method("Volume.enable_cbt");
const DISABLE: Need = Need::Method("Volume.disable_cbt");
const LIST: Need = Need::Method("Volume.list_changed_blocks");
const DESTROY: Need = Need::Method("Volume.data_destroy");
const SNAPSHOT: Need = Need::Method("Volume.snapshot");
const CLONE: Need = Need::Method("Volume.clone");
const REVERT: Need = Need::Method("Volume.revert");
const RESIZE: Need = Need::Method("Volume.resize");
const READONLY: Need = Need::Method("Datapath.activate_readonly");

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("a volume is tracked once it is enabled, until it is disabled", &[ENABLE, DISABLE], enabled);
    group.add(
        "a snapshot is tracked if its volume is, and a clone is not",
        &[ENABLE, DISABLE, SNAPSHOT, CLONE],
        copied,
    );
    group.add("changed blocks are one bit for each 64 KiB, up to the volume's end", &[ENABLE, LIST, SNAPSHOT], whole);
    group.add(
        "changed blocks of an extent are those of the blocks that it touches",
        &[ENABLE, LIST, SNAPSHOT],
        extent,
    );
    group.add("nothing has changed between a volume and its new snapshot", &[ENABLE, LIST, SNAPSHOT], nothing);
    group.add("changed blocks between two snapshots add up what came between", &[ENABLE, LIST, SNAPSHOT], several);
    group.add("zeroes and discards over data are changes", &[ENABLE, LIST, SNAPSHOT], zeroes);
    group.add("changed blocks between two branches are those of both", &[ENABLE, LIST, SNAPSHOT, CLONE], branches);
    group.add(
        "a reverted volume has changed from the newer snapshots, not from its own",
        &[ENABLE, LIST, REVERT],
        back,
    );
    group.add("changed blocks of a volume that has grown reach to its new end", &[ENABLE, LIST, RESIZE], grown);
    group.add("what a guest writes to an active volume is told as changed at once", &[ENABLE, LIST, SNAPSHOT], live);
    group.add("changed blocks of a volume that does not exist are refused", &[ENABLE, LIST], unknown);
    group.add(
        "a snapshot without its data is still listed, as CBT_Metadata, with its size",
        &[ENABLE, DESTROY, SNAPSHOT],
        metadata,
    );
    group.add("a snapshot without its data cannot be activated", &[ENABLE, DESTROY, READONLY], no_data);
    group.add("data_destroy of a volume whose changes are not tracked is refused", &[DESTROY, SNAPSHOT], untracked);
    group.add(
        "destroying a snapshot's data leaves what other volumes hold",
        &[ENABLE, DESTROY, SNAPSHOT, READONLY],
        others_keep,
    );
    group.add(
        "changed blocks are told from and to snapshots without their data",
        &[ENABLE, LIST, DESTROY, SNAPSHOT],
        after_destroy,
    );
    group.add(
        "changed blocks are told after the volume was reverted and its snapshots' data destroyed",
        &[ENABLE, LIST, DESTROY, REVERT],
        after_all,
    );
    group.add(
        "any history of writes, snapshots, clones and destructions leaves the changes between any two volumes",
        &[ENABLE, LIST, DESTROY, SNAPSHOT, CLONE],
        history,
    );
}

/// Makes a volume that is tracked.
async fn tracked(b: &Bench, blocks: u64) -> Result<Volume> {
    let volume = b.create((blocks * BLOCK) as i64).await?;
    enable(b, &volume).await?;
    Ok(volume)
}

async fn about(b: &Bench, method: &'static str, volume: &Volume) -> Result<()> {
    b.call(&Request::volume(method, DBG, &b.sr.sr, &volume.key)).await.map(drop)
}

async fn enable(b: &Bench, volume: &Volume) -> Result<()> {
    about(b, "Volume.enable_cbt", volume).await
}

async fn destroy_data(b: &Bench, volume: &Volume) -> Result<()> {
    about(b, "Volume.data_destroy", volume).await
}

/// Writes a part of a block.
async fn touch(b: &Bench, volume: &Volume, block: u64, byte: u8) -> Result<()> {
    b.write(volume, block * BLOCK + 4096, 512, byte).await
}

async fn bits(b: &Bench, from: &Volume, to: &Volume, extent: (i64, i64)) -> Result<Vec<bool>> {
    let request = Request::volume_list_changed_blocks_in(DBG, &b.sr.sr, (&from.key, &to.key), extent);
    let changed = ChangedBlocks::decode(&b.call(&request).await?)?;
    ensure!(changed.granularity == BLOCK as i64, "a bit stands for {} bytes", changed.granularity);
    changed.bits().with_context(|| format!("{:?} is no base64", changed.bitmap))
}

/// Sees that exactly these blocks have changed.
async fn expect(b: &Bench, from: &Volume, to: &Volume, blocks: &[u64]) -> Result<()> {
    let told = bits(b, from, to, (0, -1)).await?;
    let told: Vec<u64> = (0..).zip(told).filter(|(_, bit)| *bit).map(|(block, _)| block).collect();
    ensure!(told == blocks, "blocks {told:?} are told as changed, and {blocks:?} were");
    Ok(())
}

async fn enabled(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(BLOCK as i64).await?;
    ensure!(!b.stat(&volume.key).await?.cbt_enabled.unwrap_or(false), "a new volume is tracked");
    for (method, tracked) in [("Volume.enable_cbt", true), ("Volume.disable_cbt", false), ("Volume.enable_cbt", true)]
    {
        for _ in 0..2 {
            about(&b, method, &volume).await?;
            let found = b.stat(&volume.key).await?.cbt_enabled;
            ensure!(found.unwrap_or(false) == tracked, "after {method} it says {found:?}");
            let listed = b.ls().await?;
            ensure!(listed.iter().all(|volume| volume.cbt_enabled == found), "SR.ls says otherwise: {listed:?}");
        }
    }
    Ok(())
}

async fn copied(b: Arc<Bench>) -> Result<()> {
    let volume = tracked(&b, 4).await?;
    let is_tracked = |volume: &Volume| volume.cbt_enabled.unwrap_or(false);
    ensure!(is_tracked(&b.snapshot(&volume.key).await?), "the snapshot of a tracked volume is not tracked");
    ensure!(!is_tracked(&b.clone_of(&volume.key).await?), "the clone of a tracked volume is tracked");
    about(&b, "Volume.disable_cbt", &volume).await?;
    ensure!(!is_tracked(&b.snapshot(&volume.key).await?), "the snapshot of an untracked volume is tracked");
    Ok(())
}

async fn whole(b: Arc<Bench>) -> Result<()> {
    let volume = tracked(&b, 21).await?;
    let before = b.snapshot(&volume.key).await?;
    for block in [0, 7, 8, 20] {
        touch(&b, &volume, block, 1).await?;
    }
    let told = bits(&b, &before, &volume, (0, -1)).await?;
    ensure!(told.len() == 24, "{} bits for 21 blocks", told.len());
    expect(&b, &before, &volume, &[0, 7, 8, 20]).await
}

async fn extent(b: Arc<Bench>) -> Result<()> {
    let volume = tracked(&b, 32).await?;
    let before = b.snapshot(&volume.key).await?;
    for block in [1, 9, 10, 31] {
        touch(&b, &volume, block, 1).await?;
    }
    let all = bits(&b, &before, &volume, (0, -1)).await?;
    let block = BLOCK as i64;
    for (offset, length, first, count) in [
        (0, 32 * block, 0, 32),
        (8 * block, 8 * block, 8, 8),
        (9 * block, block, 9, 1),
        (9 * block + 1, block, 9, 2),
        (10 * block - 1, 1, 9, 1),
        (24 * block, -1, 24, 8),
    ] {
        let told = bits(&b, &before, &volume, (offset, length)).await?;
        let expected: Vec<bool> = all[first..first + count].to_vec();
        ensure!(told.len() == count.next_multiple_of(8), "{} bits for {count} blocks", told.len());
        ensure!(told[..count] == expected, "at {offset}, {length} bytes: {told:?}, and {expected:?} of the whole");
        ensure!(!told[count..].contains(&true), "bits beyond the extent are set: {told:?}");
    }
    Ok(())
}

async fn nothing(b: Arc<Bench>) -> Result<()> {
    let volume = tracked(&b, 8).await?;
    touch(&b, &volume, 3, 1).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    for (from, to) in [(&snapshot, &volume), (&volume, &snapshot), (&volume, &volume)] {
        expect(&b, from, to, &[]).await?;
    }
    Ok(())
}

async fn several(b: Arc<Bench>) -> Result<()> {
    let volume = tracked(&b, 8).await?;
    let mut snapshots = vec![b.snapshot(&volume.key).await?];
    for block in 0..4 {
        touch(&b, &volume, block * 2, 1).await?;
        snapshots.push(b.snapshot(&volume.key).await?);
    }
    for (i, from) in snapshots.iter().enumerate() {
        for (j, to) in snapshots.iter().enumerate() {
            let blocks: Vec<u64> = (i.min(j)..i.max(j)).map(|block| block as u64 * 2).collect();
            expect(&b, from, to, &blocks).await?;
        }
    }
    // What lies between is still told when a snapshot in the middle is gone.
    b.destroy(&snapshots[2].key).await?;
    expect(&b, &snapshots[1], &snapshots[3], &[2, 4]).await
}

async fn zeroes(b: Arc<Bench>) -> Result<()> {
    let volume = tracked(&b, 8).await?;
    b.write(&volume, 0, 8 * BLOCK as usize, 5).await?;
    let before = b.snapshot(&volume.key).await?;
    let client = Client::connect(&b.plug(&volume, "7").await?).await?;
    client.write_zeroes(BLOCK, BLOCK as u32).await?;
    client.write_zeroes(3 * BLOCK + 512, 512).await?;
    client.flush().await?;
    client.disconnect().await;
    b.unplug(&volume, "7").await?;
    expect(&b, &before, &volume, &[1, 3]).await
}

async fn branches(b: Arc<Bench>) -> Result<()> {
    let volume = tracked(&b, 8).await?;
    let shared = b.snapshot(&volume.key).await?;
    let clone = b.clone_of(&shared.key).await?;
    enable(&b, &clone).await?;
    touch(&b, &volume, 1, 1).await?;
    touch(&b, &clone, 5, 2).await?;
    let (one, other) = (b.snapshot(&volume.key).await?, b.snapshot(&clone.key).await?);
    touch(&b, &clone, 6, 3).await?;
    expect(&b, &one, &other, &[1, 5]).await?;
    expect(&b, &other, &one, &[1, 5]).await?;
    expect(&b, &volume, &clone, &[1, 5, 6]).await?;
    expect(&b, &shared, &other, &[5]).await
}

async fn revert(b: &Bench, volume: &Volume, snapshot: &Volume) -> Result<()> {
    b.call(&Request::volume_revert(DBG, &b.sr.sr, &snapshot.key, &volume.key)).await.map(drop)
}

async fn back(b: Arc<Bench>) -> Result<()> {
    let volume = tracked(&b, 8).await?;
    touch(&b, &volume, 0, 1).await?;
    let first = b.snapshot(&volume.key).await?;
    touch(&b, &volume, 1, 2).await?;
    let second = b.snapshot(&volume.key).await?;
    touch(&b, &volume, 2, 3).await?;
    revert(&b, &volume, &first).await?;
    expect(&b, &first, &volume, &[]).await?;
    expect(&b, &second, &volume, &[1]).await?;
    touch(&b, &volume, 4, 4).await?;
    expect(&b, &first, &volume, &[4]).await?;
    expect(&b, &second, &volume, &[1, 4]).await
}

async fn grown(b: Arc<Bench>) -> Result<()> {
    let volume = tracked(&b, 8).await?;
    let before = b.snapshot(&volume.key).await?;
    b.resize(&volume.key, 16 * BLOCK as i64).await?;
    touch(&b, &volume, 7, 1).await?;
    touch(&b, &volume, 15, 2).await?;
    ensure!(bits(&b, &before, &volume, (0, -1)).await?.len() == 16, "the bitmap does not reach to the end");
    let told = bits(&b, &before, &volume, (0, 8 * BLOCK as i64)).await?;
    ensure!(told == [false, false, false, false, false, false, false, true], "{told:?}");
    ensure!(bits(&b, &before, &volume, (0, -1)).await?[15], "what was written to the new space is not told");
    Ok(())
}

async fn live(b: Arc<Bench>) -> Result<()> {
    let volume = tracked(&b, 8).await?;
    let client = Client::connect(&b.plug(&volume, "7").await?).await?;
    client.write(0, Bytes::from(vec![1; 4096])).await?;
    let before = b.snapshot(&volume.key).await?;
    client.write(2 * BLOCK, Bytes::from(vec![2; 4096])).await?;
    expect(&b, &before, &volume, &[2]).await?;
    client.write(5 * BLOCK, Bytes::from(vec![3; 4096])).await?;
    let after = b.snapshot(&volume.key).await?;
    expect(&b, &before, &after, &[2, 5]).await?;
    client.disconnect().await;
    b.unplug(&volume, "7").await
}

async fn unknown(b: Arc<Bench>) -> Result<()> {
    let (volume, gone) = (tracked(&b, 2).await?, tracked(&b, 2).await?);
    b.destroy(&gone.key).await?;
    for (from, to) in [(&volume, &gone), (&gone, &volume)] {
        let told = bits(&b, from, to, (0, -1)).await;
        refused(told)?;
    }
    Ok(())
}

async fn metadata(b: Arc<Bench>) -> Result<()> {
    let volume = tracked(&b, 8).await?;
    touch(&b, &volume, 1, 1).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    b.set(&snapshot.key, "is_a_snapshot", "true").await?;
    for _ in 0..2 {
        destroy_data(&b, &snapshot).await?;
        let left = b.stat(&snapshot.key).await?;
        ensure!(left.volume_type.as_deref() == Some("CBT_Metadata"), "its type is {:?}", left.volume_type);
        ensure!(left.cbt_enabled == Some(true), "it is no longer tracked");
        ensure!(left.virtual_size == snapshot.virtual_size, "its size is {}", left.virtual_size);
        ensure!(left.keys.iter().any(|(k, v)| k == "is_a_snapshot" && v == "true"), "its keys are {:?}", left.keys);
        ensure!(b.ls().await?.iter().any(|listed| listed.key == snapshot.key), "SR.ls does not list it");
    }
    // What xapi-storage-script does next.
    b.set(&snapshot.key, "vdi-type", "cbt_metadata").await?;
    for _ in 0..2 {
        b.destroy(&snapshot.key).await?;
    }
    ensure!(b.ls().await?.len() == 1, "it is still listed");
    Ok(())
}

async fn no_data(b: Arc<Bench>) -> Result<()> {
    let volume = tracked(&b, 8).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    destroy_data(&b, &snapshot).await?;
    refused(b.plug_readonly(&snapshot, "7").await)?;
    refused(b.plug(&snapshot, "7").await)?;
    b.unplug(&snapshot, "7").await
}

async fn untracked(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(8 * BLOCK as i64).await?;
    b.write(&volume, 0, 4096, 1).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    refused(destroy_data(&b, &snapshot).await)?;
    b.expect_content(&snapshot, &[(0, 4096, 1)]).await
}

async fn others_keep(b: Arc<Bench>) -> Result<()> {
    let volume = tracked(&b, 8).await?;
    b.write(&volume, 0, 4096, 1).await?;
    let first = b.snapshot(&volume.key).await?;
    b.write(&volume, BLOCK, 4096, 2).await?;
    let second = b.snapshot(&volume.key).await?;
    b.write(&volume, 2 * BLOCK, 4096, 3).await?;
    destroy_data(&b, &first).await?;
    b.expect_content(&second, &[(0, 4096, 1), (BLOCK, 4096, 2)]).await?;
    destroy_data(&b, &second).await?;
    b.expect_content(&volume, &[(0, 4096, 1), (BLOCK, 4096, 2), (2 * BLOCK, 4096, 3)]).await?;
    b.sr_is_sound().await
}

async fn after_destroy(b: Arc<Bench>) -> Result<()> {
    let volume = tracked(&b, 8).await?;
    let mut snapshots = vec![b.snapshot(&volume.key).await?];
    for block in 0..3 {
        touch(&b, &volume, block, 1).await?;
        snapshots.push(b.snapshot(&volume.key).await?);
    }
    touch(&b, &volume, 7, 1).await?;
    for snapshot in &snapshots {
        destroy_data(&b, snapshot).await?;
        expect(&b, &snapshots[0], &snapshots[1], &[0]).await?;
        expect(&b, &snapshots[1], &snapshots[3], &[1, 2]).await?;
        expect(&b, &snapshots[2], &volume, &[2, 7]).await?;
    }
    b.sr_is_sound().await
}

async fn after_all(b: Arc<Bench>) -> Result<()> {
    let volume = tracked(&b, 8).await?;
    let first = b.snapshot(&volume.key).await?;
    touch(&b, &volume, 1, 1).await?;
    let second = b.snapshot(&volume.key).await?;
    touch(&b, &volume, 2, 1).await?;
    let third = b.snapshot(&volume.key).await?;
    revert(&b, &volume, &first).await?;
    touch(&b, &volume, 4, 1).await?;
    for gone in [&third, &second] {
        destroy_data(&b, gone).await?;
        expect(&b, &first, &third, &[1, 2]).await?;
        expect(&b, &second, &volume, &[1, 4]).await?;
        expect(&b, &third, &volume, &[1, 2, 4]).await?;
        b.sr_is_sound().await?;
    }
    b.destroy(&second.key).await?;
    expect(&b, &third, &volume, &[1, 2, 4]).await?;
    b.sr_is_sound().await
}

async fn history(b: Arc<Bench>) -> Result<()> {
    let seed = seed();
    any_history(&b, &mut Random::from_seed(seed)).await.with_context(|| format!("CONFORMANCE_SEED={seed}"))
}

/// What was written last to each block of a volume.
type Content = [usize; 16];

async fn any_history(b: &Bench, random: &mut Random) -> Result<()> {
    let mut volumes: Vec<(Volume, Content, bool)> = vec![(tracked(b, 16).await?, [0; 16], true)];
    for step in 1..=24 {
        let which = random.below(volumes.len());
        let (volume, content, has_data) = volumes[which].clone();
        match random.below(8) {
            0 | 1 if has_data => volumes.push((b.snapshot(&volume.key).await?, content, true)),
            2 if has_data => {
                let clone = b.clone_of(&volume.key).await?;
                enable(b, &clone).await?;
                volumes.push((clone, content, true));
            }
            3 if volumes.len() > 2 => {
                destroy_data(b, &volume).await?;
                volumes[which].2 = false;
            }
            4 if volumes.len() > 3 => {
                b.destroy(&volume.key).await?;
                volumes.remove(which);
            }
            _ if has_data => {
                let block = random.below(16);
                touch(b, &volume, block as u64, step as u8).await?;
                volumes[which].1[block] = step;
            }
            _ => {}
        }
    }
    for (from, old, _) in &volumes {
        for (to, new, _) in &volumes {
            let blocks: BTreeSet<u64> = (0..16).filter(|at| old[*at] != new[*at]).map(|at| at as u64).collect();
            expect(b, from, to, &blocks.into_iter().collect::<Vec<_>>()).await?;
        }
    }
    b.sr_is_sound().await
}
