//! Datapath.import_activate: a connection with a tapdisk behind it becomes the volume's.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::net::UnixStream;
use uuid::Uuid;

use super::bench::{DBG, MIB, uri_of};
use super::{Bench, Group, Need};
use crate::host::pass;
use crate::nbd::{Client, Tapdisk};
use crate::wire::{Request, Volume};

const NEEDS: &[Need] = &[Need::Method("Datapath.import_activate"), Need::Feature("VDI_MIRROR_IN")];

/// tapdisk waits as long for a greeting before it gives the mirror up.
const GREETING: Duration = Duration::from_secs(10);

/// What is active at the destination of a migration.
const DOMAIN: &str = "MIR0a1b2c";

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("Datapath.import_activate is promised by VDI_MIRROR_IN where it is there", &NEEDS[..1], promised);
    group.add("Datapath.import_activate answers a socket that takes a connection, twice the same", NEEDS, socket);
    group.add("what a tapdisk writes through a passed connection is in the volume", NEEDS, written);
    group.add("a tapdisk may write single sectors anywhere", NEEDS, sectors);
    group.add("a tapdisk that says goodbye is greeted anew on the same connection", NEEDS, paused);
    group.add("a tapdisk is greeted although it says nothing for a while", NEEDS, idle);
    group.add("what a tapdisk writes goes over the snapshot of a blank disk", NEEDS, over_snapshot);
    let composed = [NEEDS, &[Need::Method("Volume.compose"), Need::Feature("VDI_COMPOSE")]].concat();
    group.add(
        "sectors that a tapdisk did not write come from the parent once leaf and parent are composed",
        &composed,
        whole,
    );
    group.add("a tapdisk is cut off when its datapath is deactivated", NEEDS, deactivated);
    group.add("a connection that closes without a goodbye can be followed by another", NEEDS, followed);
}

async fn import(b: &Bench, volume: &Volume) -> Result<PathBuf> {
    let request = Request::datapath("Datapath.import_activate", DBG, uri_of(volume)?, DOMAIN);
    Ok(b.call(&request).await?.string("Datapath.import_activate")?.into())
}

/// A tapdisk whose connection was passed to the import of a volume that is active.
async fn tapdisk(b: &Bench, volume: &Volume) -> Result<Tapdisk> {
    let (near, far) = UnixStream::pair()?;
    // xapi's connection does not block while it is passed, or does; here the other end is still as it was made.
    pass(&import(b, volume).await?, &far.into_std()?, &Uuid::new_v4().to_string())?;
    Ok(Tapdisk::new(near))
}

async fn greeted(tapdisk: &mut Tapdisk, size: i64) -> Result<()> {
    let told = tokio::time::timeout(GREETING, tapdisk.negotiate()).await.context("no greeting in 10 s")??;
    ensure!(told == size.cast_unsigned(), "it is told {told} bytes, and not {size}");
    Ok(())
}

/// A volume that is active for a migration.
async fn receiver(b: &Bench, size: i64) -> Result<Volume> {
    let volume = b.create(size).await?;
    b.plug(&volume, DOMAIN).await?;
    Ok(volume)
}

async fn promised(b: Arc<Bench>) -> Result<()> {
    let lacking = b.subject.lacks(Need::Feature("VDI_MIRROR_IN"));
    ensure!(lacking.is_none(), "xapi does not call it: {lacking:?}");
    let datapaths = &b.host.datapath_plugins;
    ensure!(datapaths.values().any(|plugin| plugin.has("VDI_MIRROR_IN")), "the datapath plugin does not say it");
    Ok(())
}

async fn socket(b: Arc<Bench>) -> Result<()> {
    let volume = receiver(&b, MIB).await?;
    let path = import(&b, &volume).await?;
    ensure!(path.is_absolute() && path.as_os_str().len() <= 107, "{} is no socket's path", path.display());
    ensure!(import(&b, &volume).await? == path, "another path the second time");
    UnixStream::connect(&path).await.context("nobody listens")?;
    // Who connected and passed nothing has done no harm.
    greeted(&mut tapdisk(&b, &volume).await?, MIB).await?;
    b.unplug(&volume, DOMAIN).await
}

async fn written(b: Arc<Bench>) -> Result<()> {
    let volume = receiver(&b, 8 * MIB).await?;
    let mut tapdisk = tapdisk(&b, &volume).await?;
    greeted(&mut tapdisk, 8 * MIB).await?;
    tapdisk.write(64 << 10, &vec![1; MIB as usize]).await?;
    tapdisk.write(4 << 20, &[2; 4096]).await?;
    ensure!(tapdisk.read(4 << 20, 8192).await? == [[2; 4096], [0; 4096]].concat(), "it reads something else");
    tapdisk.close().await;
    b.unplug(&volume, DOMAIN).await?;
    b.expect_content(&volume, &[(64 << 10, MIB as usize, 1), (4 << 20, 4096, 2)]).await
}

