//! A small file system of a test's own.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

/// A tmpfs that is unmounted when this is dropped.
pub struct Mounted(PathBuf);

impl Mounted {
    /// Mounts one of so many bytes.
    pub fn tmpfs(at: &Path, size: &str) -> Result<Self> {
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "errors"]).arg(at))?;
        Ok(Self(at.to_owned()))
    }

    /// Makes it read-only.
    pub fn make_read_only(&self) -> Result<()> {
        run(Command::new("mount").args(["-o", "remount,ro"]).arg(&self.0))
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    ensure!(output.status.success(), "mount: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
