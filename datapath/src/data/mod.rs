//! The methods of Data: mirrors.

pub mod cancel;
pub mod destroy;
pub mod ls;
pub mod mirror;
pub mod stat;

use plugin::id::MirrorKey;
use plugin::smapi::Operation;
use serde::Deserialize;

/// The parameters of the methods that are about one operation.
#[derive(Debug, Deserialize)]
pub struct OperationParameters {
    operation: Operation,
}

impl OperationParameters {
    /// Gives the mirror's key; `None` when no mirror can have it.
    fn mirror(&self) -> Option<MirrorKey> {
        match &self.operation {
            Operation::MirrorV1(key) => key.parse().ok(),
            Operation::CopyV1(_) => None,
        }
    }
}
