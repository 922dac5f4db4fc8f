//! Which SR is meant: the directory of one, or the uuid of one that is attached.

use std::fs;
use std::path::{Path, PathBuf};

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::id::SrUuid;
use plugin::store::Sr;

/// Gives the SR's directory.
///
/// # Errors
///
/// [`Error::SrNotAttached`] for a uuid of none; [`Error::SrUnavailable`] when there is no such directory.
pub fn path_of(host: &Host, sr: &Path) -> Result<PathBuf> {
    if let Some(uuid) = sr.to_str().and_then(|text| text.parse::<SrUuid>().ok())
        && !sr.exists()
    {
        return Sr::attached_path(host, uuid);
    }
    let unavailable = |reason: String| Error::SrUnavailable { path: sr.to_owned(), reason };
    let path = fs::canonicalize(sr).map_err(|error| unavailable(error.to_string()))?;
    if path.is_dir() { Ok(path) } else { Err(unavailable("it is not a directory".to_owned())) }
}
