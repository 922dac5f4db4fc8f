//! Loop devices (Linux `include/uapi/linux/loop.h`, loop(4)): bound to a file, marked, found again, cleared.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::id::VolumeKey;

/// What gives out loop devices.
pub(super) const CONTROL: &str = "/dev/loop-control";

const GET_FREE: libc::Ioctl = 0x4C82;
const CONFIGURE: libc::Ioctl = 0x4C0A;
const CLEAR: libc::Ioctl = 0x4C01;
const SET_STATUS: libc::Ioctl = 0x4C04;
const GET_STATUS: libc::Ioctl = 0x4C05;
const SET_FILE: libc::Ioctl = 0x4C00;
const SET_DIRECT_IO: libc::Ioctl = 0x4C08;

const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;
const DIRECT_IO: u32 = 16;

/// How often another free device is asked for, as somebody else was quicker.
const ATTEMPTS: usize = 100;

/// How long somebody who is about to close a device, as udev is whenever one appears, may take.
const GRACE: Duration = Duration::from_secs(1);

/// How often it is looked whether a device is closed.
const LOOK: Duration = Duration::from_millis(2);

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    file: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// What tells a volume's device from those of others, the same volume's on another host of this machine included. It is
/// kept by the kernel with the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark([u8; 64]);

impl Mark {
    /// Makes the mark of a volume by its runtime directory, which is there.
    ///
    /// # Errors
    ///
    /// When the directory is not there.
    pub fn of(volume: VolumeKey, directory: &Path) -> Result<Self> {
        let metadata = fs::metadata(directory).map_err(Error::on("looking at", directory))?;
        let text = format!("{volume}:{:x}:{:x}", metadata.dev(), metadata.ino());
        let mut bytes = [0; 64];
        // The last byte stays 0, as the kernel has it.
        for (byte, char) in bytes.iter_mut().take(63).zip(text.bytes()) {
            *byte = char;
        }
        Ok(Self(bytes))
    }
}

/// What became of a device that was to be cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cleared {
    /// It lies on nothing any more.
    Now,
    /// Somebody has it open; it will be cleared when they close it.
    Later,
}

/// One loop device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Loop(u32);

