//! What xapi's quicktest looks for in storage (xen-api ocaml/quicktest), made of the calls that it comes down to.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;

use super::bench::{DBG, MIB, nbd_of};
use super::request::remote_of;
use super::{Bench, Group, Need, raw};
use crate::nbd::Client;
use crate::smapiv2::{Dp, Sr, VdiInfo, Vm};
use crate::wire::{Implementation, Json, Request};

const SNAPSHOT: Need = Need::Method("Volume.snapshot");
const CLONE: Need = Need::Method("Volume.clone");
const READONLY: Need = Need::Method("Datapath.activate_readonly");

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("sr_scan, sr_update: a working SR is scanned and updated without an error", &[], scan);
    group.add(
        "sr_probe: an SR that was unplugged is found by its PBD's device-config",
        &[Need::Method("SR.probe")],
        probe,
    );
    group.add("sr_set_name: an SR's new name and description are there after an update", &[], set_name);
    group.add("vdi_create_destroy: a disk is as large as asked, and gone after one scan", &[], create_destroy);
    group.add("vdi_update: Volume.stat after Volume.create tells the same", &[], update);
    group.add("vdi_resize: a disk grows by a mebibyte", &[Need::Method("Volume.resize")], resize);
    group.add(
        "vdi_snapshot: a snapshot has the disk's size, another location, and is one in the scan",
        &[SNAPSHOT],
        snapshot,
    );
    group.add(
        "vdi_clone: a clone has the disk's size, another location, and is no snapshot",
        &[CLONE, SNAPSHOT],
        clone,
    );
    group.add("vdi_snapshot_in_pool: a disk that is active can be snapshotted", &[SNAPSHOT], snapshot_active);
    group.add(
        "multiple_dom0_attach: one disk is attached read-only to dom0 twenty times, nested",
        &[READONLY],
        many_attaches,
    );
    group.add("data integrity: a filled disk has the same bytes after a copy through dom0", &[READONLY], integrity);
    group.add(
        "vm_snapshot: a disk that is reverted has the snapshot's bytes and its own location",
        &[Need::Feature("VDI_REVERT"), READONLY],
        revert,
    );
    group.add(
        "SMAPIv3 migration test: a halted VM's disk of 2 MiB goes to another SR",
        &[Need::Feature("VDI_MIRROR"), READONLY],
        migration,
    );
    group.add(
        "static_vdis: an SR and a disk are attached by the command line, before xapi runs",
        &[Need::Feature("VDI_ATTACH_OFFLINE")],
        static_vdis,
    );
}

/// Makes the SR known to the host as xapi would, and gives its name there.
async fn plugged(b: &Bench) -> Result<Sr> {
    let sr = Sr(b.sr.uuid.clone());
    b.host.sr_attach(DBG, &b.subject.sr_type, &sr, &b.sr.config).await?;
    Ok(sr)
}

async fn scan(b: Arc<Bench>) -> Result<()> {
    let sr = plugged(&b).await?;
    ensure!(b.host.sr_scan(DBG, &sr).await?.is_empty(), "a new SR has disks");
    b.host.sr_stat(DBG, &sr).await?;
    Ok(())
}

async fn probe(b: Arc<Bench>) -> Result<()> {
    let sr = plugged(&b).await?;
    b.host.sr_detach(DBG, &sr).await?;
    let found = b.host.sr_probe(DBG, &b.subject.sr_type, &b.sr.config).await?;
    b.host.sr_attach(DBG, &b.subject.sr_type, &sr, &b.sr.config).await?;
    let has =
        |result: &crate::wire::ProbeResult| result.configuration.contains(&("sr_uuid".to_owned(), sr.0.clone()));
    ensure!(found.iter().any(has), "SR {sr} is not in {found:?}");
    Ok(())
}

