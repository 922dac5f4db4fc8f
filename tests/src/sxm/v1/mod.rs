//! Migration from an SMAPIv1 SR (ocaml/xapi/storage_smapiv1_migrate.ml): the source mirrors by its tapdisk, and the
//! destination puts together what came two ways.
//!
//! ```text
//!   source disk ──tapdisk──► HTTP connection ──descriptor──► import ──► leaf ┐ compose
//!   its snapshot ──sparse_dd──► nbdproxy ──────────────────────► parent ◄────┘
//! ```
//!
//! The leaf is snapshotted while it is fresh. This dummy makes it a difference to xapi, and is destroyed at the end.
//!
//! What xapi would not notice is not noticed here: the watchdog of a mirror looks every five seconds, and of the calls
//! that end it, after the guest was suspended, every failure is only logged. The guest is then started on the leaf, and
//! by that alone can a destination keep it from a disk that is not whole.

mod disk;
mod memory;

use std::path::Path;
use std::sync::{Arc, Mutex};

pub use disk::{Disk, Stretch, Writer};
pub use memory::Receiving;

use self::memory::Memory;
use super::cleanup;
use super::copy::{Copying, sparse_dd};
use super::leaf::new_dp;
use super::{Cancel, Event, Observer};
use crate::db::{Xapi, vbd_dp};
use crate::host::{Host, ImportPath, lock};
use crate::nbd::Uri;
use crate::smapiv2::{Dp, Error, Result, Sr, Vdi, VdiInfo, Vm, nbd_server};

const DBG: &str = "OpaqueRef:smapiv1";

/// The domains at the destination, of the mirror and of the copy.
const MIRROR: &str = "MIR1b2c3d";
const COPY: &str = "CP1b2c3d";

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
    /// How many writes of the guest the mirror is to carry before the copy begins, and after it.
    pub writes: u64,
    /// Asked to stop by others.
    pub cancel: Cancel,
    /// What xapi remembers of it, in files that outlive a restart of the toolstack.
    pub memory: Mutex<Memory>,
}

/// A disk that has moved, with its VM running on it.
#[derive(Debug)]
pub struct Migrated {
    /// The disk.
    pub vdi: Vdi,
    /// The VM's datapath.
    pub dp: Dp,
    /// Where its bytes are.
    pub uri: Uri,
}

/// Why a mirror could not be set up, as far as xapi makes a difference.
enum Refused {
    /// Nothing was promised to the source yet.
    Early(Error),
    /// `Migration_mirror_copy_failure`, or the user's cancellation.
    Copy(Error),
}

impl<'a> Import<'a> {
    /// A migration with nothing remembered.
    #[must_use]
    pub fn new(source: &'a Arc<Host>, destination: &'a Arc<Host>, sr: &'a Sr, place: &'a Path) -> Self {
        let (cancel, memory) = (Cancel::default(), Mutex::default());
        Self { source, destination, sr, place, writes: 60, cancel, memory }
    }

    /// Migrates a disk under a guest that writes, which is suspended at the end and started on what was made of it.
    ///
    /// # Errors
    /// Whatever failed. xapi's own clean-up has run then; what that leaves is for [`Import::sweep`]. A guest that was
    /// suspended is gone, and the disk whole.
    pub async fn migrate(
        &self,
        disk: &Arc<Disk>,
        guest: &mut Option<Writer>,
        observer: &dyn Observer,
    ) -> Result<Migrated> {
        self.cancel.check()?;
        lock(&self.memory).send = Some(memory::Sending::Preparing);
        let leaf = match self.start(disk, guest, observer).await {
            Ok(leaf) => leaf,
            Err(Refused::Early(error)) => {
                // The destination's volumes, if there are any, stay until the toolstack is restarted.
                lock(&self.memory).send = None;
                disk.end_mirror().await;
                return Err(error);
            }
            Err(Refused::Copy(error)) => {
                self.stop(disk).await;
                return Err(error);
            }
        };
        // Until the destination is scanned nothing would stop the mirror (ocaml/xapi/xapi_vm_migrate.ml,
        // with_remote_vdi); the source's own datapath goes.
        if let Err(error) = self.find(&leaf.vdi).await {
            disk.end_mirror().await;
            return Err(error);
        }
        let switched = async {
            self.cancel.check()?;
            observer.event(&Event::Phase("switch"));
            self.switch(disk, guest, &leaf.vdi).await
        }
        .await;
        if switched.is_err() {
            if lock(&self.memory).send.is_some() {
                self.stop(disk).await;
            }
            self.destroy_logged(&leaf.vdi).await;
        }
        switched
    }

