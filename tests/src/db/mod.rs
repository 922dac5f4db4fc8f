//! A small xapi database: VMs, their snapshots as VMs with parent and children, VBDs and VDIs.
//!
//! [`Xapi`] holds it and carries out VM operations on the hosts; storage migration commits to it only at its end.

mod vm;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use uuid::Uuid;

pub use vm::ActiveDisk;
pub(crate) use vm::{plug as vm_plug, vbd_dp};

use crate::host::{Host, lock};
use crate::smapiv2::{Sr, Vdi, VdiInfo};

/// A VM, or the snapshot of one. They are numbered in the order of their making.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmRef(u32);

/// A VM.
#[derive(Debug, Clone)]
pub struct VmRecord {
    /// Its uuid.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// The VM that this is a snapshot of.
    pub snapshot_of: Option<VmRef>,
    /// The snapshot that its disks are based on.
    pub parent: Option<VmRef>,
    /// Its disks.
    pub vbds: Vec<Vbd>,
    /// The host that has its SR attached, and on which it runs if it does.
    pub host: Arc<Host>,
    /// Its domain, if it runs.
    pub domid: Option<u32>,
}

/// A disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vbd {
    /// The device, like `xvda`.
    pub device: String,
    /// The volume.
    pub vdi: Vdi,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VdiRecord {
    /// Its SR.
    pub sr: Sr,
    /// What its plugin said of it last.
    pub info: VdiInfo,
    /// The disk that this is a snapshot of. A scan does not change it: after a revert by clone the backend's key
    /// names a volume that is gone.
    pub snapshot_of: Option<Vdi>,
}

/// The tables.
#[derive(Debug, Default)]
pub struct Db {
    next: u32,
    vms: BTreeMap<VmRef, VmRecord>,
    vdis: BTreeMap<Vdi, VdiRecord>,
}

impl Db {
    /// A VM.
    #[must_use]
    pub fn vm(&self, vm: VmRef) -> Option<&VmRecord> {
        self.vms.get(&vm)
    }

    /// A VM, to be changed.
    pub fn vm_mut(&mut self, vm: VmRef) -> Option<&mut VmRecord> {
        self.vms.get_mut(&vm)
    }

    /// A volume.
    #[must_use]
    pub fn vdi(&self, vdi: &Vdi) -> Option<&VdiRecord> {
        self.vdis.get(vdi)
    }

    /// Every volume that is recorded in an SR.
    pub fn vdis_of(&self, sr: &Sr) -> impl Iterator<Item = &VdiRecord> {
        self.vdis.values().filter(move |v| v.sr == *sr)
    }

    /// Adds a VM.
    pub fn add_vm(&mut self, vm: VmRecord) -> VmRef {
        let reference = VmRef(self.next);
        self.next += 1;
        self.vms.insert(reference, vm);
        reference
    }

    /// Adds a volume, or replaces what was known of it.
    pub fn add_vdi(&mut self, sr: &Sr, info: VdiInfo, snapshot_of: Option<Vdi>) {
        self.vdis.insert(info.vdi.clone(), VdiRecord { sr: sr.clone(), info, snapshot_of });
    }

    /// Forgets a volume.
    pub fn remove_vdi(&mut self, vdi: &Vdi) {
        self.vdis.remove(vdi);
    }

    /// Forgets a VM; its children become its parent's.
    pub fn remove_vm(&mut self, vm: VmRef) {
        let Some(gone) = self.vms.remove(&vm) else { return };
        for other in self.vms.values_mut().filter(|other| other.parent == Some(vm)) {
            other.parent = gone.parent;
        }
    }

    /// Makes every snapshot of one disk a snapshot of another.
    pub fn move_snapshots(&mut self, from: &Vdi, to: &Vdi) {
        for vdi in self.vdis.values_mut().filter(|v| v.snapshot_of.as_ref() == Some(from)) {
            vdi.snapshot_of = Some(to.clone());
        }
    }

    /// All snapshots of a VM, oldest first.
    pub fn snapshots_of(&self, vm: VmRef) -> impl Iterator<Item = (VmRef, &VmRecord)> {
        self.vms.iter().filter(move |(_, r)| r.snapshot_of == Some(vm)).map(|(k, r)| (*k, r))
    }

    /// The snapshots whose parent this is, oldest first.
    pub fn children_of(&self, parent: VmRef) -> impl Iterator<Item = (VmRef, &VmRecord)> {
        self.vms
            .iter()
            .filter(move |(_, r)| r.parent == Some(parent) && r.snapshot_of.is_some())
            .map(|(k, r)| (*k, r))
    }

    /// The volume by which a snapshot of a VM holds a disk, found by the disk and not by the device.
    #[must_use]
    pub fn snapshot_of_disk(&self, snapshot: VmRef, disk: &Vdi) -> Option<&VdiRecord> {
        let record = self.vm(snapshot)?;
        record.vbds.iter().filter_map(|b| self.vdi(&b.vdi)).find(|v| v.snapshot_of.as_ref() == Some(disk))
    }

    /// The nearest snapshot up the line of a VM, or of a snapshot of it, that holds a disk.
    #[must_use]
    pub fn lineage_parent(&self, vm: VmRef, disk: &Vdi) -> Option<&VdiRecord> {
        let mut at = self.vm(vm)?.parent;
        while let Some(snapshot) = at {
            if let Some(found) = self.snapshot_of_disk(snapshot, disk) {
                return Some(found);
            }
            at = self.vm(snapshot)?.parent;
        }
        None
    }

    /// Finds a snapshot of a VM by name.
    #[must_use]
    pub fn snapshot_named(&self, vm: VmRef, name: &str) -> Option<VmRef> {
        self.snapshots_of(vm).find(|(_, r)| r.name == name).map(|(k, _)| k)
    }
}

/// The database and the operations on VMs.
#[derive(Debug, Default)]
pub struct Xapi {
    db: Mutex<Db>,
}

impl Xapi {
    /// The database, locked; not to be held while something is awaited.
    pub fn db(&self) -> MutexGuard<'_, Db> {
        lock(&self.db)
    }

    /// A copy of a VM's record.
    ///
    /// # Errors
    /// There is no such VM.
    pub fn vm(&self, vm: VmRef) -> anyhow::Result<VmRecord> {
        self.db().vm(vm).cloned().ok_or_else(|| anyhow::anyhow!("there is no VM {vm:?}"))
    }

    /// A copy of a volume's record.
    ///
    /// # Errors
    /// There is no such volume.
    pub fn vdi(&self, vdi: &Vdi) -> anyhow::Result<VdiRecord> {
        self.db().vdi(vdi).cloned().ok_or_else(|| anyhow::anyhow!("there is no VDI {vdi}"))
    }
}
