//! An ext4 file system on a device that a storage daemon serves, so that what it does to the disk can be seen and broken.
//!
//! ```text
//!   ext4 ── loop device ── file <place>/device ── FUSE ── qemu-storage-daemon ── <place>/image
//! ```

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::place::{Place, run};

/// How large the device is, in bytes.
const SIZE: u64 = 64 << 20;

/// Makes an empty file system in a place, as the file `image`.
pub fn make(place: &Place) -> Result<()> {
    let path = image(place);
    File::create(&path)?.set_len(SIZE)?;
    run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0", "-b", "4096", "-J", "size=4"]).arg(&path))
}

/// Gives the file that a place's device shows.
pub fn image(place: &Place) -> PathBuf {
    place.path().join("image")
}

/// A mounted device.
pub struct Device {
    /// Goes first, and takes the daemon with it.
    place: Place,
    daemon: Reaped,
}

impl Device {
    /// Mounts a place's image. The daemon has the node `image`; `arguments` say what is above it, with `top` at last.
    pub fn mount(place: Place, arguments: &[String]) -> Result<Self> {
        File::create(place.device())?;
        let export = format!("type=fuse,id=e,node-name=top,writable=on,mountpoint={}", place.device().display());
        let mut daemon = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &format!("driver=file,node-name=image,filename={}", image(&place).display())])
            .args(arguments)
            .args(["--export", &export])
            .stdin(Stdio::null())
            .spawn()?;
        let until = Instant::now() + Duration::from_secs(20);
        // The file is empty until the export covers it.
        while fs::metadata(place.device()).map_or(0, |about| about.len()) != SIZE {
            if let Some(status) = daemon.try_wait()? {
                bail!("the storage daemon ended with {status}");
            }
            ensure!(Instant::now() < until, "the device does not appear");
            std::thread::sleep(Duration::from_millis(1));
        }
        let device = Self { place, daemon: Reaped(daemon) };
        device.place.mount(&device.place.device())?;
        Ok(device)
    }

    /// Where the file system is.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Ends the daemon, when nothing is mounted any more.
    pub fn end(&mut self) -> Result<()> {
        let status = loop {
            // Not once: QEMU's main loop does not notice a signal that comes right before it begins to wait.
            kill_process(Pid::from_child(&self.daemon.0), Signal::TERM)?;
            match self.daemon.0.try_wait()? {
                Some(status) => break status,
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        ensure!(status.success(), "the storage daemon ended with {status}");
        Ok(())
    }
}

/// A child whose end is not missed.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.wait();
    }
}

/// Tells whether this process can make such devices, and says so where not.
pub fn can_be_made() -> bool {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can mount a file system");
        return false;
    }
    let help = Command::new("qemu-storage-daemon").arg("--help").output();
    let tells = |output: &std::process::Output| String::from_utf8_lossy(&output.stdout).contains("type=]fuse");
    if !help.is_ok_and(|output| tells(&output)) || !Path::new("/dev/fuse").exists() {
        println!("skipped: this storage daemon or kernel has no FUSE exports");
        return false;
    }
    true
}