async fn set_name(b: Arc<Bench>) -> Result<()> {
    let sr = plugged(&b).await?;
    b.host.sr_set_name_label(DBG, &sr, "test_name_label").await?;
    b.host.sr_set_name_description(DBG, &sr, "test_name_description").await?;
    let stat = b.host.sr_stat(DBG, &sr).await?;
    ensure!(
        (stat.name.as_str(), stat.description.as_str()) == ("test_name_label", "test_name_description"),
        "{stat:?}"
    );
    Ok(())
}

async fn create_destroy(b: Arc<Bench>) -> Result<()> {
    let sr = plugged(&b).await?;
    for mebibytes in 4..=8 {
        let size = mebibytes * MIB + 1;
        let vdi = b.host.vdi_create(DBG, &sr, &VdiInfo::blank("quicktest", size)).await?;
        ensure!(vdi.virtual_size >= size, "{size} bytes were asked for: {vdi:?}");
        ensure!(
            b.host.sr_scan(DBG, &sr).await?.iter().any(|found| found.vdi == vdi.vdi),
            "{vdi:?} is not in the scan"
        );
        b.host.vdi_destroy(DBG, &sr, &vdi.vdi).await?;
        let left = b.host.sr_scan(DBG, &sr).await?;
        ensure!(left.is_empty(), "after one scan there is still {left:?}");
    }
    Ok(())
}

async fn update(b: Arc<Bench>) -> Result<()> {
    let sr = plugged(&b).await?;
    let vdi = b.host.vdi_create(DBG, &sr, &VdiInfo::blank("quicktest", 4 * MIB)).await?;
    let stat = b.host.vdi_stat(DBG, &sr, &vdi.vdi).await?;
    ensure!(stat.virtual_size == vdi.virtual_size && stat.name_label == "quicktest", "{vdi:?}, then {stat:?}");
    Ok(())
}

async fn resize(b: Arc<Bench>) -> Result<()> {
    let sr = plugged(&b).await?;
    let vdi = b.host.vdi_create(DBG, &sr, &VdiInfo::blank("quicktest", 4 * MIB)).await?;
    let wanted = vdi.virtual_size + MIB;
    let answered = b.host.vdi_resize(DBG, &sr, &vdi.vdi, wanted).await?;
    let stat = b.host.vdi_stat(DBG, &sr, &vdi.vdi).await?;
    ensure!(answered >= wanted && stat.virtual_size >= wanted, "{wanted} bytes were asked for: {stat:?}");
    Ok(())
}

async fn snapshot(b: Arc<Bench>) -> Result<()> {
    let sr = plugged(&b).await?;
    let vdi = b.host.vdi_create(DBG, &sr, &VdiInfo::blank("quicktest", 4 * MIB)).await?;
    let taken = b.host.vdi_snapshot(DBG, &sr, &vdi).await?;
    let found = in_scan(&b, &sr, &taken).await?;
    ensure!(found.is_a_snapshot && found.snapshot_of == vdi.vdi, "{found:?}");
    ensure!(found.virtual_size == vdi.virtual_size && found.vdi != vdi.vdi, "{found:?} of {vdi:?}");
    ensure!(!in_scan(&b, &sr, &vdi).await?.is_a_snapshot, "the disk itself became a snapshot");
    b.host.vdi_stat(DBG, &sr, &taken.vdi).await?;
    Ok(())
}

async fn clone(b: Arc<Bench>) -> Result<()> {
    let sr = plugged(&b).await?;
    let vdi = b.host.vdi_create(DBG, &sr, &VdiInfo::blank("quicktest", 4 * MIB)).await?;
    let taken = b.host.vdi_snapshot(DBG, &sr, &vdi).await?;
    for of in [&vdi, &taken] {
        let made = b.host.vdi_clone(DBG, &sr, of).await?;
        let found = in_scan(&b, &sr, &made).await?;
        ensure!(found.virtual_size == vdi.virtual_size && found.vdi != of.vdi, "{found:?} of {of:?}");
        ensure!(!found.is_a_snapshot, "the clone is a snapshot in the scan: {found:?}");
    }
    Ok(())
}

