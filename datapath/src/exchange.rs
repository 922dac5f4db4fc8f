//! Gives two directories each other's name, for an upgrade that replaces a plugin's directory under who watches it.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use plugin::error::{Error, Result};
use plugin::log::{self, LevelFilter};
use rustix::fs::{CWD, RenameFlags, renameat_with};

/// The argument by which this executable exchanges two names, which follow. Coreutils' mv can do it since 9.5 only.
pub const ENTRY: &str = "exchange-names";

/// Exchanges the names of two directories of one file system, in one step.
pub fn main(names: impl Iterator<Item = OsString>) -> ExitCode {
    log::start_for_people(LevelFilter::INFO);
    match exchange(names.map(PathBuf::from).collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = error.chain(), "nothing is exchanged");
            ExitCode::FAILURE
        }
    }
}

fn exchange(names: Vec<PathBuf>) -> Result<()> {
    let [new, old] = names.as_slice() else {
        return Err(Error::BadRequest(format!("{ENTRY} takes two directories")));
    };
    renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE)
        .map_err(|error| Error::io(format!("exchanging {} and {}", new.display(), old.display()), error.into()))
}
