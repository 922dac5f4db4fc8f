//! Plugin.*: what this plugin says of itself.

pub mod diagnostics;
pub mod query;
