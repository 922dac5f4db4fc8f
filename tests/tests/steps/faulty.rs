//! A device that can be broken and mended while it is mounted.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use serde_json::{Value, json};

use super::device::Device;
use super::place::Place;

/// How many flushes fail.
const FLUSHES: usize = 200;

/// What the file system gives at least, in bytes.
const BLOCK: u64 = 4096;

/// What a broken disk refuses, and with which error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It writes nothing.
    Write,
    /// It has no space for anything, as one that is thinly provisioned.
    Space,
    /// It cannot tell whether what was written is there.
    Flush,
    /// It reads nothing.
    Read,
    /// The file system is full.
    Full,
}

impl Fault {
    pub const ALL: [Self; 5] = [Self::Write, Self::Space, Self::Flush, Self::Read, Self::Full];

    /// Gives the request that fails, in QEMU's words, and the number of the error, where it is the disk that fails.
    fn words(self) -> Option<(&'static str, i32)> {
        const EIO: i32 = 5;
        const ENOSPC: i32 = 28;
        match self {
            Self::Write => Some(("write", EIO)),
            Self::Space => Some(("write", ENOSPC)),
            Self::Flush => Some(("flush", EIO)),
            Self::Read => Some(("read", EIO)),
            Self::Full => None,
        }
    }
}

/// A mounted device with a node between the file system and the image whose lower end can be QEMU's blkdebug.
pub struct Faulty {
    device: Device,
    monitor: BufReader<UnixStream>,
}

impl Faulty {
    /// Mounts a place's image.
    pub fn mount(place: Place) -> Result<Self> {
        let socket = place.path().join("device.qmp");
        let chardev = format!("socket,id=qmp,server=on,wait=off,path={}", socket.display());
        let top = "driver=raw,node-name=top,file=image";
        let arguments = ["--chardev", &chardev, "--monitor", "qmp", "--blockdev", top].map(str::to_owned);
        let device = Device::mount(place, &arguments)?;
        let stream = UnixStream::connect(&socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut faulty = Self { device, monitor: BufReader::new(stream) };
        faulty.monitor.read_line(&mut String::new())?;
        faulty.command("qmp_capabilities", &json!({}))?;
        Ok(faulty)
    }

    /// Where the file system is.
    pub fn place(&self) -> &Place {
        self.device.place()
    }

    /// Breaks the disk, until it is mended.
    pub fn break_down(&mut self, fault: Fault) -> Result<()> {
        let Some((request, error)) = fault.words() else { return self.fill() };
        // A disk that cannot be flushed cannot be exchanged either, so that it has to have failed often enough in the end.
        let (once, count) = if fault == Fault::Flush { (true, FLUSHES) } else { (false, 1) };
        let rule = json!({"event": "none", "iotype": request, "errno": error, "once": once, "immediately": true});
        let rules = vec![rule; count];
        let node = json!({"driver": "blkdebug", "node-name": "broken", "image": "image", "inject-error": rules});
        self.command("blockdev-add", &node)?;
        self.stand_on("broken")
    }

    /// Mends it: what comes from now on succeeds.
    pub fn mend(&mut self, fault: Fault) -> Result<()> {
        if fault == Fault::Full {
            return Ok(fs::remove_file(self.ballast())?);
        }
        for _ in 0..FLUSHES {
            if fault == Fault::Flush && self.stand_on("image").is_ok() {
                break;
            }
        }
        self.stand_on("image")?;
        self.command("blockdev-del", &json!({"node-name": "broken"}))
    }

    /// Tells whether the file system can still be written to; its journal may have given up, or be about to.
    pub fn is_writable(&self) -> bool {
        let probe = File::create(self.place().mounted().join("probe"));
        probe.is_ok_and(|probe| probe.sync_all().is_ok())
    }

    /// Unmounts the file system, which nobody uses any more, and mounts it again, as a boot does.
    pub fn mount_again(&self) -> Result<()> {
        self.place().unmount()?;
        self.place().mount(&self.place().device())
    }

    fn ballast(&self) -> PathBuf {
        self.place().mounted().join("ballast")
    }

    /// Leaves no block free.
    fn fill(&self) -> Result<()> {
        let file = File::create(self.ballast())?;
        let (mut length, mut piece) = (0, 16 << 20);
        while piece >= BLOCK {
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), length, piece) {
                Ok(()) => length += piece,
                Err(Errno::NOSPC) => piece /= 2,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn stand_on(&mut self, node: &str) -> Result<()> {
        let top = json!({"driver": "raw", "node-name": "top", "file": node});
        self.command("blockdev-reopen", &json!({"options": [top]}))
    }

    fn command(&mut self, command: &str, arguments: &Value) -> Result<()> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.monitor.get_mut(), "{request}")?;
        loop {
            let mut line = String::new();
            self.monitor.read_line(&mut line)?;
            let answer: Value = serde_json::from_str(&line).with_context(|| line.clone())?;
            ensure!(answer.get("error").is_none(), "{request}: {answer}");
            if answer.get("return").is_some() {
                return Ok(());
            }
        }
    }
}
