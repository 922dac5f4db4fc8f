//! What xcp-ng-tests (github.com/xcp-ng/xcp-ng-tests, tests/storage) look for in an SR of SMAPIv3.

use std::sync::Arc;

use anyhow::{Result, ensure};
use bytes::Bytes;
use uuid::Uuid;

use super::bench::{DBG, MIB, refused, refused_with};
use super::{Bench, Group, Need};
use crate::nbd::Client;
use crate::wire::Request;

const READONLY: Need = Need::Method("Datapath.activate_readonly");

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("SR.create without its device-config says what sm says: error 90 in its words", &[], missing_device);
    group.add("an SR can be created and destroyed again and again in one place", &[], create_and_destroy);
    group.add("a disk of a wrong size is refused and leaves nothing", &[], invalid_size);
    group.add("a disk that is written from end to end reads as it was written", &[READONLY], full_write);
    group.add("a VM's disk keeps its bytes over starts, reboots and shutdowns", &[READONLY], reboots);
}

async fn missing_device(b: Arc<Bench>) -> Result<()> {
    if b.subject.config.is_empty() {
        return Ok(());
    }
    let request = Request::sr_create(DBG, &Uuid::new_v4().to_string(), &[], "no device", "");
    let failure = refused_with(b.call(&request).await, "SR_BACKEND_FAILURE_90")?;
    let text = failure.params.join(",");
    ensure!(text == ",The request is missing the device parameter,", "the parameters are {:?}", failure.params);
    Ok(())
}

async fn create_and_destroy(b: Arc<Bench>) -> Result<()> {
    let place = b.new_place("again")?;
    for _ in 0..3 {
        let uuid = Uuid::new_v4().to_string();
        let created = b.call(&Request::sr_create(DBG, &uuid, &place, "an SR", "")).await?;
        let config = created.string_map("SR.create")?;
        let sr = b.attach_sr(&config).await?;
        let volume = b.volume_answer(&Request::volume_create(DBG, &sr, "a disk", "", MIB, false)).await?;
        b.call(&Request::volume("Volume.destroy", DBG, &sr, &volume.key)).await?;
        b.call(&Request::sr("SR.destroy", DBG, &sr)).await?;
        refused(b.attach_sr(&config).await)?;
    }
    Ok(())
}

async fn invalid_size(b: Arc<Bench>) -> Result<()> {
    for size in [-1, i64::MAX] {
        refused(b.create(size).await)?;
    }
    ensure!(b.ls().await?.is_empty(), "a refused disk is listed");
    Ok(())
}

async fn full_write(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(16 * MIB).await?;
    let client = Client::connect(&b.plug(&volume, "7").await?).await?;
    for at in 0..16u8 {
        client.write(u64::from(at) << 20, Bytes::from(vec![at + 1; 1 << 20])).await?;
    }
    client.flush().await?;
    client.disconnect().await;
    b.unplug(&volume, "7").await?;
    let stretches: Vec<_> = (0..16u8).map(|at| (u64::from(at) << 20, 1 << 20, at + 1)).collect();
    b.expect_content(&volume, &stretches).await
}

async fn reboots(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(4 * MIB).await?;
    let mut stretches = Vec::new();
    // A reboot is a new domain: the old one's datapath goes first. An ungraceful end deactivates twice.
    for domain in 11..16u8 {
        let name = domain.to_string();
        let client = Client::connect(&b.plug(&volume, &name).await?).await?;
        let offset = u64::from(domain) * 65536;
        client.write(offset, Bytes::from(vec![domain; 65536])).await?;
        client.flush().await?;
        client.disconnect().await;
        b.datapath("Datapath.deactivate", &volume, &name).await?;
        b.unplug(&volume, &name).await?;
        stretches.push((offset, 65536, domain));
    }
    b.expect_content(&volume, &stretches).await
}
