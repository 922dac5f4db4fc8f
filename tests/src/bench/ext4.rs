//! A fresh ext4 file system in a file, mounted for as long as it is needed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

/// A mounted file system; unmounted when dropped.
pub(super) struct Ext4 {
    directory: PathBuf,
    /// Goes after the file system that is mounted in it.
    _place: TempDir,
}

impl Ext4 {
    /// Makes a file of so many bytes in a new directory below `place`, and mounts what is made in it beside it.
    ///
    /// # Errors
    /// Whatever is missing: rights, loop devices, e2fsprogs.
    pub(super) fn mount(place: &Path, bytes: u64) -> Result<Self> {
        let place = tempfile::Builder::new().prefix("fx-ext4-").tempdir_in(place)?;
        let (image, directory) = (place.path().join("ext4.img"), place.path().join("ext4"));
        File::create(&image)?.set_len(bytes)?;
        std::fs::create_dir(&directory)?;
        run(Command::new(program("mkfs.ext4")).args(["-q", "-F"]).arg(&image))?;
        // Through the loop device's own page cache everything would be written twice.
        run(Command::new(program("mount")).args(["-o", "loop"]).args([&image, &directory]))?;
        let mounted = Self { directory, _place: place };
        mounted.skip_loop_cache(&image);
        Ok(mounted)
    }

    /// Where it is.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Has the loop device go around the page cache of the file below, where that file system can.
    fn skip_loop_cache(&self, image: &Path) {
        let devices = Command::new(program("losetup")).args(["-n", "-O", "NAME", "-j"]).arg(image).output();
        for device in devices.iter().flat_map(|output| std::str::from_utf8(&output.stdout)).flat_map(str::lines) {
            let direct = Command::new(program("losetup")).args(["--direct-io=on", device.trim()]).output();
            if !direct.is_ok_and(|output| output.status.success()) {
                tracing::debug!(device, "the loop device stays buffered");
            }
        }
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        let unmount = |options: &[&str]| run(Command::new(program("umount")).args(options).arg(&self.directory));
        // A measurement that ended early may have left daemons that have files open there; they end with the stage, and
        // the file system with the last of them.
        if let Err(error) = unmount(&[]).or_else(|_| unmount(&["-l"])) {
            tracing::warn!(error = format!("{error:#}"), "a measurement's file system stays mounted");
        }
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}", stderr.trim());
    Ok(())
}

/// A program of root's, which a user's search path may not have.
fn program(name: &str) -> PathBuf {
    let places = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
    let found = places.iter().map(|place| Path::new(place).join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| name.into())
}
