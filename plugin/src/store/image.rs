//! A node's file, as QEMU's tools are given it.

use std::path::PathBuf;

use crate::id::NodeId;

/// A node's qcow2 file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The node.
    pub node: NodeId,
    /// Its file.
    pub path: PathBuf,
    /// The size that a guest sees, in bytes.
    pub virtual_size: u64,
}
