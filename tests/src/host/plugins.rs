//! Registration of plugins, and the features that xapi then believes in.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::script::{Runner, script_path};
use crate::wire::{Plugin, Request};

/// A registered volume plugin.
#[derive(Debug, Clone)]
pub struct VolumePlugin {
    /// Its directory.
    pub dir: PathBuf,
    /// What it says of itself.
    pub query: Plugin,
    /// Its features as xapi sees them: declared ones, those that its scripts imply, and those that every plugin has.
    pub features: Vec<String>,
}

/// A registered datapath plugin.
#[derive(Debug, Clone)]
pub struct DatapathPlugin {
    /// Its directory.
    pub dir: PathBuf,
    /// What it says of itself; its features count as they stand.
    pub query: Plugin,
}

impl VolumePlugin {
    /// Whether xapi believes in a feature.
    #[must_use]
    pub fn has(&self, feature: &str) -> bool {
        self.features.iter().any(|f| f.split('/').next() == Some(feature))
    }
}

impl DatapathPlugin {
    /// Whether the plugin's own list has a feature.
    #[must_use]
    pub fn has(&self, feature: &str) -> bool {
        self.query.features.iter().any(|f| f == feature)
    }
}

/// Registers every directory of `volume/`, by SR type.
pub(super) async fn register_volume(runner: &Runner, root: &Path) -> Result<BTreeMap<String, VolumePlugin>> {
    let mut plugins = BTreeMap::new();
    for dir in directories(&root.join("volume"))? {
        let query = query(runner, &dir, "OpaqueRef:query").await?;
        let features = features(&dir, &query);
        plugins.insert(query.plugin.clone(), VolumePlugin { dir, query, features });
    }
    Ok(plugins)
}

/// Registers every directory of `datapath/`, by URI scheme, which is the directory's name.
pub(super) async fn register_datapath(runner: &Runner, root: &Path) -> Result<BTreeMap<String, DatapathPlugin>> {
    let mut plugins = BTreeMap::new();
    for dir in directories(&root.join("datapath"))? {
        let query = query(runner, &dir, "register").await?;
        if !["3.0", "5.0"].contains(&query.required_api_version.as_str()) {
            bail!("{}: required_api_version {:?} is unknown", dir.display(), query.required_api_version);
        }
        let scheme = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        plugins.insert(scheme, DatapathPlugin { dir, query });
    }
    Ok(plugins)
}

async fn query(runner: &Runner, dir: &Path, dbg: &str) -> Result<Plugin> {
    let answer = runner.call(dir, &Request::query(dbg)).await.with_context(|| dir.display().to_string())?;
    Ok(Plugin::decode(&answer)?)
}

fn directories(parent: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(|| parent.display().to_string()),
    };
    let mut dirs = entries.map(|e| Ok(e?.path())).collect::<Result<Vec<_>>>()?;
    dirs.sort();
    Ok(dirs)
}

/// ocaml/xapi-storage-script/main.ml, `query_impl`.
fn features(dir: &Path, query: &Plugin) -> Vec<String> {
    let mut features: Vec<String> =
        query.features.iter().map(|f| if f == "VDI_DESTROY" { "VDI_DELETE".to_owned() } else { f.clone() }).collect();
    for (script, feature) in [
        ("SR.attach", "SR_ATTACH"),
        ("SR.create", "SR_CREATE"),
        ("SR.destroy", "SR_DELETE"),
        ("SR.detach", "SR_DETACH"),
        ("SR.ls", "SR_SCAN"),
        ("SR.stat", "SR_UPDATE"),
        ("SR.probe", "SR_PROBE"),
        ("Volume.create", "VDI_CREATE"),
        ("Volume.clone", "VDI_CLONE"),
        ("Volume.snapshot", "VDI_SNAPSHOT"),
        ("Volume.resize", "VDI_RESIZE"),
        ("Volume.destroy", "VDI_DELETE"),
        ("Volume.stat", "VDI_UPDATE"),
    ] {
        if script_path(dir, script).is_ok() {
            features.push(feature.to_owned());
        }
    }
    for always in ["VDI_ATTACH", "VDI_DETACH", "VDI_ACTIVATE", "VDI_DEACTIVATE", "VDI_INTRODUCE"] {
        features.push(always.to_owned());
    }
    if features.iter().any(|f| f == "VDI_CLONE") {
        features.push("VDI_RESET_ON_BOOT/2".to_owned());
    }
    // ocaml/xapi/smint.ml: who can be mirrored from can be mirrored to.
    if features.iter().any(|f| f == "VDI_MIRROR") {
        features.push("VDI_MIRROR_IN".to_owned());
    }
    features.sort();
    features.dedup();
    features
}
