//! Volume.compose: a volume's own data goes onto another volume, which ends.

use std::sync::Arc;

use anyhow::{Result, ensure};
use uuid::Uuid;

use super::bench::{DBG, MIB, refused, refused_with, uri_of};
use super::{Bench, Group, Need};
use crate::wire::{Request, Volume};

const COMPOSE: Need = Need::Feature("VDI_COMPOSE");
const SNAPSHOT: Need = Need::Method("Volume.snapshot");
const CLONE: Need = Need::Method("Volume.clone");
/// A mebibyte, as an offset and as a length.
const AT: u64 = MIB as u64;
const LENGTH: usize = MIB as usize;

/// What the child reads after the parent was full of 1, the child had 2 in its second mebibyte and zeroes in its third.
const COMPOSED: &[(u64, usize, u8)] = &[(0, LENGTH, 1), (AT, LENGTH, 2), (3 * AT, LENGTH, 1)];

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("Volume.compose shows the parent's data where the child was never written", &[COMPOSE], content);
    group.add("Volume.compose takes the parent from SR.ls, and destroying it then succeeds", &[COMPOSE], parent_goes);
    group.add("Volume.compose changes neither the child's name nor its size nor its keys", &[COMPOSE], child_stays);
    group.add(
        "Volume.compose under a snapshot of the fresh child, as in a migration from SMAPIv1",
        &[COMPOSE, SNAPSHOT],
        migration,
    );
    group.add(
        "Volume.compose leaves the parent's snapshots and clones as they were",
        &[COMPOSE, SNAPSHOT, CLONE],
        family,
    );
    group.add(
        "a composed volume is written, snapshotted and cloned like any other",
        &[COMPOSE, SNAPSHOT, CLONE],
        after,
    );
    group.add("Volume.compose onto a smaller parent reads zeroes beyond its end", &[COMPOSE], smaller);
    group.add("Volume.compose a second time changes nothing", &[COMPOSE], again);
    group.add("Volume.compose with an unknown volume is refused and changes nothing", &[COMPOSE], unknown);
    group.add(
        "Volume.compose of a volume that a guest has is refused, and the guest goes on",
        &[COMPOSE, Need::OwnLayout],
        in_use,
    );
}

async fn compose(b: &Bench, child: &Volume, parent: &Volume) -> Result<()> {
    b.call(&Request::volume_compose(DBG, &b.sr.sr, &child.key, &parent.key)).await.map(drop)
}

/// A child and a parent with the data of `COMPOSED`.
async fn pair(b: &Bench) -> Result<(Volume, Volume)> {
    let (child, parent) = (b.create(4 * MIB).await?, b.create(4 * MIB).await?);
    fill(b, &child, &parent).await?;
    Ok((child, parent))
}

async fn fill(b: &Bench, child: &Volume, parent: &Volume) -> Result<()> {
    b.write(parent, 0, 4 * LENGTH, 1).await?;
    b.write(child, AT, LENGTH, 2).await?;
    b.write(child, 2 * AT, LENGTH, 0).await
}

async fn content(b: Arc<Bench>) -> Result<()> {
    let (child, parent) = pair(&b).await?;
    compose(&b, &child, &parent).await?;
    b.expect_content(&child, COMPOSED).await
}

async fn parent_goes(b: Arc<Bench>) -> Result<()> {
    let (child, parent) = pair(&b).await?;
    compose(&b, &child, &parent).await?;
    let listed: Vec<String> = b.ls().await?.into_iter().map(|volume| volume.key).collect();
    ensure!(listed == [child.key.clone()], "SR.ls lists {listed:?}");
    refused(b.stat(&parent.key).await)?;
    b.destroy(&parent.key).await?;
    b.expect_content(&child, COMPOSED).await
}

async fn child_stays(b: Arc<Bench>) -> Result<()> {
    let (child, parent) = pair(&b).await?;
    b.set(&child.key, "vdi-type", "user").await?;
    b.set(&parent.key, "content_id", "the parent's").await?;
    let before = b.stat(&child.key).await?;
    compose(&b, &child, &parent).await?;
    let after = b.stat(&child.key).await?;
    let same = Volume { physical_utilisation: before.physical_utilisation, ..after.clone() };
    ensure!(same == before, "it was {before:?} and is {after:?}");
    Ok(())
}

