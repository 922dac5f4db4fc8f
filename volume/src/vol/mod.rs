//! Volume.*: the disks of guests and their snapshots.

pub mod clone;
pub mod compose;
pub mod create;
pub mod destroy;
pub mod resize;
pub mod revert;
pub mod set;
pub mod set_description;
pub mod set_name;
pub mod snapshot;
pub mod stat;
pub mod unset;