impl Loop {
    /// Binds a free device to a file, around the page cache, so that what is flushed is flushed below it too.
    ///
    /// # Errors
    ///
    /// When there is none, or the kernel refuses.
    pub fn bind(file: &File, mark: &Mark, writable: bool) -> Result<Self> {
        let control = Path::new(CONTROL);
        let opened = OpenOptions::new().read(true).write(true).open(control);
        let opened = opened.map_err(Error::on("opening", control))?;
        let descriptor =
            u32::try_from(file.as_raw_fd()).map_err(|_| Error::Internal("a file without a descriptor".to_owned()))?;
        let flags = DIRECT_IO | if writable { 0 } else { READ_ONLY };
        let info = Info { flags, file_name: mark.0, ..Info::none() };
        for _ in 0..ATTEMPTS {
            // SAFETY: LOOP_CTL_GET_FREE takes no argument.
            #[allow(unsafe_code)]
            let number = unsafe { libc::ioctl(opened.as_raw_fd(), GET_FREE) };
            let free = u32::try_from(number).map(Self);
            let free = free.map_err(|_| Error::on("asking", control)(io::Error::last_os_error()))?;
            let device = free.open(writable)?;
            let bound = match configure(device.as_raw_fd(), descriptor, info) {
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)) => {
                    configure_by_steps(device.as_raw_fd(), descriptor, info)
                }
                bound => bound,
            };
            match bound {
                Ok(()) => return Ok(free),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) => return Err(free.failed("binding", error)),
            }
        }
        Err(Error::Internal("every loop device that was free was taken by somebody else".to_owned()))
    }

    /// Finds the devices with a mark.
    ///
    /// # Errors
    ///
    /// When the kernel's list cannot be read.
    pub fn marked(mark: &Mark, file: &Path) -> Result<Vec<Self>> {
        let path = Path::new("/sys/block");
        let entries = fs::read_dir(path).map_err(Error::on("listing", path))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let numbers = names.filter_map(|name| name.strip_prefix("loop")?.parse().ok().map(Self));
        Ok(numbers.filter(|device| device.may_lie_on(file) && device.has(mark)).collect())
    }

    /// Tells whether a device may lie on a file, without opening it: others' devices are left alone.
    fn may_lie_on(self, file: &Path) -> bool {
        let backing = fs::read_to_string(format!("/sys/block/loop{}/loop/backing_file", self.0));
        // Once the server's namespace is gone the file has no path.
        backing.is_ok_and(|backing| {
            let backing = backing.trim_end_matches('\n');
            backing == "/" || Path::new(backing) == file
        })
    }

    /// Gives the device's path.
    pub fn path(self) -> PathBuf {
        PathBuf::from(format!("/dev/loop{}", self.0))
    }

    /// Tells whether the device is bound and has a mark.
    pub fn has(self, mark: &Mark) -> bool {
        let Ok(device) = self.open(false) else { return false };
        status(device.as_raw_fd()).is_ok_and(|info| info.file_name == mark.0)
    }

    /// Clears the device, at once or, when somebody does not close it soon, as soon as they do.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn clear(self, mark: &Mark) -> Result<Cleared> {
        let deadline = Instant::now() + GRACE;
        while self.has(mark) {
            let device = self.open(false)?;
            // SAFETY: LOOP_CLR_FD takes no argument.
            #[allow(unsafe_code)]
            let done = unsafe { libc::ioctl(device.as_raw_fd(), CLEAR, 0) };
            match io::Error::last_os_error() {
                _ if done == 0 => {}
                // It has just been, or others are just opening it.
                error if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::EBUSY)) => {}
                error => return Err(self.failed("clearing", error)),
            }
            // The last one to close it clears it.
            drop(device);
            if Instant::now() >= deadline {
                return Ok(Cleared::Later);
            }
            if self.has(mark) {
                std::thread::sleep(LOOK);
            }
        }
        Ok(Cleared::Now)
    }

    /// Takes back that a device is cleared later.
    ///
    /// # Errors
    ///
    /// When it is cleared.
    pub fn keep(self, mark: &Mark) -> Result<()> {
        let device = self.open(false)?;
        let mut info = status(device.as_raw_fd()).map_err(|error| self.failed("looking at", error))?;
        if info.file_name != mark.0 {
            return Err(Error::Internal(format!("{} is another's by now", self.path().display())));
        }
        info.flags &= !AUTOCLEAR;
        // SAFETY: LOOP_SET_STATUS64 reads a loop_info64, which this is and which lives as long as the call.
        #[allow(unsafe_code)]
        let done = unsafe { libc::ioctl(device.as_raw_fd(), SET_STATUS, &raw const info) };
        if done == 0 { Ok(()) } else { Err(self.failed("keeping", io::Error::last_os_error())) }
    }

    fn open(self, writable: bool) -> Result<File> {
        let path = self.path();
        OpenOptions::new().read(true).write(writable).open(&path).map_err(Error::on("opening", &path))
    }

    fn failed(self, doing: &'static str, error: io::Error) -> Error {
        Error::on(doing, &self.path())(error)
    }
}

