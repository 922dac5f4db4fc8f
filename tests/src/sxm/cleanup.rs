//! What xapi does about a migration that failed or was interrupted, and what a user does about what xapi leaves.

use super::{MirrorId, Receiving};
use crate::db::Xapi;
use crate::host::{Host, lock};
use crate::smapiv2::{Error, Result, Sr, Vdi, VdiInfo};

/// A volume that no database knew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Swept {
    /// The host it was found on.
    pub host: String,
    /// The volume.
    pub vdi: Vdi,
    /// Its name.
    pub name: String,
    /// Why it could not be destroyed.
    pub error: Option<String>,
}

/// `receive_cancel2`: the destination's datapath and leaf go; errors are only logged and the record goes anyway.
pub(super) async fn receive_cancel(host: &Host, dbg: &str, id: &MirrorId) {
    let receiving = lock(&host.sxm).receives.get(id).cloned();
    let Some(receiving) = receiving else { return };
    let Receiving { host: destination, sr, vdi, dp, .. } = &receiving;
    if let Err(error) = destination.dp_destroy(dbg, dp).await {
        tracing::warn!(%error, %vdi, "receive_cancel2: DP.destroy");
    }
    if let Err(error) = destination.vdi_destroy(dbg, sr, vdi).await {
        tracing::warn!(%error, %vdi, "receive_cancel2: VDI.destroy");
    }
    lock(&host.sxm).receives.remove(id);
}

/// `stop`: a snapshot of the live leaf is what ends its mirror; then the destination is cleaned.
///
/// # Errors
/// Scan, snapshot or its destruction failed: the destination is not cleaned then, as in xapi.
pub(super) async fn stop(host: &Host, dbg: &str, id: &MirrorId) -> Result<()> {
    let sending = lock(&host.sxm).sends.get(id).cloned();
    let sending = sending.ok_or_else(|| Error::Internal(format!("there is no mirror {id}")))?;
    if sending.remote.is_some() {
        let volumes = host.sr_scan(dbg, &id.sr).await?;
        let local = volumes.iter().find(|v| v.vdi == id.vdi);
        let local = local.ok_or_else(|| Error::VdiDoesNotExist(id.vdi.0.clone()))?;
        let snapshot = host.vdi_snapshot(dbg, &id.sr, local).await?;
        host.vdi_destroy(dbg, &id.sr, &snapshot.vdi).await?;
        let marked = |v: &&VdiInfo| v.sm_config.iter().any(|(k, v)| k == "base_mirror" && *v == id.to_string());
        if let Some(left) = volumes.iter().find(marked) {
            host.vdi_destroy(dbg, &id.sr, &left.vdi).await?;
        }
        receive_cancel(host, dbg, id).await;
    }
    lock(&host.sxm).sends.remove(id);
    Ok(())
}

/// Restarts the toolstack of a host: all migrations that it sends are cancelled, whatever their state.
///
/// xapi-storage-script keeps its attached SRs, and no SR.attach is replayed; its cache of stats is gone.
pub async fn toolstack_restart(host: &Host) {
    let dbg = "OpaqueRef:restart";
    lock(&host.stat_cache).clear();
    let (sends, receives) = {
        let state = lock(&host.sxm);
        (state.sends.clone(), state.receives.clone())
    };
    for (id, sending) in sends {
        if let Err(error) = stop(host, dbg, &id).await {
            tracing::warn!(%error, %id, "stop failed");
        }
        if let Err(error) = host.dp_destroy(dbg, &sending.local_dp).await {
            tracing::warn!(%error, %id, "DP.destroy failed");
        }
    }
    for id in receives.keys() {
        receive_cancel(host, dbg, id).await;
    }
    let mut state = lock(&host.sxm);
    state.sends.clear();
    state.receives.clear();
}

/// Finalises what xapi forgets for a halted VM: the receiver stays attached for `MIR…`, and its record makes the next
/// toolstack restart of the source destroy the migrated leaf.
///
/// # Errors
/// As the plugins say.
pub async fn release(source: &Host, stale: &[Receiving]) -> Result<()> {
    for Receiving { host, sr, vdi, dp, vm } in stale {
        host.dp_destroy2("Mirror-cleanup", dp, sr, vdi, vm).await?;
        host.vdi_remove_from_sm_config("Mirror-cleanup", sr, vdi, "base_mirror").await?;
        let mut state = lock(&source.sxm);
        state.receives.retain(|_, r| r.vdi != *vdi);
        state.sends.retain(|_, s| s.remote.as_ref() != Some(vdi));
    }
    Ok(())
}

/// Destroys every volume of an SR that the database does not know, as a user does after a scan.
///
/// # Errors
/// The scan failed. A volume that cannot be destroyed is in the list with its error.
pub async fn sweep(xapi: &Xapi, host: &Host, sr: &Sr) -> Result<Vec<Swept>> {
    let dbg = "OpaqueRef:sweep";
    let found = host.sr_scan(dbg, sr).await?;
    let known: Vec<Vdi> = xapi.db().vdis_of(sr).map(|v| v.info.vdi.clone()).collect();
    let mut swept = Vec::new();
    for volume in found.into_iter().filter(|v| !known.contains(&v.vdi)) {
        for (dp, info) in host.dp_list() {
            if info.vdi == volume.vdi && info.sr == *sr {
                let _ = host.dp_destroy(dbg, &dp).await;
            }
        }
        let error = host.vdi_destroy(dbg, sr, &volume.vdi).await.err().map(|e| e.to_string());
        let (host, name) = (host.name().to_owned(), volume.name_label);
        swept.push(Swept { host, vdi: volume.vdi, name, error });
    }
    Ok(swept)
}
