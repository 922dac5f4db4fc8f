//! A VM of the database as a plan's machine.

use anyhow::{Context, Result, bail};

use crate::db::{ActiveDisk, VmRef, Xapi};
use crate::nbd::Uri;
use crate::plan::Machine;

/// A VM that runs when its disks are written, and in between too unless it is to be halted.
#[derive(Debug)]
pub struct OnXapi<'a> {
    xapi: &'a Xapi,
    vm: VmRef,
    halted: bool,
    disks: Vec<ActiveDisk>,
}

impl<'a> OnXapi<'a> {
    /// A VM that does not run now. If `halted`, snapshots and resizes find it halted.
    pub fn new(xapi: &'a Xapi, vm: VmRef, halted: bool) -> Self {
        Self { xapi, vm, halted, disks: Vec::new() }
    }

    /// Starts the VM if it does not run; its disks.
    ///
    /// # Errors
    /// As the plugins say.
    pub async fn running(&mut self) -> Result<Vec<ActiveDisk>> {
        if self.disks.is_empty() {
            self.disks = self.xapi.vm_start(self.vm).await.context("VM.start")?;
        }
        Ok(self.disks.clone())
    }

    /// Shuts the VM down if it runs.
    ///
    /// # Errors
    /// As the plugins say.
    pub async fn halt(&mut self) -> Result<()> {
        self.disks.clear();
        self.xapi.vm_shutdown(self.vm).await.context("VM.shutdown")
    }

    fn named(&self, name: &str) -> Result<VmRef> {
        self.xapi.db().snapshot_named(self.vm, name).with_context(|| format!("the VM has no snapshot {name:?}"))
    }
}

impl Machine for OnXapi<'_> {
    async fn export(&mut self, disk: usize) -> Result<Uri> {
        let disks = self.running().await?;
        let Some(found) = disks.into_iter().find(|active| active.index == disk) else {
            bail!("the VM has no disk {disk}")
        };
        Ok(found.uri)
    }

    async fn snapshot(&mut self, name: &str) -> Result<()> {
        if self.halted {
            self.halt().await?;
        }
        self.xapi.vm_snapshot(self.vm, name).await.context("VM.snapshot")?;
        Ok(())
    }

    async fn revert(&mut self, name: &str) -> Result<()> {
        let snapshot = self.named(name)?;
        self.disks.clear();
        self.xapi.vm_revert(snapshot).await.context("VM.revert")
    }

    async fn destroy(&mut self, name: &str) -> Result<()> {
        let snapshot = self.named(name)?;
        self.xapi.vm_destroy(snapshot).await.context("VM.destroy")
    }

    async fn resize(&mut self, disk: usize, size: u64) -> Result<()> {
        if self.halted {
            self.halt().await?;
        }
        self.xapi.vdi_resize(self.vm, disk, size).await
    }
}
