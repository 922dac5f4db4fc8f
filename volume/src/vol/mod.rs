//! Volume.*: the disks of guests and their snapshots.

pub mod clone;
pub mod compare;
pub mod compose;
pub mod copy;
pub mod create;
pub mod data_destroy;
pub mod destroy;
pub mod disable_cbt;
pub mod enable_cbt;
pub mod list_changed_blocks;
pub mod resize;
pub mod revert;
pub mod set;
pub mod set_description;
pub mod set_name;
pub mod similar_content;
pub mod snapshot;
pub mod stat;
pub mod unset;
