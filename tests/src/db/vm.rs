//! What is done with VMs outside of a migration.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use uuid::Uuid;

use super::{Vbd, VmRecord, VmRef, Xapi};
use crate::host::Host;
use crate::nbd::Uri;
use crate::smapiv2::{Dp, Error, Sr, Vdi, VdiInfo, Vm, nbd_server};

const DBG: &str = "OpaqueRef:vm";

/// A disk that a domain can use now.
#[derive(Debug, Clone)]
pub struct ActiveDisk {
    /// Its place among the VM's disks.
    pub index: usize,
    /// The volume.
    pub vdi: Vdi,
    /// Where a guest reads and writes it.
    pub uri: Uri,
}

/// The datapath of a running domain's disk.
pub(crate) fn vbd_dp(domid: u32, device: &str) -> Dp {
    Dp(format!("vbd/{domid}/{device}"))
}

impl Xapi {
    /// Makes a halted VM with blank disks.
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vm_create(&self, name: &str, host: &Arc<Host>, sr: &Sr, sizes: &[u64]) -> Result<VmRef> {
        let mut vbds = Vec::new();
        for (index, size) in sizes.iter().enumerate() {
            let info = VdiInfo::blank(&format!("{name} disk {index}"), i64::try_from(*size)?);
            let info = host.vdi_create(DBG, sr, &info).await.context("VDI.create")?;
            let letter = char::from(b'a' + u8::try_from(index)?);
            vbds.push(Vbd { device: format!("xvd{letter}"), vdi: info.vdi.clone() });
            self.db().add_vdi(sr, info, None);
        }
        let vm = VmRecord {
            uuid: Uuid::new_v4(),
            name: name.to_owned(),
            snapshot_of: None,
            parent: None,
            vbds,
            host: Arc::clone(host),
            domid: None,
        };
        Ok(self.db().add_vm(vm))
    }

    /// Starts a halted VM on the host that has its disks.
    ///
    /// # Errors
    /// As the plugins say; what was attached is detached again.
    pub async fn vm_start(&self, vm: VmRef) -> Result<Vec<ActiveDisk>> {
        let record = self.vm(vm)?;
        if record.domid.is_some() {
            bail!("{} runs already", record.name);
        }
        for vbd in &record.vbds {
            let sr = self.vdi(&vbd.vdi)?.sr;
            record.host.vdi_epoch_begin(DBG, &sr, &vbd.vdi, true).await.context("VDI.epoch_begin")?;
        }
        let domid = record.host.new_domid();
        let disks = match self.plug_all(&record, domid, &record.host).await {
            Ok(disks) => disks,
            Err(error) => {
                for vbd in &record.vbds {
                    let _ = record.host.dp_destroy(DBG, &vbd_dp(domid, &vbd.device)).await;
                }
                return Err(error);
            }
        };
        if let Some(record) = self.db().vm_mut(vm) {
            record.domid = Some(domid);
        }
        Ok(disks)
    }

    async fn plug_all(&self, record: &VmRecord, domid: u32, host: &Host) -> Result<Vec<ActiveDisk>> {
        let mut disks = Vec::new();
        for (index, vbd) in record.vbds.iter().enumerate() {
            let sr = self.vdi(&vbd.vdi)?.sr;
            let uri = plug(host, domid, &vbd.device, &sr, &vbd.vdi).await?;
            disks.push(ActiveDisk { index, vdi: vbd.vdi.clone(), uri });
        }
        Ok(disks)
    }

    /// Stops a VM: its disks are deactivated and detached. A halted VM is left alone.
    ///
    /// # Errors
    /// As the plugins say; the VM then still counts as running.
    pub async fn vm_shutdown(&self, vm: VmRef) -> Result<()> {
        let record = self.vm(vm)?;
        let Some(domid) = record.domid else { return Ok(()) };
        for vbd in &record.vbds {
            record.host.dp_destroy(DBG, &vbd_dp(domid, &vbd.device)).await.context("DP.destroy")?;
        }
        for vbd in &record.vbds {
            let sr = self.vdi(&vbd.vdi)?.sr;
            record.host.vdi_epoch_end(DBG, &sr, &vbd.vdi).await.context("VDI.epoch_end")?;
        }
        if let Some(record) = self.db().vm_mut(vm) {
            record.domid = None;
        }
        Ok(())
    }

    /// Takes a snapshot of a VM, running or not.
    ///
    /// # Errors
    /// As the plugin says; snapshots of earlier disks are destroyed again.
    pub async fn vm_snapshot(&self, vm: VmRef, name: &str) -> Result<VmRef> {
        let record = self.vm(vm)?;
        let mut taken: Vec<(Vbd, Sr, VdiInfo, Vdi)> = Vec::new();
        for vbd in &record.vbds {
            let disk = self.vdi(&vbd.vdi)?;
            match record.host.vdi_snapshot(DBG, &disk.sr, &disk.info).await {
                Ok(info) => {
                    let snapshot = Vbd { device: vbd.device.clone(), vdi: info.vdi.clone() };
                    taken.push((snapshot, disk.sr, info, vbd.vdi.clone()));
                }
                Err(error) => {
                    for (_, sr, info, _) in &taken {
                        let _ = record.host.vdi_destroy(DBG, sr, &info.vdi).await;
                    }
                    return Err(error).context("VDI.snapshot");
                }
            }
        }
        let mut db = self.db();
        let mut vbds = Vec::new();
        for (vbd, sr, info, of) in taken {
            // What SR.scan would find: the five keys that were set after the answer.
            let source = db.vdi(&of).map(|d| (d.info.ty.clone(), d.info.content_id.clone()));
            let (ty, content_id) = source.unwrap_or_default();
            db.add_vdi(&sr, VdiInfo { ty, content_id, ..info }, Some(of));
            vbds.push(vbd);
        }
        let snapshot = db.add_vm(VmRecord {
            uuid: Uuid::new_v4(),
            name: name.to_owned(),
            snapshot_of: Some(vm),
            parent: record.parent,
            vbds,
            host: Arc::clone(&record.host),
            domid: None,
        });
        if let Some(record) = db.vm_mut(vm) {
            record.parent = Some(snapshot);
        }
        Ok(snapshot)
    }

