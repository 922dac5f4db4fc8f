//! SR.probe: looks for SRs, and for a place for one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::smapi::{Configuration, ProbeResult};
use plugin::store::{Sr, is_read_only, sr_path, sr_uri};
use serde::Deserialize;

/// What an entry that is not complete says of itself.
const OBSTACLE: &str = "obstacle";

/// Where to look.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    configuration: Configuration,
}

/// Gives the SR that is in the directory. Where none is: those in the directories right below it, and the directory
/// itself as a place for a new one, which is complete when SR.create would take it and nobody would regret that. With
/// an `sr_uuid` only that SR.
///
/// An entry that is not complete leads to no SR: it says what stands against it.
///
/// # Errors
///
/// When there is no such directory, or the record of an SR in it cannot be read.
pub fn execute(_: &Host, parameters: Parameters) -> Result<Vec<ProbeResult>> {
    let path = sr_path(&parameters.configuration)?;
    if !path.is_dir() {
        let reason = format!("{} is not a directory", path.display());
        return Err(Error::InvalidDeviceConfig { key: "uri", reason });
    }
    let mut found = match Sr::find(&path)? {
        Some(sr) => vec![existing(&sr)?],
        None => {
            let mut found = below(&path)?;
            found.push(place(&path, !found.is_empty())?);
            found
        }
    };
    if let Some(wanted) = parameters.configuration.get("sr_uuid") {
        found.retain(|entry| entry.configuration.get("sr_uuid") == Some(wanted));
    }
    Ok(found)
}

/// Gives the entry of an SR.
fn existing(sr: &Sr) -> Result<ProbeResult> {
    let stat = sr.describe()?;
    // xapi-storage-script wants the uuid exactly where an SR was found.
    let configuration =
        Configuration::from([("uri".to_owned(), sr_uri(&sr.path)), ("sr_uuid".to_owned(), stat.uuid.clone())]);
    Ok(ProbeResult { configuration, complete: true, sr: Some(stat), extra_info: BTreeMap::new() })
}

/// Gives the entry of a directory without an SR.
fn without(path: &Path, obstacle: Option<String>) -> ProbeResult {
    ProbeResult {
        configuration: Configuration::from([("uri".to_owned(), sr_uri(path))]),
        complete: obstacle.is_none(),
        sr: None,
        extra_info: obstacle.map(|why| (OBSTACLE.to_owned(), why)).into_iter().collect(),
    }
}

/// Finds the SRs in the directories right below one, in the order of their names.
fn below(path: &Path) -> Result<Vec<ProbeResult>> {
    let mut directories: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(path).map_err(Error::on("listing", path))? {
        directories.push(entry.map_err(Error::on("listing", path))?.path());
    }
    directories.sort();
    // A path that is not UTF-8 can be no SR's. One that cannot be read must not hide the others.
    let directories = directories.into_iter().filter(|path| path.to_str().is_some());
    let look = |path: PathBuf| match Sr::find(&path) {
        Ok(None) | Err(Error::Io { .. }) => None,
        Ok(Some(sr)) => Some(existing(&sr).unwrap_or_else(|error| without(&path, Some(error.chain())))),
        Err(error) => Some(without(&path, Some(error.chain()))),
    };
    Ok(directories.filter_map(look).collect())
}

/// Gives a directory as a place for an SR.
fn place(path: &Path, above_others: bool) -> Result<ProbeResult> {
    let holds = |name: &str| fs::read_dir(path.join(name)).is_ok_and(|mut entries| entries.next().is_some());
    let obstacle = if above_others {
        Some("there are SRs in directories below it: give one of those, or an empty directory")
    } else if holds("trees") || holds("volumes") {
        Some("it holds volumes of an SR whose sr.json is gone: put that back")
    } else if is_read_only(path)? {
        Some("the file system is read-only: mount it for writing")
    } else {
        None
    };
    Ok(without(path, obstacle.map(str::to_owned)))
}
