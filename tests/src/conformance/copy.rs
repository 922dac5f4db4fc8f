//! Data.copy of listed blocks, alone and beside a mirror.

use std::sync::Arc;

use anyhow::{Result, ensure};
use bytes::Bytes;

use super::bench::{DBG, MIB, refused, uri_of};
use super::live::{has_all_writes, writes};
use super::mirror::{completed, guest_of, same, target};
use super::relay::Relay;
use super::request::remote_of;
use super::{Bench, Group, Need, answer};
use crate::nbd::Client;
use crate::wire::{Operation, Request, Volume};

const COPY: Need = Need::Method("Data.copy");
const MIRROR: Need = Need::Method("Data.mirror");
const CANCEL: Need = Need::Method("Data.cancel");
const DESTROY: Need = Need::Method("Data.destroy");
const LS: Need = Need::Method("Data.ls");

const BLOCK: i64 = 64 << 10;

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("Data.copy copies the listed blocks and no other", &[COPY], listed_blocks);
    group.add("Data.copy takes ranges in any order, one over another, and none at all", &[COPY], any_ranges);
    group.add("Data.copy ends a last block with the volume", &[COPY], last_block);
    group.add("Data.copy carries zeroes over a target that is not blank", &[COPY], zeroes);
    group.add("Data.copy of what a guest has written copies it while the guest has the disk", &[COPY], under_guest);
    group.add("Data.copy of a block list that is none is refused and copies nothing", &[COPY], bad_lists);
    group.add("Data.copy made twice is one copy", &[COPY], twice);
    group.add("Data.ls lists a copy as a copy, and Data.destroy forgets it", &[COPY, LS, DESTROY], listed);
    group.add(
        "Data.destroy of a copy that goes on is refused, and Data.cancel makes it failed",
        &[COPY, CANCEL],
        cancel,
    );
    group.add("a copy whose peer goes away fails", &[COPY], half_way);
    group.add("a copy to a target that is too small fails", &[COPY], too_small);
    group.add("a copy ends when the datapath of its source is taken down", &[COPY], taken_down);
    group.add(
        "Data.copy beside a mirror never puts old data over what the guest has written",
        &[COPY, MIRROR],
        beside,
    );
    group.add(
        "Data.copy elsewhere is refused while a volume is mirrored, and the other way round",
        &[COPY, MIRROR],
        other,
    );
}

async fn copy(b: &Bench, volume: &Volume, domain: &str, remote: &str, blocks: &[(i64, i64)]) -> Result<Operation> {
    let request = Request::data_copy(DBG, uri_of(volume)?, domain, remote, BLOCK, blocks);
    let operation = Operation::decode(&b.call(&request).await?)?;
    ensure!(matches!(operation, Operation::Copy(_)), "{operation:?} is no copy");
    Ok(operation)
}

async fn failed(b: &Bench, operation: &Operation) -> Result<()> {
    let status = b.data_wait(operation).await?;
    ensure!(status.failed && !status.complete, "{status:?} is not failed without complete");
    Ok(())
}

/// Four mebibytes, the first three of them written.
async fn source(b: &Bench) -> Result<Volume> {
    let volume = b.create(4 * MIB).await?;
    b.write(&volume, 0, 3 * MIB as usize, 1).await?;
    Ok(volume)
}

async fn listed_blocks(b: Arc<Bench>) -> Result<()> {
    let volume = source(&b).await?;
    let (target, uri) = target(&b, 4 * MIB).await?;
    let operation = copy(&b, &volume, "-1", &remote_of(&uri), &[(1, 2), (20, 4), (47, 2)]).await?;
    completed(&b.data_wait(&operation).await?)?;
    completed(&b.data_stat(&operation).await?)?;
    b.unplug(&target, "MIR0a1b2c").await?;
    let block = BLOCK as usize;
    let copied = [(1 << 16, 2 * block, 1), (20 << 16, 4 * block, 1), (47 << 16, block, 1)];
    b.expect_content(&target, &copied).await?;
    b.expect_content(&volume, &[(0, 3 * MIB as usize, 1)]).await
}

async fn any_ranges(b: Arc<Bench>) -> Result<()> {
    let volume = source(&b).await?;
    let (target, uri) = target(&b, 4 * MIB).await?;
    for blocks in [&[(3, 2), (0, 1), (4, 3), (9, 0)][..], &[]] {
        let operation = copy(&b, &volume, "-1", &remote_of(&uri), blocks).await?;
        completed(&b.data_wait(&operation).await?)?;
    }
    b.unplug(&target, "MIR0a1b2c").await?;
    b.expect_content(&target, &[(0, 1 << 16, 1), (3 << 16, 4 << 16, 1)]).await
}