async fn in_scan(b: &Bench, sr: &Sr, vdi: &VdiInfo) -> Result<VdiInfo> {
    let scanned = b.host.sr_scan(DBG, sr).await?;
    scanned.into_iter().find(|found| found.vdi == vdi.vdi).with_context(|| format!("{} is not in the scan", vdi.vdi))
}

async fn snapshot_active(b: Arc<Bench>) -> Result<()> {
    let sr = plugged(&b).await?;
    let vdi = b.host.vdi_create(DBG, &sr, &VdiInfo::blank("quicktest", 4 * MIB)).await?;
    let (dp, vm) = (Dp::from("vbd/9/xvda"), Vm::from("9"));
    b.host.vdi_attach3(DBG, &dp, &sr, &vdi.vdi, &vm, true).await?;
    b.host.vdi_activate3(DBG, &dp, &sr, &vdi.vdi, &vm).await?;
    let taken = b.host.vdi_snapshot(DBG, &sr, &vdi).await?;
    b.host.dp_destroy(DBG, &dp).await?;
    ensure!(in_scan(&b, &sr, &taken).await?.is_a_snapshot, "the snapshot is none");
    Ok(())
}

async fn many_attaches(b: Arc<Bench>) -> Result<()> {
    let sr = plugged(&b).await?;
    let vdi = b.host.vdi_create(DBG, &sr, &VdiInfo::blank("quicktest", 4 * MIB)).await?;
    let dps: Vec<Dp> = (0..20).map(|n| Dp(format!("vbd/0/xvd{n}"))).collect();
    let dom0 = Vm::from("0");
    for dp in &dps {
        b.host.vdi_attach2(DBG, dp, &sr, &vdi.vdi, false).await?;
        b.host.vdi_activate3(DBG, dp, &sr, &vdi.vdi, &dom0).await?;
    }
    for dp in dps.iter().rev() {
        let client = Client::connect(&nbd_of(&b.host.vdi_attach2(DBG, dp, &sr, &vdi.vdi, false).await?)?).await?;
        client.read(0, 4096).await.with_context(|| format!("through {dp}"))?;
        client.disconnect().await;
        b.host.dp_destroy(DBG, dp).await?;
    }
    Ok(())
}

/// Bytes that repeat nowhere in a block of this size.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| u8::try_from((n / 7 + n / 4096) % 251).unwrap_or(0)).collect()
}

async fn integrity(b: Arc<Bench>) -> Result<()> {
    let (from, to) = (b.create(4 * MIB).await?, b.create(4 * MIB).await?);
    let written = pattern(4 << 20);
    let source = Client::connect(&b.plug(&from, "7").await?).await?;
    source.write(0, Bytes::from(written.clone())).await?;
    source.flush().await?;
    source.disconnect().await;
    b.unplug(&from, "7").await?;
    let source = Client::connect(&b.plug_readonly(&from, "u0_vbd_0_xvda").await?).await?;
    let target = Client::connect(&b.plug(&to, "u0_vbd_0_xvdb").await?).await?;
    for at in 0..4u64 {
        target.write(at << 20, source.read(at << 20, 1 << 20).await?).await?;
    }
    target.flush().await?;
    let copied = target.read(0, 4 << 20).await?;
    source.disconnect().await;
    target.disconnect().await;
    b.unplug(&from, "u0_vbd_0_xvda").await?;
    b.unplug(&to, "u0_vbd_0_xvdb").await?;
    ensure!(copied[..] == written[..], "the copy differs from what was written");
    Ok(())
}

async fn revert(b: Arc<Bench>) -> Result<()> {
    let sr = plugged(&b).await?;
    let vdi = b.host.vdi_create(DBG, &sr, &VdiInfo::blank("quicktest", 4 * MIB)).await?;
    let volume = b.stat(&vdi.vdi.0).await?;
    b.write(&volume, 0, 65536, 1).await?;
    let taken = b.host.vdi_snapshot(DBG, &sr, &vdi).await?;
    b.write(&volume, 0, 65536, 2).await?;
    b.host.vdi_revert(DBG, &sr, &taken).await?;
    b.expect_content(&b.stat(&vdi.vdi.0).await?, &[(0, 65536, 1)]).await?;
    b.expect_content(&b.stat(&taken.vdi.0).await?, &[(0, 65536, 1)]).await
}

