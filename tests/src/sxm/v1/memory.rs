//! What xapi remembers of a migration from SMAPIv1, and how it ends what it remembers (ocaml/xapi/storage_migrate.ml).

use super::{DBG, Disk, Import, MIRROR};
use crate::host::lock;
use crate::smapiv2::{Dp, Result, Vdi, VdiInfo, Vm};

/// What the destination has made for a disk.
#[derive(Debug, Clone)]
pub struct Receiving {
    /// What the tapdisk writes to, and what stays.
    pub leaf: VdiInfo,
    /// The snapshot of the fresh leaf.
    pub dummy: Vdi,
    /// What the source's snapshot is copied into.
    pub parent: Vdi,
    /// The leaf's datapath.
    pub dp: Dp,
}

/// The sending side of a mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sending {
    /// The source's tapdisk has no connection yet.
    Preparing,
    /// It has.
    Mirroring,
}

/// All of it is the sender's, as for a migration from SMAPIv3.
#[derive(Debug, Default)]
pub struct Memory {
    /// The mirror at the source.
    pub send: Option<Sending>,
    /// The mirror at the destination.
    pub receive: Option<Receiving>,
    /// The copy's datapath and volume at the destination.
    pub copy: Option<(Dp, Vdi)>,
}

impl Import<'_> {
    /// `stop`: a snapshot of the disk ends its mirror, and the destination is cleaned.
    pub(super) async fn stop(&self, disk: &Disk) {
        disk.end_mirror().await;
        let send = lock(&self.memory).send;
        if send == Some(Sending::Mirroring) {
            self.receive_cancel().await;
        }
        lock(&self.memory).send = None;
    }

    /// `receive_finalize3`, of which the dummy's destruction may fail.
    pub(super) async fn receive_finalize(&self) -> Result<()> {
        let Some(receiving) = lock(&self.memory).receive.clone() else { return Ok(()) };
        let Receiving { leaf, dummy, parent, dp } = receiving;
        let (host, sr) = (self.destination, self.sr);
        host.dp_destroy2(DBG, &dp, sr, &leaf.vdi, &Vm::from(MIRROR)).await?;
        host.vdi_compose(DBG, sr, &parent, &leaf.vdi).await?;
        self.destroy_logged(&dummy).await;
        host.vdi_remove_from_sm_config(DBG, sr, &leaf.vdi, "base_mirror").await?;
        lock(&self.memory).receive = None;
        Ok(())
    }

    /// `receive_cancel2`: every error is only logged.
    async fn receive_cancel(&self) {
        let Some(receiving) = lock(&self.memory).receive.take() else { return };
        if let Err(error) = self.destination.dp_destroy(DBG, &receiving.dp).await {
            tracing::warn!(%error, "receive_cancel2: DP.destroy");
        }
        for vdi in [&receiving.dummy, &receiving.leaf.vdi, &receiving.parent] {
            self.destroy_logged(vdi).await;
        }
    }

    /// Restarts the toolstack of the source: whatever it remembers is cancelled, in any state.
    pub async fn toolstack_restart(&self, disk: &Disk) {
        lock(&self.destination.stat_cache).clear();
        if lock(&self.memory).send.is_some() {
            self.stop(disk).await;
        }
        let copy = lock(&self.memory).copy.take();
        if let Some((dp, vdi)) = copy {
            if let Err(error) = self.destination.dp_destroy(DBG, &dp).await {
                tracing::warn!(%error, "the copy's DP.destroy");
            }
            self.destroy_logged(&vdi).await;
        }
        self.receive_cancel().await;
    }
}
