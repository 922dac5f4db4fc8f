//! A file system that is soon full.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

/// A small file system in a file, mounted until it is dropped.
pub struct Small {
    directory: TempDir,
}

impl Small {
    /// Tells whether this process can mount one, and says so where not.
    pub fn can_be_mounted() -> bool {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can mount a small file system");
            return false;
        }
        let mounted = Self::mount();
        if let Err(error) = &mounted {
            println!("skipped: a small file system cannot be mounted here: {error:#}");
        }
        mounted.is_ok()
    }

    /// Makes and mounts it.
    pub fn mount() -> Result<Self> {
        let small = Self { directory: tempfile::Builder::new().prefix("fx-small-").tempdir_in("/tmp")? };
        let image = small.directory.path().join("image");
        std::fs::File::create(&image)?.set_len(24 << 20)?;
        // Without a journal and reserved blocks, what df calls free can be written.
        let arguments = ["-q", "-F", "-m", "0", "-b", "1024", "-O", "^has_journal"];
        run(Command::new("mkfs.ext4").args(arguments).arg(&image))?;
        std::fs::create_dir(small.path())?;
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(small.path()))?;
        Ok(small)
    }

    pub fn path(&self) -> PathBuf {
        self.directory.path().join("mounted")
    }

    /// Takes all space but so much.
    pub fn leave(&self, bytes: u64) -> Result<()> {
        let free = rustix::fs::statvfs(self.path())?;
        let length = (free.f_bavail * free.f_frsize).saturating_sub(bytes);
        let file = std::fs::File::create(self.ballast())?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, length)?;
        Ok(())
    }

    pub fn make_room(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.ballast())?)
    }

    fn ballast(&self) -> PathBuf {
        self.path().join("ballast")
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let path = self.path();
        let unmounted = run(Command::new("umount").arg(&path));
        // What a failed test left running keeps it busy for a moment.
        if let Err(error) = unmounted.or_else(|_| run(Command::new("umount").arg("-l").arg(&path))) {
            eprintln!("{error:#}");
        }
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
