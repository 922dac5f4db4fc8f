//! What follows once everything has been sent: the snapshots' metadata, the VM's switch to the destination, the database.

use std::time::{Duration, Instant};

use super::MirrorId;
use super::engine::{Ctx, Done};
use crate::db::{ActiveDisk, vbd_dp, vm_plug};
use crate::host::{Host, lock};
use crate::smapiv2::{Error, Result, Vdi, VdiInfo};

/// A VM that runs at the destination.
#[derive(Debug)]
pub(super) struct Switched {
    pub domid: u32,
    pub downtime: Duration,
}

/// `update_snapshot_info`: source and destination are scanned for each disk, the content ids of every pair compared, and
/// the destination told whose snapshots its snapshots are.
pub(super) async fn update_snapshot_info(ctx: &Ctx<'_>, done: &[Done]) -> Result<()> {
    let snapshots: Vec<(Vdi, Vdi, Vdi)> = done
        .iter()
        .filter(|d| !d.conf.is_leaf())
        .map(|d| (d.conf.disk.clone(), d.conf.vdi.clone(), d.remote.vdi.clone()))
        .chain(
            done.iter()
                .flat_map(|d| d.relations.iter().map(|r| (d.conf.vdi.clone(), r.source.clone(), r.copy.vdi.clone()))),
        )
        .collect();
    if snapshots.is_empty() {
        return Ok(());
    }
    for leaf in done.iter().filter(|d| d.conf.is_leaf()) {
        let find = |volumes: &[VdiInfo], vdi: &Vdi| {
            let found = volumes.iter().find(|v| v.vdi == *vdi).cloned();
            found.ok_or_else(|| Error::VdiDoesNotExist(vdi.0.clone()))
        };
        let local = ctx.source.sr_scan(&ctx.dbg, &leaf.conf.sr).await?;
        let remote = ctx.destination.sr_scan(&ctx.dbg, &ctx.sr).await?;
        find(&local, &leaf.conf.vdi)?;
        for (_, source, copy) in snapshots.iter().filter(|(disk, _, _)| *disk == leaf.conf.vdi) {
            let (source, copy) = (find(&local, source)?, find(&remote, copy)?);
            if source.content_id != copy.content_id {
                return Err(Error::ContentIdsDoNotMatch(source.vdi.0, copy.vdi.0));
            }
            let (host, time) = (&ctx.destination, &source.snapshot_time);
            let set =
                host.vdi_set_snapshot_metadata(&ctx.dbg, &ctx.sr, &copy.vdi, &leaf.remote.vdi, time, true).await;
            if let Err(error) = set {
                tracing::warn!(%error, vdi = %copy.vdi, "the backend does not know whose snapshot this is");
            }
        }
    }
    Ok(())
}

/// `VM.migrate`: the VM is suspended, each disk deactivated, which ends its mirror, and everything started at the
/// destination; then the source's domain goes.
pub(super) async fn migrate_vm(ctx: &Ctx<'_>, done: &[Done]) -> Result<Switched> {
    let record = ctx.xapi.vm(ctx.vm).map_err(internal)?;
    let domid = record.domid.ok_or_else(|| Error::Internal("the VM is halted".to_owned()))?;
    let began = Instant::now();
    ctx.observer().suspend().await.map_err(internal)?;
    for vbd in &record.vbds {
        let dp = vbd_dp(domid, &vbd.device);
        if ctx.source.vdi_deactivate(&ctx.dbg, &dp).await? {
            let sr = ctx.xapi.vdi(&vbd.vdi).map_err(internal)?.sr;
            post_deactivate(&ctx.source, &MirrorId { sr, vdi: vbd.vdi.clone() }).await;
        }
    }
    let new_domid = ctx.destination.new_domid();
    let switched = async {
        let mut disks = Vec::new();
        for (index, vbd) in record.vbds.iter().enumerate() {
            let moved = done.iter().find(|d| d.conf.vdi == vbd.vdi);
            let vdi = &moved.ok_or_else(|| Error::VdiDoesNotExist(vbd.vdi.0.clone()))?.remote.vdi;
            let uri = vm_plug(&ctx.destination, new_domid, &vbd.device, &ctx.sr, vdi).await.map_err(plugged)?;
            disks.push(ActiveDisk { index, vdi: vdi.clone(), uri });
        }
        ctx.observer().resume(disks).await.map_err(internal)
    }
    .await;
    if let Err(error) = switched {
        for vbd in &record.vbds {
            if let Err(error) = ctx.destination.dp_destroy(&ctx.dbg, &vbd_dp(new_domid, &vbd.device)).await {
                tracing::warn!(%error, "clean-up of a destination disk failed");
            }
        }
        return Err(error);
    }
    let downtime = began.elapsed();
    for vbd in &record.vbds {
        let dp = vbd_dp(domid, &vbd.device);
        // The VM runs at the destination by now. xapi would unwind and destroy its volumes under it; here the call is
        // repeated, as xenopsd does for a domain that it finds half-dead.
        if ctx.source.dp_destroy(&ctx.dbg, &dp).await.is_err()
            && let Err(error) = ctx.source.dp_destroy(&ctx.dbg, &dp).await
        {
            tracing::warn!(%error, %dp, "a source datapath stays");
        }
    }
    Ok(Switched { domid: new_domid, downtime })
}