async fn last_block(b: Arc<Bench>) -> Result<()> {
    let size = MIB + 4096;
    let volume = b.create(size).await?;
    b.write(&volume, MIB as u64, 4096, 5).await?;
    let (target, uri) = target(&b, size).await?;
    let operation = copy(&b, &volume, "-1", &remote_of(&uri), &[(16, 1)]).await?;
    completed(&b.data_wait(&operation).await?)?;
    b.unplug(&target, "MIR0a1b2c").await?;
    b.expect_content(&target, &[(MIB as u64, 4096, 5)]).await
}

async fn zeroes(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let target = b.create(MIB).await?;
    b.write(&target, 0, MIB as usize, 9).await?;
    let uri = b.plug(&target, "MIR0a1b2c").await?;
    let operation = copy(&b, &volume, "-1", &remote_of(&uri), &[(2, 3)]).await?;
    completed(&b.data_wait(&operation).await?)?;
    b.unplug(&target, "MIR0a1b2c").await?;
    b.expect_content(&target, &[(0, 2 << 16, 9), (5 << 16, 11 << 16, 9)]).await
}

async fn under_guest(b: Arc<Bench>) -> Result<()> {
    let volume = source(&b).await?;
    let client = Client::connect(&b.plug(&volume, "5").await?).await?;
    client.write(0, Bytes::from(vec![7; 4096])).await?;
    let (target, uri) = target(&b, 4 * MIB).await?;
    let operation = copy(&b, &volume, "5", &remote_of(&uri), &[(0, 1)]).await?;
    completed(&b.data_wait(&operation).await?)?;
    client.write(4096, Bytes::from(vec![8; 4096])).await?;
    client.disconnect().await;
    b.unplug(&volume, "5").await?;
    b.unplug(&target, "MIR0a1b2c").await?;
    b.expect_content(&target, &[(0, 4096, 7), (4096, BLOCK as usize - 4096, 1)]).await
}

async fn bad_lists(b: Arc<Bench>) -> Result<()> {
    let volume = source(&b).await?;
    let (target, uri) = target(&b, 4 * MIB).await?;
    for (block, blocks) in [(0, (0, 1)), (-4096, (0, 1)), (BLOCK, (-1, 1)), (BLOCK, (63, 2)), (BLOCK, (0, -1))] {
        let request = Request::data_copy(DBG, uri_of(&volume)?, "-1", &remote_of(&uri), block, &[blocks]);
        refused(b.call(&request).await)?;
    }
    b.unplug(&target, "MIR0a1b2c").await?;
    b.expect_content(&target, &[]).await
}

async fn twice(b: Arc<Bench>) -> Result<()> {
    let volume = source(&b).await?;
    let (_, uri) = target(&b, 4 * MIB).await?;
    let relay = Relay::start(b.directory(), "relay", &uri, 100 << 10)?;
    let first = copy(&b, &volume, "-1", &remote_of(relay.uri()), &[(0, 16)]).await?;
    let second = copy(&b, &volume, "-1", &remote_of(relay.uri()), &[(0, 16)]).await?;
    ensure!(first == second, "{first:?} and {second:?}");
    relay.allow(u64::MAX);
    completed(&b.data_wait(&first).await?)?;
    ensure!(relay.connections() == 1, "{} connections were made", relay.connections());
    Ok(())
}

async fn listed(b: Arc<Bench>) -> Result<()> {
    let volume = source(&b).await?;
    let (_, uri) = target(&b, 4 * MIB).await?;
    let operation = copy(&b, &volume, "-1", &remote_of(&uri), &[(0, 48)]).await?;
    let list = Request::new("Data.ls", DBG, vec![]);
    let listed = answer::operations(&b.call(&list).await?)?;
    ensure!(listed == [operation.clone()], "{listed:?} is not just {operation:?}");
    completed(&b.data_wait(&operation).await?)?;
    for _ in 0..2 {
        b.call(&Request::data("Data.destroy", DBG, &operation)).await?;
        failed(&b, &operation).await?;
    }
    ensure!(answer::operations(&b.call(&list).await?)?.is_empty(), "destroyed, but listed");
    Ok(())
}

