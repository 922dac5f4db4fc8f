//! Plays xapi and xapi-storage-script against a SMAPIv3 plugin, strictly.

pub mod nbd;
pub mod plan;