async fn migration(b: Arc<Bench>) -> Result<()> {
    let source = b.create(2 * MIB).await?;
    b.write(&source, MIB as u64, 65536, 0x77).await?;
    let there = b.new_sr("other").await?;
    let request = Request::volume_create(DBG, &there.sr, "a copy", "", 2 * MIB, false);
    let target = b.volume_answer(&request).await?;
    let remote = remote_of(&b.plug(&target, "MIR0a1b2c").await?);
    b.attach(&source, "u0_mirror_vbd").await?;
    let status = b.data_wait(&b.mirror(&source, "-1", &remote).await?).await?;
    ensure!(status.complete, "{status:?}");
    b.unplug(&source, "u0_mirror_vbd").await?;
    b.unplug(&target, "MIR0a1b2c").await?;
    let client = Client::connect(&b.plug_readonly(&target, "8").await?).await?;
    let read = client.read(MIB as u64, 65536).await?;
    client.disconnect().await;
    b.unplug(&target, "8").await?;
    ensure!(read.iter().all(|byte| *byte == 0x77), "the copy has not the disk's bytes");
    b.call(&Request::volume("Volume.destroy", DBG, &there.sr, &target.key)).await?;
    b.call(&Request::sr("SR.destroy", DBG, &there.sr)).await.map(drop)
}

/// python3/bin/static-vdis of xen-api: no `--json`, positional arguments behind a name, JSON on stdout.
async fn static_vdis(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    b.write(&volume, 0, 4096, 0x42).await?;
    b.call(&Request::sr("SR.detach", DBG, &b.sr.sr)).await?;

    let query = line(&b, "Plugin.Query", &[]).await?;
    let features = query.fields("query")?.required("features", Json::strings)?;
    ensure!(features.iter().any(|feature| feature == "VDI_ATTACH_OFFLINE"), "{features:?}");
    let mut configuration = Vec::new();
    for (key, value) in &b.sr.config {
        configuration.extend(["--configuration", key, value]);
    }
    let sr = line(&b, "SR.attach", &configuration).await?.string("sr")?;
    ensure!(sr == b.sr.sr, "the command line attached {sr}, not {}", b.sr.sr);
    let stat = line(&b, "Volume.stat", &[&sr, &volume.key]).await?;
    super::answer::decode("Volume.stat", &stat)?;
    let uri = stat.fields("stat")?.required("uri", Json::strings)?.first().context("it has no uri")?.clone();
    let answer = line(&b, "Datapath.attach", &[&uri, "0"]).await?;
    let attached = crate::wire::Attached::decode(&answer)?;
    let usable = |found: &Implementation| !matches!(found, Implementation::XenDisk { .. });
    ensure!(attached.implementations.iter().any(usable), "static-vdis can use none of {attached:?}");
    line(&b, "Datapath.activate", &[&uri, "0"]).await?.unit("activate")?;
    if attached.nbd().is_some() {
        let client = Client::connect(&nbd_of(&attached)?).await?;
        let read = client.read(0, 4096).await?;
        ensure!(read.iter().all(|byte| *byte == 0x42), "other bytes are read than were written");
        client.disconnect().await;
    }
    line(&b, "Datapath.deactivate", &[&uri, "0"]).await?.unit("deactivate")?;
    Ok(line(&b, "Datapath.detach", &[&uri, "0"]).await?.unit("detach")?)
}

async fn line(b: &Bench, method: &'static str, arguments: &[&str]) -> Result<Json> {
    let mut all = vec!["static-vdis"];
    all.extend(arguments);
    let printed = raw::run_line(&b.script(method)?, b.host.root(), &all).await?;
    printed.judge()?.with_context(|| format!("{method} {}", all.join(" ")))
}