async fn cancel(b: Arc<Bench>) -> Result<()> {
    let volume = source(&b).await?;
    let (_, uri) = target(&b, 4 * MIB).await?;
    let relay = Relay::start(b.directory(), "relay", &uri, 300 << 10)?;
    let operation = copy(&b, &volume, "-1", &remote_of(relay.uri()), &[(0, 48)]).await?;
    let status = b.data_stat(&operation).await?;
    ensure!(!status.failed && !status.complete, "it cannot go on, and yet {status:?}");
    if b.script("Data.destroy").is_ok() {
        refused(b.call(&Request::data("Data.destroy", DBG, &operation)).await)?;
    }
    for _ in 0..2 {
        b.call(&Request::data("Data.cancel", DBG, &operation)).await?;
        failed(&b, &operation).await?;
    }
    Ok(())
}

async fn half_way(b: Arc<Bench>) -> Result<()> {
    let volume = source(&b).await?;
    let (_, uri) = target(&b, 4 * MIB).await?;
    let relay = Relay::start(b.directory(), "relay", &uri, 300 << 10)?;
    let operation = copy(&b, &volume, "-1", &remote_of(relay.uri()), &[(0, 48)]).await?;
    b.data_stat(&operation).await?;
    relay.cut().await;
    failed(&b, &operation).await
}

async fn too_small(b: Arc<Bench>) -> Result<()> {
    let volume = source(&b).await?;
    let (_, uri) = target(&b, MIB).await?;
    let operation = copy(&b, &volume, "-1", &remote_of(&uri), &[(0, 17)]).await?;
    failed(&b, &operation).await?;
    // What fits is copied, however large the rest of the source.
    let operation = copy(&b, &volume, "-1", &remote_of(&uri), &[(0, 16)]).await?;
    completed(&b.data_wait(&operation).await?)
}

async fn taken_down(b: Arc<Bench>) -> Result<()> {
    let volume = source(&b).await?;
    b.plug(&volume, "5").await?;
    let (_, uri) = target(&b, 4 * MIB).await?;
    let relay = Relay::start(b.directory(), "relay", &uri, 300 << 10)?;
    let operation = copy(&b, &volume, "5", &remote_of(relay.uri()), &[(0, 48)]).await?;
    b.data_stat(&operation).await?;
    b.unplug(&volume, "5").await?;
    failed(&b, &operation).await
}

async fn beside(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(16 * MIB).await?;
    b.write(&volume, 0, 16 * MIB as usize, 1).await?;
    let mut guest = guest_of(&b, &volume).await?;
    let (target, uri) = target(&b, 16 * MIB).await?;
    // Slow at first, so that copy and mirror go on at once for a while.
    let relay = Relay::start(b.directory(), "relay", &uri, 2 * MIB as u64)?;
    let mirror = b.mirror(&volume, "5", &remote_of(relay.uri())).await?;
    let operation = copy(&b, &volume, "5", &remote_of(&uri), &[(0, 256)]).await?;
    writes(&guest, 100).await?;
    relay.allow(u64::MAX);
    completed(&b.data_wait(&operation).await?)?;
    completed(&b.data_wait(&mirror).await?)?;
    writes(&guest, 100).await?;
    guest.suspend().await;
    b.unplug(&volume, "5").await?;
    completed(&b.data_stat(&operation).await?)?;
    b.unplug(&target, "MIR0a1b2c").await?;
    has_all_writes(&b, &target, &guest).await?;
    same(&b, &volume, &target).await
}

async fn other(b: Arc<Bench>) -> Result<()> {
    let volume = source(&b).await?;
    let (_, uri) = target(&b, 4 * MIB).await?;
    let elsewhere = b.create(4 * MIB).await?;
    let elsewhere = remote_of(&b.plug(&elsewhere, "MIR3a3b3c").await?);
    let relay = Relay::start(b.directory(), "relay", &uri, 300 << 10)?;
    let mirror = b.mirror(&volume, "-1", &remote_of(relay.uri())).await?;
    let request = Request::data_copy(DBG, uri_of(&volume)?, "-1", &elsewhere, BLOCK, &[(0, 1)]);
    refused(b.call(&request).await)?;
    relay.allow(u64::MAX);
    completed(&b.data_wait(&mirror).await?)?;
    let relay = Relay::start(b.directory(), "relay2", &uri, 300 << 10)?;
    let operation = copy(&b, &volume, "-1", &remote_of(relay.uri()), &[(0, 48)]).await?;
    refused(b.mirror(&volume, "-1", &elsewhere).await)?;
    relay.allow(u64::MAX);
    completed(&b.data_wait(&operation).await?)
}
