//! Migration from an SMAPIv1 SR (ocaml/xapi/storage_smapiv1_migrate.ml): the source mirrors by its tapdisk, and the
//! destination puts together what came two ways.
//!
//! ```text
//!   source disk ──tapdisk──► HTTP connection ──descriptor──► import ──► leaf ┐ compose
//!   its snapshot ──sparse_dd──► nbdproxy ──────────────────────► parent ◄────┘
//! ```
//!
//! The leaf is snapshotted while it is fresh. This dummy makes it a difference to xapi, and is destroyed at the end.

mod disk;

use std::path::Path;
use std::sync::Arc;

pub use disk::{Disk, Writer};

use super::cleanup;
use super::copy::{Copying, sparse_dd};
use super::leaf::new_dp;
use crate::db::Xapi;
use crate::host::{Host, ImportPath};
use crate::smapiv2::{Dp, Error, Result, Sr, Vdi, VdiInfo, Vm, nbd_server};

const DBG: &str = "OpaqueRef:smapiv1";

/// The domains at the destination, of the mirror and of the copy.
const MIRROR: &str = "MIR1b2c3d";
const COPY: &str = "CP1b2c3d";

/// How many writes of the guest the mirror is to carry before the copy begins, and after it.
const WRITES: u64 = 60;

/// Where a disk goes.
#[derive(Debug)]
pub struct Import<'a> {
    /// The host of the disk; no plugin of it is asked.
    pub source: &'a Arc<Host>,
    /// The destination host.
    pub destination: &'a Arc<Host>,
    /// The destination SR.
    pub sr: &'a Sr,
    /// A directory for the source's snapshot.
    pub place: &'a Path,
}

/// What the destination has made for a disk.
#[derive(Debug, Clone)]
pub struct Receiving {
    /// What the tapdisk writes to, and what stays.
    pub leaf: VdiInfo,
    /// The snapshot of the fresh leaf.
    pub dummy: Vdi,
    /// What the source's snapshot is copied into.
    pub parent: Vdi,
    dp: Dp,
}