impl Info {
    /// A device without offset, limit or name.
    const fn none() -> Self {
        Self {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: 0,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

/// Binds a device in one step.
fn configure(device: RawFd, file: u32, info: Info) -> io::Result<()> {
    let config = Config { file, block_size: 512, info, reserved: [0; 8] };
    // SAFETY: LOOP_CONFIGURE reads a loop_config, which this is and which lives as long as the call.
    #[allow(unsafe_code)]
    let done = unsafe { libc::ioctl(device, CONFIGURE, &raw const config) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Binds a device as Linux before 5.8 does it: then its mark comes second. It can be written to only if the descriptor
/// can, whatever the flags say. A call that is killed between leaves a device without a mark, which lies on a file that
/// is gone with its server.
fn configure_by_steps(device: RawFd, file: u32, info: Info) -> io::Result<()> {
    // SAFETY: LOOP_SET_FD and LOOP_SET_DIRECT_IO take a number; LOOP_SET_STATUS64 reads a loop_info64, which this is and
    // which lives as long as the call; LOOP_CLR_FD takes nothing.
    #[allow(unsafe_code)]
    unsafe {
        if libc::ioctl(device, SET_FILE, libc::c_ulong::from(file)) != 0 {
            return Err(io::Error::last_os_error());
        }
        let marked = libc::ioctl(device, SET_STATUS, &raw const info) == 0;
        if marked && libc::ioctl(device, SET_DIRECT_IO, 1 as libc::c_ulong) == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        libc::ioctl(device, CLEAR, 0);
        Err(error)
    }
}

/// Asks what a device is bound to.
fn status(device: RawFd) -> io::Result<Info> {
    let mut info = Info::none();
    // SAFETY: LOOP_GET_STATUS64 writes a loop_info64, which this is and which lives as long as the call.
    #[allow(unsafe_code)]
    let done = unsafe { libc::ioctl(device, GET_STATUS, &raw mut info) };
    if done == 0 { Ok(info) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_the_kernels_sizes() {
        assert_eq!((size_of::<Info>(), size_of::<Config>()), (232, 304));
    }

    #[test]
    fn a_device_is_bound_in_either_way_as_it_was_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, vec![7; 1 << 20]).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let mark = Mark::of(VolumeKey::random(), directory.path()).unwrap();
        let bound = Loop::bind(&file, &mark, true).unwrap();
        let device = bound.open(true).unwrap();
        let info = status(device.as_raw_fd()).unwrap();
        assert_eq!((info.flags & (READ_ONLY | AUTOCLEAR), info.file_name), (0, mark.0));
        let direct = info.flags & DIRECT_IO;
        assert_eq!(Loop::marked(&mark, &path).unwrap(), [bound]);
        // While it is open here it is not cleared; it is not when that is taken back.
        assert_eq!(bound.clear(&mark).unwrap(), Cleared::Later);
        bound.keep(&mark).unwrap();
        drop(device);
        assert!(bound.has(&mark));
        assert_eq!(bound.clear(&mark).unwrap(), Cleared::Now);
        assert!(Loop::marked(&mark, &path).unwrap().is_empty());
        let bound = (0..ATTEMPTS).find_map(|_| {
            let control = File::open(CONTROL).unwrap();
            // SAFETY: LOOP_CTL_GET_FREE takes no argument.
            #[allow(unsafe_code)]
            let free = Loop(unsafe { libc::ioctl(control.as_raw_fd(), GET_FREE) }.cast_unsigned());
            let device = free.open(true).unwrap();
            let info = Info { flags: DIRECT_IO, file_name: mark.0, ..Info::none() };
            configure_by_steps(device.as_raw_fd(), file.as_raw_fd().cast_unsigned(), info).ok().map(|()| free)
        });
        let bound = bound.unwrap();
        let stepwise = status(bound.open(false).unwrap().as_raw_fd()).unwrap();
        assert_eq!((stepwise.flags & DIRECT_IO, stepwise.file_name), (direct, mark.0));
        assert_eq!(bound.clear(&mark).unwrap(), Cleared::Now);
    }

    #[test]
    fn marks_differ_by_volume_and_by_directory() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let volume = VolumeKey::random();
        let mark = Mark::of(volume, one.path()).unwrap();
        assert_eq!(mark, Mark::of(volume, one.path()).unwrap());
        assert_ne!(mark, Mark::of(volume, other.path()).unwrap());
        assert_ne!(mark, Mark::of(VolumeKey::random(), one.path()).unwrap());
        assert_eq!(mark.0[63], 0);
    }
}
