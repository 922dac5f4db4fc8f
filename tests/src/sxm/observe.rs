//! What a migration tells while it runs, and what it asks of the guest.

use std::future::{Future, ready};
use std::pin::Pin;

use crate::db::ActiveDisk;
use crate::smapiv2::Vdi;

/// A future behind a pointer, so that observers can be trait objects.
pub type Answer<'a> = Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send + 'a>>;

/// What happens in a migration.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A phase begins.
    Phase(&'static str),
    /// A volume begins to travel.
    Started {
        /// The volume at the source.
        source: Vdi,
        /// The volume that is written to at the destination.
        destination: Vdi,
    },
    /// How far a volume is, as the datapath says.
    Progress {
        /// The volume at the source.
        source: Vdi,
        /// 0 to 1.
        fraction: Option<f64>,
    },
    /// The first synchronisation of a volume is complete.
    Complete {
        /// The volume at the source.
        source: Vdi,
    },
    /// A volume is where it belongs.
    Arrived {
        /// The volume at the source.
        source: Vdi,
        /// The volume at the destination.
        destination: Vdi,
    },
}

/// Watches a migration and moves the guest with it.
pub trait Observer: Send + Sync {
    /// Something happened. Called from within the migration, so that what it does happens right then.
    fn event(&self, event: &Event) {
        let _ = event;
    }

    /// The VM is suspended: from here on its guest must not write.
    fn suspend(&self) -> Answer<'_> {
        Box::pin(ready(Ok(())))
    }

    /// The VM runs again with these disks, at the destination or, after a failure, at the source.
    fn resume(&self, disks: Vec<ActiveDisk>) -> Answer<'_> {
        let _ = disks;
        Box::pin(ready(Ok(())))
    }
}

/// An observer that does nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quiet;

impl Observer for Quiet {}
