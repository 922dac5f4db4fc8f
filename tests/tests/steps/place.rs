//! A directory in memory whose mounts, processes and files go with it, however the process ends that made it.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// Waits until nobody holds its input any more, and then takes everything down. First those who use what is mounted, then
/// what is mounted, then the storage daemon that serves it.
const GUARD: &str = r#"
read -r _
end() {
    while ours=$(printf '%s' "$1" | grep -lFsf - /proc/[0-9]*/cmdline); [ -n "$ours" ]; do
        for process in $ours; do
            process=${process%/cmdline}
            kill -9 "${process#/proc/}"
        done
    done
}
end "$PLACE/h"
end "$PLACE/mounted"
umount "$PLACE/mounted" || umount -l "$PLACE/mounted"
end "$PLACE/device"
umount -l "$PLACE/device"
rm -rf "$PLACE"
"#;

/// How long who was killed may take to be gone.
const PATIENCE: Duration = Duration::from_secs(30);

/// A directory; nothing of it is left when this is dropped or the process is killed.
pub struct Place {
    path: PathBuf,
    guard: Child,
}

impl Place {
    /// Makes one. What is mounted in it belongs on [`Self::mounted`], and a file that is exported as a device is
    /// [`Self::device`].
    pub fn new() -> Result<Self> {
        let path = tempfile::Builder::new().prefix("pw-").tempdir_in(memory())?.keep();
        // In a group of its own, so that no signal for the tests meets it.
        let guard = Command::new("sh")
            .args(["-c", GUARD])
            .env("PLACE", &path)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let place = Self { path, guard };
        fs::create_dir(place.mounted())?;
        Ok(place)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where a file system is mounted.
    pub fn mounted(&self) -> PathBuf {
        self.path.join("mounted")
    }

    /// A file that a storage daemon exports.
    pub fn device(&self) -> PathBuf {
        self.path.join("device")
    }

    /// Mounts what is in a file. Nothing is guessed from the order of calls: what was not synced may be lost.
    pub fn mount(&self, image: &Path) -> Result<()> {
        run(Command::new("mount").args(["-t", "ext4", "-o", "loop,noauto_da_alloc"]).arg(image).arg(self.mounted()))
    }

    /// Unmounts it, once those have gone that were killed.
    pub fn unmount(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let result = run(Command::new("umount").arg(self.mounted()));
            match result {
                Err(error) if error.to_string().contains("busy") && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                result => return result,
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

/// Gives a directory in memory, where there is one.
pub fn memory() -> &'static Path {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory } else { Path::new("/tmp") }
}

/// Runs a program that is to succeed.
pub fn run(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
