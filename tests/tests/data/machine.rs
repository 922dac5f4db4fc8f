//! A VM without xapi: its disks are chains of qcow2 files, switched while no daemon has them open.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use fake_xapi::nbd::Uri;
use fake_xapi::plan::Machine;
use tempfile::TempDir;

use crate::daemon::{Daemon, create};

pub struct Chains {
    directory: TempDir,
    /// The image that each disk writes to.
    leaves: Vec<PathBuf>,
    snapshots: BTreeMap<String, Vec<PathBuf>>,
    daemons: BTreeMap<usize, Daemon>,
    images: usize,
}

impl Chains {
    pub fn new(sizes: &[u64]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut chains =
            Self { directory, leaves: Vec::new(), snapshots: BTreeMap::new(), daemons: BTreeMap::new(), images: 0 };
        for size in sizes {
            let image = chains.next_image();
            create(&image, *size, None);
            chains.leaves.push(image);
        }
        chains
    }

    pub fn leaf(&self, disk: usize) -> &Path {
        &self.leaves[disk]
    }

    pub fn snapshot_image(&self, name: &str, disk: usize) -> &Path {
        &self.snapshots[name][disk]
    }

    /// Ends all daemons in order, so that what they hold is in their images.
    pub fn close(&mut self) {
        for daemon in std::mem::take(&mut self.daemons).into_values() {
            daemon.quit();
        }
    }

    fn next_image(&mut self) -> PathBuf {
        self.images += 1;
        self.directory.path().join(format!("{}.qcow2", self.images))
    }

    fn overlay(&mut self, base: &Path) -> PathBuf {
        let image = self.next_image();
        let status = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .args([base, &image])
            .status()
            .unwrap();
        assert!(status.success());
        image
    }
}

impl Machine for Chains {
    async fn export(&mut self, disk: usize) -> Result<Uri> {
        if !self.daemons.contains_key(&disk) {
            let daemon = Daemon::over(&self.leaves[disk]);
            daemon.client().await.disconnect().await;
            self.daemons.insert(disk, daemon);
        }
        Ok(self.daemons[&disk].uri())
    }

    async fn snapshot(&mut self, name: &str) -> Result<()> {
        self.close();
        let frozen = self.leaves.clone();
        self.leaves = frozen.iter().map(|leaf| self.overlay(leaf)).collect();
        self.snapshots.insert(name.to_owned(), frozen);
        Ok(())
    }

    async fn revert(&mut self, name: &str) -> Result<()> {
        self.close();
        let frozen = self.snapshots.get(name).context("no such snapshot")?.clone();
        self.leaves = frozen.iter().map(|leaf| self.overlay(leaf)).collect();
        Ok(())
    }

    async fn destroy(&mut self, name: &str) -> Result<()> {
        // Others may lie on its images.
        self.snapshots.remove(name).map(drop).context("no such snapshot")
    }

    async fn resize(&mut self, disk: usize, size: u64) -> Result<()> {
        if let Some(daemon) = self.daemons.remove(&disk) {
            daemon.quit();
        }
        let status = Command::new("qemu-img")
            .args(["resize", "-q", "-f", "qcow2"])
            .arg(&self.leaves[disk])
            .arg(size.to_string())
            .status()?;
        ensure!(status.success(), "qemu-img resize ended with {status}");
        Ok(())
    }
}
