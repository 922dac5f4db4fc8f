//! What is migrated: the disks of a plan, or the worked example's.

use std::path::Path;

use anyhow::Result;

use super::Show;
use crate::demo::{DISK, GUEST_REGION, History};
use crate::disk::model_holds;
use crate::guest::{BLOCK, Ledger, Settings};
use crate::plan::{self, Extent, Machine, Model, Plan};
use crate::sxm::Event;

/// The largest region that a plan's guest writes to, in bytes.
const LARGEST_REGION: u64 = 64 << 20;

/// What is migrated, and what it must hold.
#[derive(Debug)]
pub enum Subject {
    /// The disks of a plan, and what the plan makes of them.
    Plan(Plan, Model),
    /// The worked example.
    Example(History),
}

impl Subject {
    /// The subject of a plan.
    ///
    /// # Errors
    /// If the plan is impossible.
    pub fn of(plan: Plan) -> Result<Self> {
        let model = plan.model()?;
        Ok(Self::Plan(plan, model))
    }

    /// The first sizes of the disks.
    pub fn sizes(&self) -> Vec<u64> {
        match self {
            Self::Plan(plan, _) => plan.disks.clone(),
            Self::Example(_) => vec![DISK],
        }
    }

    /// Whether the VM is halted when it is migrated.
    pub fn halted(&self) -> bool {
        matches!(self, Self::Plan(plan, _) if plan.halted)
    }

    /// Plays the history on a VM.
    ///
    /// # Errors
    /// The step that failed.
    pub async fn play<M: Machine>(&self, machine: &mut M, show: &Show) -> Result<()> {
        match self {
            Self::Plan(plan, _) => plan::run(plan, machine, |_| {}).await,
            Self::Example(history) => history.play(machine, &mut |what| show(&Event::Phase(what), "")).await,
        }
    }

    /// How the guest of each disk writes; none for a disk on which nobody does.
    pub fn guests(&self) -> Vec<Option<Settings>> {
        match self {
            Self::Plan(plan, model) => {
                let Some(guest) = plan.guest.filter(|_| !plan.halted) else { return vec![None; plan.disks.len()] };
                let settings = |(index, disk): (usize, &plan::Disk)| {
                    let settings = Settings::new(region(disk.size()), index as u64 + 1);
                    let fits = settings.region.length / BLOCK >= settings.depth as u64;
                    fits.then_some(Settings { writes_per_second: guest.writes_per_second, ..settings })
                };
                model.disks().iter().enumerate().map(settings).collect()
            }
            Self::Example(_) => vec![Some(Settings::new(GUEST_REGION, 1))],
        }
    }

    /// What is wrong with a disk's image at a snapshot, or at last; nothing if it holds what it must.
    ///
    /// # Errors
    /// If the image cannot be read.
    pub fn check(
        &self,
        snapshot: Option<&str>,
        disk: usize,
        image: &Path,
        guest: Option<&Ledger>,
    ) -> Result<Option<String>> {
        match self {
            Self::Plan(_, model) => {
                let disks = match snapshot {
                    Some(name) => model.disks_of(name),
                    None => Some(model.disks()),
                };
                match disks.and_then(|disks| disks.get(disk)) {
                    Some(expected) => model_holds(image, expected, guest),
                    None => Ok(Some(format!("the plan knows no disk {disk} of {snapshot:?}"))),
                }
            }
            Self::Example(history) => Ok(history.check(snapshot, image).err().map(|error| format!("{error:#}"))),
        }
    }
}

/// The last quarter of a disk, whole blocks, at most so much.
fn region(size: u64) -> Extent {
    let end = size - size % BLOCK;
    let length = (end / 4).min(LARGEST_REGION);
    let length = length - length % BLOCK;
    Extent { offset: end - length, length }
}
