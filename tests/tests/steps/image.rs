//! The small SR on a file system of its own, to be copied, and to be had as power cuts leave it.

use std::fs::OpenOptions;
use std::process::Command;

use anyhow::Result;

use super::device;
use super::log::{Cut, Log};
use super::place::{Place, run};
use super::site::Site;
use super::world::World;

/// A file system with the small SR, as a file that is not mounted.
pub struct Image {
    pub small: World,
    place: Place,
}

impl Image {
    /// Makes it.
    pub fn small() -> Result<Self> {
        let place = Place::new()?;
        device::make(&place)?;
        place.mount(&device::image(&place))?;
        let small = World::small(Site::create(place.path(), place.mounted().join("sr"))?)?;
        small.site.call("SR.detach", &serde_json::json!({"dbg": "", "sr": small.site.sr}))?;
        place.unmount()?;
        Ok(Self { small, place })
    }

    /// Makes the file system that is left of this one after what was recorded and a power cut, and mounts it.
    pub fn after(&self, log: &Log, cut: Cut) -> Result<Place> {
        let place = self.copied()?;
        let image = device::image(&place);
        log.replay(cut, &OpenOptions::new().write(true).open(&image)?)?;
        place.mount(&image)?;
        Ok(place)
    }

    /// Gives a place with a copy.
    pub fn copied(&self) -> Result<Place> {
        let place = Place::new()?;
        let images = [&self.place, &place].map(device::image);
        run(Command::new("cp").arg("--sparse=always").args(images))?;
        Ok(place)
    }
}
