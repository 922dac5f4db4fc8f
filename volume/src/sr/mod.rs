//! SR.*: directories that hold volumes.

pub mod attach;
pub mod create;
pub mod destroy;
pub mod detach;
pub mod ls;
pub mod probe;
pub mod set_description;
pub mod set_name;
pub mod stat;