async fn migration(b: Arc<Bench>) -> Result<()> {
    let leaf = b.create(4 * MIB).await?;
    let dummy = b.snapshot(&leaf.key).await?;
    let parent = b.create(4 * MIB).await?;
    fill(&b, &leaf, &parent).await?;
    compose(&b, &leaf, &parent).await?;
    b.expect_content(&leaf, COMPOSED).await?;
    b.expect_content(&dummy, &[]).await?;
    b.destroy(&dummy.key).await?;
    b.unset(&leaf.key, "_sm_config_base_mirror").await?;
    b.expect_content(&leaf, COMPOSED).await
}

async fn family(b: Arc<Bench>) -> Result<()> {
    let (child, parent) = (b.create(4 * MIB).await?, b.create(4 * MIB).await?);
    b.write(&parent, 0, LENGTH, 7).await?;
    let snapshot = b.snapshot(&parent.key).await?;
    fill(&b, &child, &parent).await?;
    let clone = b.clone_of(&parent.key).await?;
    b.write(&clone, 0, LENGTH, 8).await?;
    compose(&b, &child, &parent).await?;
    b.expect_content(&child, COMPOSED).await?;
    b.expect_content(&snapshot, &[(0, LENGTH, 7)]).await?;
    b.expect_content(&clone, &[(0, LENGTH, 8), (AT, 3 * LENGTH, 1)]).await?;
    for volume in [&snapshot, &clone] {
        b.destroy(&volume.key).await?;
    }
    b.expect_content(&child, COMPOSED).await
}

async fn after(b: Arc<Bench>) -> Result<()> {
    let (child, parent) = pair(&b).await?;
    compose(&b, &child, &parent).await?;
    let snapshot = b.snapshot(&child.key).await?;
    b.write(&child, 0, LENGTH, 5).await?;
    let clone = b.clone_of(&snapshot.key).await?;
    b.write(&clone, 3 * AT, LENGTH, 6).await?;
    b.expect_content(&child, &[(0, LENGTH, 5), (AT, LENGTH, 2), (3 * AT, LENGTH, 1)]).await?;
    b.expect_content(&snapshot, COMPOSED).await?;
    b.expect_content(&clone, &[(0, LENGTH, 1), (AT, LENGTH, 2), (3 * AT, LENGTH, 6)]).await
}

async fn smaller(b: Arc<Bench>) -> Result<()> {
    let (child, parent) = (b.create(8 * MIB).await?, b.create(4 * MIB).await?);
    fill(&b, &child, &parent).await?;
    b.write(&child, 7 * AT, LENGTH, 3).await?;
    compose(&b, &child, &parent).await?;
    b.expect_content(&child, &[COMPOSED, &[(7 * AT, LENGTH, 3)]].concat()).await
}

async fn again(b: Arc<Bench>) -> Result<()> {
    let (child, parent) = pair(&b).await?;
    compose(&b, &child, &parent).await?;
    b.write(&child, 0, LENGTH, 4).await?;
    let second = compose(&b, &child, &parent).await;
    if second.is_err() {
        // xapi-storage-script makes a call again after it was restarted: it has to find what it asked for.
        ensure!(!b.subject.own_layout, "{second:?}");
        refused(second)?;
    }
    b.expect_content(&child, &[(0, LENGTH, 4), (AT, LENGTH, 2), (3 * AT, LENGTH, 1)]).await
}

async fn unknown(b: Arc<Bench>) -> Result<()> {
    let child = b.create(4 * MIB).await?;
    b.write(&child, AT, LENGTH, 2).await?;
    let nobody = Volume { key: Uuid::new_v4().to_string(), ..child.clone() };
    refused_with(compose(&b, &child, &nobody).await, "Volume_does_not_exist")?;
    refused_with(compose(&b, &nobody, &child).await, "Volume_does_not_exist")?;
    refused(compose(&b, &child, &child).await)?;
    b.expect_content(&child, &[(AT, LENGTH, 2)]).await
}

async fn in_use(b: Arc<Bench>) -> Result<()> {
    let (child, parent) = pair(&b).await?;
    for volume in [&child, &parent] {
        let uri = b.plug(volume, "7").await?;
        let guest = crate::nbd::Client::connect(&uri).await?;
        refused_with(compose(&b, &child, &parent).await, "SR_BACKEND_FAILURE_24")?;
        guest.read(0, 512).await?;
        guest.disconnect().await;
        b.unplug(volume, "7").await?;
    }
    ensure!(uri_of(&b.stat(&child.key).await?)? == uri_of(&child)?, "its uri changed");
    compose(&b, &child, &parent).await?;
    b.expect_content(&child, COMPOSED).await
}