    /// Reverts a VM to one of its snapshots; a running VM is shut down first and stays so.
    ///
    /// `VDI.revert` where the plugin has it. Else, as ocaml/xapi/xapi_vm_snapshot.ml does: the disks are destroyed, the
    /// snapshot's are cloned, and in the database all snapshots of the old disk become the new one's.
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vm_revert(&self, snapshot: VmRef) -> Result<()> {
        let record = self.vm(snapshot)?;
        let vm = record.snapshot_of.context("not a snapshot")?;
        self.vm_shutdown(vm).await?;
        let current = self.vm(vm)?;
        let host = &current.host;
        let mut to_clone = Vec::new();
        for vbd in &record.vbds {
            let kept = self.vdi(&vbd.vdi)?;
            let disk = kept.snapshot_of.clone().context("a snapshot of nothing")?;
            if host.sr_has(&kept.sr, "VDI_REVERT") {
                let info = VdiInfo { snapshot_of: disk.clone(), ..kept.info.clone() };
                host.vdi_revert(DBG, &kept.sr, &info).await.context("VDI.revert")?;
                let now = host.vdi_stat(DBG, &kept.sr, &disk).await.context("VDI.stat")?;
                self.db().add_vdi(&kept.sr, now, None);
            } else {
                to_clone.push((vbd.device.clone(), kept, disk));
            }
        }
        for (_, kept, disk) in &to_clone {
            // xapi only logs that a disk could not be destroyed.
            if let Err(error) = host.vdi_destroy(DBG, &kept.sr, disk).await {
                tracing::warn!(%error, %disk, "the reverted disk stays behind");
            } else {
                self.db().remove_vdi(disk);
            }
        }
        for (device, kept, disk) in to_clone {
            let clone = host.vdi_clone(DBG, &kept.sr, &kept.info).await.context("VDI.clone")?;
            let mut db = self.db();
            db.move_snapshots(&disk, &clone.vdi);
            if let Some(record) = db.vm_mut(vm) {
                for vbd in record.vbds.iter_mut().filter(|b| b.device == device) {
                    vbd.vdi = clone.vdi.clone();
                }
            }
            db.add_vdi(&kept.sr, clone, None);
        }
        if let Some(record) = self.db().vm_mut(vm) {
            record.parent = Some(snapshot);
        }
        Ok(())
    }

    /// Resizes one disk of a VM.
    ///
    /// # Errors
    /// As the plugin says, or if the disk did not become at least as large.
    pub async fn vdi_resize(&self, vm: VmRef, index: usize, size: u64) -> Result<()> {
        let record = self.vm(vm)?;
        let vbd = record.vbds.get(index).with_context(|| format!("no disk {index}"))?;
        let disk = self.vdi(&vbd.vdi)?;
        let size = i64::try_from(size)?;
        let found = record.host.vdi_resize(DBG, &disk.sr, &vbd.vdi, size).await.context("VDI.resize")?;
        if found < size {
            bail!("the disk has {found} bytes after a resize to {size}");
        }
        self.db().add_vdi(&disk.sr, VdiInfo { virtual_size: found, ..disk.info }, disk.snapshot_of);
        Ok(())
    }

    /// Destroys a VM, its snapshots and all their disks; it is shut down first.
    ///
    /// # Errors
    /// As the plugin says.
    pub async fn vm_destroy(&self, vm: VmRef) -> Result<()> {
        self.vm_shutdown(vm).await?;
        let mut all: Vec<VmRef> = self.db().snapshots_of(vm).map(|(snapshot, _)| snapshot).collect();
        all.insert(0, vm);
        for vm in all {
            let record = self.vm(vm)?;
            for vbd in &record.vbds {
                let sr = self.vdi(&vbd.vdi)?.sr;
                record.host.vdi_destroy(DBG, &sr, &vbd.vdi).await.context("VDI.destroy")?;
                self.db().remove_vdi(&vbd.vdi);
            }
            self.db().remove_vm(vm);
        }
        Ok(())
    }
}

/// Attaches and activates a disk for a domain.
pub(crate) async fn plug(host: &Host, domid: u32, device: &str, sr: &Sr, vdi: &Vdi) -> Result<Uri> {
    let (dp, domain) = (vbd_dp(domid, device), Vm(domid.to_string()));
    let attached = host.vdi_attach3(DBG, &dp, sr, vdi, &domain, true).await.context("VDI.attach3")?;
    if !attached.has_xen_disk() {
        return Err(Error::Internal("no XenDisk in the answer of attach".to_owned()).into());
    }
    host.vdi_activate3(DBG, &dp, sr, vdi, &domain).await.context("VDI.activate3")?;
    nbd_server(&attached).context("no NBD server that xapi can parse in the answer of attach")
}