impl Import<'_> {
    /// Migrates a disk under a guest that writes, which is suspended at the end; answers what was made of it.
    ///
    /// # Errors
    /// Whatever failed. xapi's own clean-up has run then; what that leaves is for [`Import::sweep`]. The guest goes on.
    pub async fn migrate(&self, disk: &Arc<Disk>, guest: &mut Option<Writer>) -> Result<Receiving> {
        let receiving = self.receive_start(disk).await.map_err(|error| Error::Preparation(error.to_string()))?;
        let migrated = async {
            self.mirror(disk, &receiving).await?;
            written(guest, WRITES).await?;
            self.copy(disk, &receiving.parent).await?;
            written(guest, WRITES).await?;
            if let Some(guest) = guest.take() {
                guest.stop().await.map_err(internal)?;
            }
            // What the hook before a deactivation asks the tapdisk.
            if let Some(why) = disk.mirror_failed().await {
                return Err(Error::Mirror(why));
            }
            disk.end_mirror().await;
            self.receive_finalize(&receiving).await
        }
        .await;
        if migrated.is_err() {
            disk.end_mirror().await;
            self.receive_cancel(&receiving).await;
        }
        migrated.map(|()| receiving)
    }

    /// `receive_start3`: leaf, dummy and parent, and the leaf active.
    async fn receive_start(&self, disk: &Disk) -> Result<Receiving> {
        let (host, sr) = (self.destination, self.sr);
        host.sr_scan(DBG, sr).await?;
        let size = i64::try_from(disk.size()).map_err(|error| Error::Internal(error.to_string()))?;
        let wanted = VdiInfo { ty: "user".to_owned(), ..VdiInfo::blank("disk", size) };
        let leaf = host.vdi_create(DBG, sr, &wanted).await?;
        let mut made = vec![leaf.vdi.clone()];
        let started = async {
            let dummy = host.vdi_snapshot(DBG, sr, &leaf).await?.vdi;
            made.push(dummy.clone());
            let dp = new_dp();
            host.vdi_attach3(DBG, &dp, sr, &leaf.vdi, &Vm::from(MIRROR), true).await?;
            host.vdi_activate3(DBG, &dp, sr, &leaf.vdi, &Vm::from(MIRROR)).await?;
            let parent = host.vdi_create(DBG, sr, &wanted).await?.vdi;
            Ok(Receiving { leaf: leaf.clone(), dummy, parent, dp })
        }
        .await;
        if started.is_err() {
            // The leaf is not detached first.
            for vdi in made.iter().rev() {
                self.destroy_logged(vdi).await;
            }
        }
        started
    }

    /// The tapdisk gets its connection, and uses it once the source has been snapshotted.
    async fn mirror(&self, disk: &Disk, receiving: &Receiving) -> Result<()> {
        let path = ImportPath {
            vm: Vm::from(MIRROR),
            sr: self.sr.clone(),
            vdi: receiving.leaf.vdi.clone(),
            dp: receiving.dp.clone(),
        };
        let connection = self.source.connect_import(self.destination, &path).await;
        disk.mirror_to(connection.map_err(|error| Error::Mirror(format!("passing descriptors: {error:#}")))?).await;
        disk.pause(Some(&self.snapshot())).await.map_err(internal)
    }

    fn snapshot(&self) -> std::path::PathBuf {
        self.place.join("snapshot.raw")
    }

    /// `copy_into_vdi`: the source's snapshot into the parent.
    async fn copy(&self, disk: &Disk, parent: &Vdi) -> Result<()> {
        let (host, sr, vm, dp) = (self.destination, self.sr, Vm::from(COPY), new_dp());
        let remote = self.find(parent).await?;
        if i64::try_from(disk.size()).is_ok_and(|size| size > remote.virtual_size) {
            return Err(Error::Internal("local VDI is larger than the remote VDI".to_owned()));
        }
        let copied = async {
            let attached = host.vdi_attach3(DBG, &dp, sr, parent, &vm, true).await?;
            let export = nbd_server(&attached).map(|uri| uri.export().to_owned());
            let export = export.ok_or_else(|| Error::Internal("no NBD server at the destination".to_owned()))?;
            host.vdi_activate3(DBG, &dp, sr, parent, &vm).await?;
            let path = ImportPath { vm: vm.clone(), sr: sr.clone(), vdi: parent.clone(), dp: dp.clone() };
            let copying = Copying {
                source: self.source,
                destination: self.destination,
                vm: &vm,
                vdi: Vdi::from("snapshot"),
                from: self.snapshot().display().to_string(),
                export: &export,
                path,
            };
            sparse_dd(copying, || false).await
        }
        .await;
        host.dp_destroy(DBG, &dp).await?;
        copied.map_err(|error| Error::Mirror(format!("copying: {error}")))?;
        host.vdi_set_content_id(DBG, sr, parent, &parent.0).await?;
        self.find(parent).await.map(drop)
    }

    /// `receive_finalize3`, of which the dummy's destruction may fail.
    async fn receive_finalize(&self, receiving: &Receiving) -> Result<()> {
        let Receiving { leaf, dummy, parent, dp } = receiving;
        let (host, sr) = (self.destination, self.sr);
        host.dp_destroy2(DBG, dp, sr, &leaf.vdi, &Vm::from(MIRROR)).await?;
        host.vdi_compose(DBG, sr, parent, &leaf.vdi).await?;
        self.destroy_logged(dummy).await;
        host.vdi_remove_from_sm_config(DBG, sr, &leaf.vdi, "base_mirror").await
    }

    /// `receive_cancel2`: every error is only logged.
    async fn receive_cancel(&self, receiving: &Receiving) {
        if let Err(error) = self.destination.dp_destroy(DBG, &receiving.dp).await {
            tracing::warn!(%error, "receive_cancel2: DP.destroy");
        }
        for vdi in [&receiving.dummy, &receiving.leaf.vdi, &receiving.parent] {
            self.destroy_logged(vdi).await;
        }
    }

    /// Destroys what is left at the destination, where nothing is to be, as a user does.
    ///
    /// # Errors
    /// A volume cannot be destroyed.
    pub async fn sweep(&self) -> Result<()> {
        for swept in cleanup::sweep(&Xapi::default(), self.destination, self.sr).await? {
            if let Some(error) = swept.error {
                return Err(Error::Internal(format!("{} stays: {error}", swept.vdi)));
            }
        }
        Ok(())
    }

    async fn destroy_logged(&self, vdi: &Vdi) {
        if let Err(error) = self.destination.vdi_destroy(DBG, self.sr, vdi).await {
            tracing::warn!(%error, %vdi, "VDI.destroy at the destination");
        }
    }

    async fn find(&self, vdi: &Vdi) -> Result<VdiInfo> {
        let found = self.destination.sr_scan(DBG, self.sr).await?.into_iter().find(|volume| volume.vdi == *vdi);
        found.ok_or_else(|| Error::VdiDoesNotExist(vdi.0.clone()))
    }
}

async fn written(guest: &Option<Writer>, more: u64) -> Result<()> {
    match guest {
        Some(guest) => guest.more(more).await.map_err(internal),
        None => Ok(()),
    }
}

fn internal(error: anyhow::Error) -> Error {
    Error::Internal(format!("{error:#}"))
}
