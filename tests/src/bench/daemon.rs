//! A storage daemon of its own: what cluster sizes are measured in without the plugin.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use super::calls::tool;
use super::qmp::Qmp;
use crate::nbd::Uri;

/// A daemon without anything open, killed when dropped.
pub(super) struct Daemon {
    /// Its monitor.
    pub(super) qmp: Qmp,
    directory: TempDir,
    child: Child,
}

impl Daemon {
    /// Starts it, with an NBD server.
    pub(super) async fn start() -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("fx-").tempdir_in("/tmp")?;
        let at = |name: &str| directory.path().join(name);
        let mut child = Command::new(tool("qemu-storage-daemon")?)
            .arg("--chardev")
            .arg(format!("socket,id=qmp,server=on,wait=off,path={}", at("qmp.sock").display()))
            .args(["--monitor", "chardev=qmp"])
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={}", at("nbd.sock").display()))
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start qemu-storage-daemon")?;
        let qmp = loop {
            if let Ok(qmp) = Qmp::connect(&at("qmp.sock")).await {
                break qmp;
            }
            ensure!(child.try_wait()?.is_none(), "qemu-storage-daemon has ended");
            tokio::time::sleep(Duration::from_millis(2)).await;
        };
        Ok(Self { qmp, directory, child })
    }

    /// Opens an image, on another that is open or on nothing, under a name; as the plugin opens it.
    pub(super) async fn open(&mut self, name: &str, image: &Path, backing: Option<&str>, write: bool) -> Result<()> {
        let file = json!({
            "driver": "file", "node-name": format!("{name}-file"), "filename": image, "read-only": !write,
            "auto-read-only": false, "discard": "unmap", "cache": {"direct": true}, "aio": "io_uring",
        });
        self.qmp.execute("blockdev-add", file).await?;
        let format = json!({
            "driver": "qcow2", "node-name": name, "file": format!("{name}-file"), "read-only": !write,
            "auto-read-only": false, "discard": "unmap", "backing": backing.map_or(Value::Null, Into::into),
            "detect-zeroes": if write { "unmap" } else { "off" },
        });
        self.qmp.execute("blockdev-add", format).await.map(drop)
    }

    /// Exports what was opened under a name.
    pub(super) async fn export(&mut self, name: &str, write: bool) -> Result<Uri> {
        let export = json!({"type": "nbd", "id": name, "name": name, "node-name": name, "writable": write});
        self.qmp.execute("block-export-add", export).await?;
        Ok(Uri::new(self.socket(), name))
    }

    /// Closes everything in order, so that all is in the images.
    pub(super) async fn quit(mut self) -> Result<()> {
        self.qmp.execute("quit", json!({})).await?;
        self.child.wait().await?;
        Ok(())
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("nbd.sock")
    }
}