    /// `Storage_migrate.start`: from the destination's volumes to a mirror with everything copied; answers the leaf.
    async fn start(
        &self,
        disk: &Disk,
        guest: &Option<Writer>,
        observer: &dyn Observer,
    ) -> std::result::Result<VdiInfo, Refused> {
        let prepared = self.receive_start(disk).await;
        let receiving = prepared.map_err(|error| Refused::Early(Error::Preparation(error.to_string())))?;
        lock(&self.memory).receive = Some(receiving.clone());
        self.pass_descriptor(disk, &receiving).await.map_err(Refused::Early)?;
        lock(&self.memory).send = Some(memory::Sending::Mirroring);
        let copied = async {
            disk.pause(Some(&self.snapshot())).await.map_err(internal)?;
            written(guest, self.writes).await?;
            let (source, destination) = (Vdi::from("snapshot"), receiving.parent.clone());
            observer.event(&Event::Started { source: source.clone(), destination });
            self.copy(disk, &receiving.parent).await?;
            observer.event(&Event::Complete { source });
            written(guest, self.writes).await
        };
        copied.await.map_err(Refused::Copy)?;
        Ok(receiving.leaf)
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

    /// `mirror_pass_fds`: the tapdisk gets its connection, and uses it once the source has been snapshotted.
    async fn pass_descriptor(&self, disk: &Disk, receiving: &Receiving) -> Result<()> {
        let path = ImportPath {
            vm: Vm::from(MIRROR),
            sr: self.sr.clone(),
            vdi: receiving.leaf.vdi.clone(),
            dp: receiving.dp.clone(),
        };
        let connection = self.source.connect_import(self.destination, &path).await;
        disk.mirror_to(connection.map_err(|error| Error::Mirror(format!("passing descriptors: {error:#}")))?).await;
        Ok(())
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
        lock(&self.memory).copy = Some((dp.clone(), parent.clone()));
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
            sparse_dd(copying, || self.cancel.check().is_err()).await
        }
        .await;
        host.dp_destroy(DBG, &dp).await?;
        lock(&self.memory).copy = None;
        copied.map_err(|error| match error {
            Error::Cancelled => error,
            error => Error::Mirror(format!("copying: {error}")),
        })?;
        host.vdi_set_content_id(DBG, sr, parent, &parent.0).await?;
        self.find(parent).await.map(drop)
    }

    /// `VM.migrate`: the VM is suspended, its disk deactivated, which ends the mirror, and the VM goes on at the
    /// destination.
    async fn switch(&self, disk: &Disk, guest: &mut Option<Writer>, vdi: &Vdi) -> Result<Migrated> {
        if let Some(guest) = guest.take() {
            guest.stop().await.map_err(internal)?;
        }
        disk.end_mirror().await;
        // The hook after the deactivation.
        if let Err(error) = self.receive_finalize().await {
            tracing::error!(%error, "receive_finalize3 failed");
        }
        lock(&self.memory).send = None;
        let (host, domid) = (self.destination, self.destination.new_domid());
        let (dp, vm) = (vbd_dp(domid, "xvda"), Vm(domid.to_string()));
        let plugged = async {
            let attached = host.vdi_attach3(DBG, &dp, self.sr, vdi, &vm, true).await?;
            host.vdi_activate3(DBG, &dp, self.sr, vdi, &vm).await?;
            nbd_server(&attached).ok_or_else(|| Error::Internal("no NBD server for the VM".to_owned()))
        }
        .await;
        match plugged {
            Ok(uri) => Ok(Migrated { vdi: vdi.clone(), dp, uri }),
            Err(error) => {
                if let Err(error) = host.dp_destroy(DBG, &dp).await {
                    tracing::warn!(%error, "clean-up of the destination's disk failed");
                }
                Err(error)
            }
        }
    }

    async fn find(&self, vdi: &Vdi) -> Result<VdiInfo> {
        let found = self.destination.sr_scan(DBG, self.sr).await?.into_iter().find(|volume| volume.vdi == *vdi);
        found.ok_or_else(|| Error::VdiDoesNotExist(vdi.0.clone()))
    }

    async fn destroy_logged(&self, vdi: &Vdi) {
        if let Err(error) = self.destination.vdi_destroy(DBG, self.sr, vdi).await {
            tracing::warn!(%error, %vdi, "VDI.destroy at the destination");
        }
    }

    /// Destroys what is left at the destination, but for one disk, as a user does.
    ///
    /// # Errors
    /// A volume cannot be destroyed.
    pub async fn sweep(&self, but: Option<&Vdi>) -> Result<()> {
        let xapi = Xapi::default();
        if let Some(vdi) = but {
            let found = self.find(vdi).await?;
            xapi.db().add_vdi(self.sr, found, None);
        }
        for swept in cleanup::sweep(&xapi, self.destination, self.sr).await? {
            if let Some(error) = swept.error {
                return Err(Error::Internal(format!("{} stays: {error}", swept.vdi)));
            }
        }
        Ok(())
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
