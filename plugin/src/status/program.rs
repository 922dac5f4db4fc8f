//! QEMU's storage daemons that are there, as they are shown.

use std::path::PathBuf;

use serde::Serialize;

use crate::host::Host;
use crate::qemu;

/// A storage daemon's program that was asked what it can do.
#[derive(Debug, Serialize)]
pub struct ProgramStatus {
    /// Where it is.
    pub path: PathBuf,
    /// Its version.
    pub version: String,
    /// Whether it ends a handshake that takes too long by itself.
    pub bounds_handshake: bool,
    /// Why it cannot be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lacks: Option<String>,
}

/// Gives what was found out of the programs that are there.
pub(super) fn all(host: &Host) -> Vec<ProgramStatus> {
    let known = qemu::known_daemons(host).into_iter();
    let status = |(daemon, lacks): (qemu::StorageDaemon, Option<String>)| {
        let qemu::StorageDaemon { path, version, bounds_handshake } = daemon;
        ProgramStatus { path, version, bounds_handshake, lacks }
    };
    known.map(status).collect()
}
