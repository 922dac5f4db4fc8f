//! Files of a host, as they are looked through.

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// What has to have been there at some time, below /run.
pub const NAMES: &[&str] = &[
    "state.json",
    "daemon.log",
    "supervisor.log",
    "qmp.sock",
    "mirror.sock",
    "nbd.sock",
    "control.sock",
    "import.sock",
    "failures",
    "programs.json",
];

/// A file, socket or directory.
pub struct Entry {
    pub path: PathBuf,
    pub mode: u32,
    /// What a plain file holds.
    pub bytes: Vec<u8>,
    is_plain: bool,
}

impl Entry {
    /// Tells whether others than its owner may do anything with it, or it may be run.
    pub fn is_open(&self) -> bool {
        // Of a socket's mode only the bits for writing count; QEMU leaves it to the umask.
        let wanted = if self.is_plain { 0o600 } else { 0o700 };
        self.mode & !wanted != 0
    }
}

/// Everything at and below a path. What goes meanwhile is passed over.
pub fn below(path: &Path, entries: &mut Vec<Entry>) {
    let Ok(metadata) = path.symlink_metadata() else { return };
    let (mode, kind) = (metadata.permissions().mode() & 0o7777, metadata.file_type());
    if kind.is_symlink() {
        return;
    }
    let bytes = if kind.is_file() { fs::read(path).unwrap_or_default() } else { Vec::new() };
    entries.push(Entry { path: path.to_owned(), mode, bytes, is_plain: !kind.is_dir() && !kind.is_socket() });
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        below(&entry.path(), entries);
    }
}