fn internal(error: anyhow::Error) -> Error {
    Error::Internal(format!("{error:#}"))
}

fn plugged(error: anyhow::Error) -> Error {
    error.downcast::<Error>().unwrap_or_else(internal)
}

/// The hook after a deactivation, `receive_finalize3`: its errors are only logged, and then the record stays.
async fn post_deactivate(host: &Host, id: &MirrorId) {
    let receiving = {
        let state = lock(&host.sxm);
        if !state.sends.contains_key(id) {
            return;
        }
        state.receives.get(id).cloned()
    };
    let dbg = "Mirror-cleanup";
    let finalised = async {
        if let Some(r) = receiving {
            r.host.dp_destroy2(dbg, &r.dp, &r.sr, &r.vdi, &r.vm).await?;
            r.host.vdi_remove_from_sm_config(dbg, &r.sr, &r.vdi, "base_mirror").await?;
        }
        lock(&host.sxm).receives.remove(id);
        Ok::<(), Error>(())
    }
    .await;
    if let Err(error) = finalised {
        tracing::error!(%error, %id, "receive_finalize3 failed");
    }
    lock(&host.sxm).sends.remove(id);
}

/// After a failure that found the VM suspended: xapi shuts it down, a user starts it again. True if it runs.
pub(super) async fn restart(ctx: &Ctx<'_>) -> bool {
    let Ok(record) = ctx.xapi.vm(ctx.vm) else { return false };
    if let Some(domid) = record.domid {
        for vbd in &record.vbds {
            if let Err(error) = ctx.source.dp_destroy(&ctx.dbg, &vbd_dp(domid, &vbd.device)).await {
                tracing::warn!(%error, "shutting down the suspended VM");
            }
        }
    }
    if let Some(record) = ctx.xapi.db().vm_mut(ctx.vm) {
        record.domid = None;
    }
    let started = async { ctx.observer().resume(ctx.xapi.vm_start(ctx.vm).await?).await };
    match started.await {
        Ok(()) => true,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the VM does not start again");
            false
        }
    }
}

/// Records that everything is at the destination.
pub(super) fn commit(ctx: &Ctx<'_>, done: &[Done], domid: Option<u32>) {
    let mut db = ctx.xapi.db();
    let mut moved: Vec<(Vdi, VdiInfo)> = Vec::new();
    for done in done {
        moved.push((done.conf.vdi.clone(), done.remote.clone()));
        moved.extend(done.relations.iter().map(|r| (r.source.clone(), r.copy.clone())));
    }
    let new = |vdi: &Vdi| moved.iter().find(|(source, _)| source == vdi).map(|(_, info)| info.vdi.clone());
    for (source, info) in &moved {
        let snapshot_of = db.vdi(source).and_then(|v| v.snapshot_of.clone()).and_then(|disk| new(&disk));
        db.add_vdi(&ctx.sr, info.clone(), snapshot_of);
        db.remove_vdi(source);
    }
    let vms: Vec<_> = db.snapshots_of(ctx.vm).map(|(k, _)| k).chain([ctx.vm]).collect();
    for vm in vms {
        if let Some(record) = db.vm_mut(vm) {
            for vbd in &mut record.vbds {
                if let Some(vdi) = new(&vbd.vdi) {
                    vbd.vdi = vdi;
                }
            }
            record.host = std::sync::Arc::clone(&ctx.destination);
        }
    }
    if let Some(record) = db.vm_mut(ctx.vm) {
        record.domid = domid;
    }
}
