//! A device whose every write and flush is noted, so that it can be had as power cuts leave it.

use std::fs::{self, File};

use anyhow::Result;

use super::device::Device;
use super::image::Image;
use super::log::Log;
use super::place::Place;

/// A mounted device with QEMU's blklogwrites between the file system and the image.
pub struct Recorder(Device);

impl Recorder {
    /// Mounts a copy of an image, and notes what is written from now on.
    pub fn start(image: &Image) -> Result<Self> {
        let place = image.copied()?;
        let log = place.path().join("log");
        File::create(&log)?;
        let file = format!("driver=file,node-name=log,filename={}", log.display());
        let noted = "driver=blklogwrites,node-name=top,file=image,log=log";
        let arguments = ["--blockdev", &file, "--blockdev", noted].map(str::to_owned);
        Ok(Self(Device::mount(place, &arguments)?))
    }

    /// Where the file system is.
    pub fn place(&self) -> &Place {
        self.0.place()
    }

    /// Tells how long the log is by now: what was answered so far is in it.
    pub fn length(&self) -> Result<u64> {
        Ok(fs::metadata(self.place().path().join("log"))?.len())
    }

    /// Unmounts the file system and gives what was noted.
    pub fn end(mut self) -> Result<Log> {
        self.place().unmount()?;
        self.0.end()?;
        Log::read(&self.place().path().join("log"))
    }
}
