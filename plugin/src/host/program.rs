//! Which file this process was started from, for starting others from it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// What the kernel puts behind the name of an executable that has been removed.
const REMOVED: &str = " (deleted)";

/// Gives the path of this executable. While a call runs its plugin's directory may be exchanged with a newer one and be
/// removed: then it is the newer executable, which is there under the name that this one was called by.
///
/// # Errors
///
/// When the kernel does not tell.
pub fn this_program() -> Result<PathBuf> {
    let current = std::env::current_exe().map_err(|error| Error::io("finding this program", error))?;
    Ok(newest(current, std::env::args_os().next()))
}

/// Chooses between the file that a process runs and what is now under the name that it was called by, a link as it may be.
fn newest(current: PathBuf, called: Option<OsString>) -> PathBuf {
    let name = |path: &Path| Some(path.file_name()?.to_string_lossy().trim_end_matches(REMOVED).to_owned());
    let called = called.map(PathBuf::from).filter(|called| called.is_absolute());
    let called = called.and_then(|called| called.canonicalize().ok());
    called.filter(|called| name(called) == name(&current)).unwrap_or(current)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_program_that_was_replaced_is_found_by_the_name_it_was_called_by() {
        let directory = tempfile::tempdir().unwrap();
        let plugin = directory.path().canonicalize().unwrap();
        let (program, link) = (plugin.join("program"), plugin.join("SR.attach"));
        fs::write(&program, "").unwrap();
        symlink("program", &link).unwrap();
        for removed in ["/stage/program", "/stage/program (deleted)"] {
            assert_eq!(newest(removed.into(), Some(link.clone().into())), program);
        }
    }

    #[test]
    fn a_name_that_leads_elsewhere_or_nowhere_says_nothing() {
        for called in ["program", "/bin/sh", "/nonexistent/program", ""] {
            assert_eq!(newest("/a/program".into(), Some(called.into())), Path::new("/a/program"));
        }
        assert_eq!(newest("/a/program".into(), None), Path::new("/a/program"));
    }
}