async fn sectors(b: Arc<Bench>) -> Result<()> {
    let volume = receiver(&b, MIB).await?;
    let mut tapdisk = tapdisk(&b, &volume).await?;
    greeted(&mut tapdisk, MIB).await?;
    let end = MIB as u64 - 512;
    for (offset, length, byte) in [(0, 512, 1), (1536, 1024, 2), (65024, 1024, 3), (end, 512, 4)] {
        tapdisk.write(offset, &vec![byte; length]).await.with_context(|| format!("{length} bytes at {offset}"))?;
    }
    tapdisk.close().await;
    b.unplug(&volume, DOMAIN).await?;
    b.expect_content(&volume, &[(0, 512, 1), (1536, 1024, 2), (65024, 1024, 3), (end, 512, 4)]).await
}

async fn paused(b: Arc<Bench>) -> Result<()> {
    let volume = receiver(&b, MIB).await?;
    let mut tapdisk = tapdisk(&b, &volume).await?;
    for byte in 1..=3 {
        greeted(&mut tapdisk, MIB).await?;
        tapdisk.write(u64::from(byte) * 4096, &[byte; 4096]).await?;
        tapdisk.pause().await?;
    }
    tapdisk.close().await;
    b.unplug(&volume, DOMAIN).await?;
    b.expect_content(&volume, &[(4096, 4096, 1), (8192, 4096, 2), (12288, 4096, 3)]).await
}

async fn idle(b: Arc<Bench>) -> Result<()> {
    let volume = receiver(&b, MIB).await?;
    let mut tapdisk = tapdisk(&b, &volume).await?;
    // xapi adds the mirror to the tapdisk only when it snapshots the source, and calls other methods meanwhile.
    b.stat(&volume.key).await?;
    b.attach(&volume, DOMAIN).await?;
    import(&b, &volume).await?;
    greeted(&mut tapdisk, MIB).await?;
    tapdisk.write(0, &[9; 512]).await?;
    drop(tapdisk);
    b.unplug(&volume, DOMAIN).await?;
    b.expect_content(&volume, &[(0, 512, 9)]).await
}

async fn over_snapshot(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let dummy = b.snapshot(&volume.key).await?;
    b.plug(&volume, DOMAIN).await?;
    let mut tapdisk = tapdisk(&b, &volume).await?;
    greeted(&mut tapdisk, MIB).await?;
    tapdisk.write(0, &[7; 4096]).await?;
    tapdisk.close().await;
    b.unplug(&volume, DOMAIN).await?;
    b.expect_content(&dummy, &[]).await?;
    b.expect_content(&volume, &[(0, 4096, 7)]).await
}

async fn whole(b: Arc<Bench>) -> Result<()> {
    let leaf = b.create(MIB).await?;
    let dummy = b.snapshot(&leaf.key).await?;
    b.plug(&leaf, DOMAIN).await?;
    let mut tapdisk = tapdisk(&b, &leaf).await?;
    greeted(&mut tapdisk, MIB).await?;
    for (sector, byte) in [(1, 7), (9, 0), (200, 8)] {
        tapdisk.write(sector * 512, &[byte; 512]).await?;
    }
    tapdisk.close().await;
    let parent = b.create(MIB).await?;
    b.write(&parent, 0, MIB as usize, 1).await?;
    b.unplug(&leaf, DOMAIN).await?;
    b.call(&Request::volume_compose(DBG, &b.sr.sr, &leaf.key, &parent.key)).await?;
    b.destroy(&dummy.key).await?;
    ensure!(b.ls().await?.iter().all(|volume| volume.key == leaf.key), "more than the leaf is left");
    let rest = MIB as usize - 201 * 512;
    let stretches = [
        (0, 512, 1),
        (512, 512, 7),
        (1024, 7 * 512, 1),
        (10 * 512, 190 * 512, 1),
        (200 * 512, 512, 8),
        (201 * 512, rest, 1),
    ];
    b.expect_content(&leaf, &stretches).await
}

async fn deactivated(b: Arc<Bench>) -> Result<()> {
    let volume = receiver(&b, MIB).await?;
    let mut tapdisk = tapdisk(&b, &volume).await?;
    greeted(&mut tapdisk, MIB).await?;
    tapdisk.write(0, &[1; 512]).await?;
    b.datapath("Datapath.deactivate", &volume, DOMAIN).await?;
    let late = tokio::time::timeout(GREETING, tapdisk.write(0, &[2; 512])).await.context("it waits for ever")?;
    ensure!(late.is_err(), "it may write although nothing is active");
    b.datapath("Datapath.detach", &volume, DOMAIN).await?;
    b.expect_content(&volume, &[(0, 512, 1)]).await
}

async fn followed(b: Arc<Bench>) -> Result<()> {
    let volume = receiver(&b, MIB).await?;
    for byte in 1..=3 {
        let mut tapdisk = tapdisk(&b, &volume).await?;
        greeted(&mut tapdisk, MIB).await?;
        tapdisk.write(0, &[byte; 512]).await?;
    }
    // An export for others is still there, and shows the same.
    let client = Client::connect(&b.plug(&volume, DOMAIN).await?).await?;
    ensure!(client.read(0, 512).await?[..] == [3; 512], "the export shows something else");
    client.disconnect().await;
    b.unplug(&volume, DOMAIN).await
}
