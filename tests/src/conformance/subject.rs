//! The plugin that is judged, and what it can.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Need;
use crate::host::{Host, PluginSource};
use crate::script::CallLog;

/// In a device-config's value this stands for a directory of the SR's own.
pub const DIRECTORY: &str = "{dir}";

/// What this project's plugins call themselves.
const VENDOR: &str = "xapi-storage-qcow2";
/// What xapi-storage-script runs the observer by.
const PYTHON: &str = "/usr/bin/python3";

/// A plugin to judge.
#[derive(Debug, Clone)]
pub struct Subject {
    /// Where its scripts are.
    pub plugins: PluginSource,
    /// The SR type.
    pub sr_type: String,
    /// The device-config of an SR, with `DIRECTORY` where an empty directory belongs.
    pub config: Vec<(String, String)>,
    /// Whether its SRs and its runtime files are laid out as this project's.
    pub own_layout: bool,
    /// Whether scripts are run by the observer, as with tracing on.
    pub traced: bool,
    observed: bool,
    vendor: String,
    methods: BTreeSet<String>,
    features: BTreeSet<String>,
}

impl Subject {
    /// Asks a plugin what it has.
    ///
    /// # Errors
    /// If it cannot be registered, or has no SRs of this type.
    pub async fn discover(
        plugins: PluginSource,
        sr_type: &str,
        config: Vec<(String, String)>,
        own_layout: bool,
    ) -> Result<Self> {
        let root = tempfile::Builder::new().prefix("fx-").tempdir_in("/tmp")?;
        let host = Host::start("discover", root.path(), &plugins, &CallLog::default()).await?;
        let by_directory = || host.volume_plugins.values().find(|plugin| plugin.dir.ends_with(sr_type));
        let volume = host.volume_plugins.get(sr_type).or_else(by_directory);
        let volume = volume.with_context(|| {
            let known: Vec<_> = host.volume_plugins.keys().collect();
            format!("there is no volume plugin {sr_type}, but {known:?}")
        })?;
        let mut methods = BTreeSet::new();
        add_scripts(&volume.dir, &mut methods)?;
        let mut features: BTreeSet<String> = volume.features.iter().cloned().collect();
        let mut observed = Path::new(PYTHON).exists() && volume.dir.join("observer.py").exists();
        for datapath in host.datapath_plugins.values() {
            add_scripts(&datapath.dir, &mut methods)?;
            features.extend(datapath.query.features.iter().cloned());
            observed &= datapath.dir.join("observer.py").exists();
        }
        let (sr_type, vendor) = (volume.query.plugin.clone(), volume.query.vendor.clone());
        Ok(Self { plugins, sr_type, config, own_layout, traced: false, observed, vendor, methods, features })
    }

    /// A plugin below a root: `volume/` and `datapath/` are in it, or where a host has them. The plugin is named by its
    /// SR type or by its directory. One of this project is known by its Query.
    ///
    /// # Errors
    /// If there is none, or it cannot be registered.
    pub async fn at(root: &Path, name: &str, config: Vec<(String, String)>) -> Result<Self> {
        let root = std::path::absolute(root)?;
        let places = [root.clone(), root.join("usr/libexec/xapi-storage-script")];
        let place = places.into_iter().find(|place| place.join("volume").is_dir());
        let place = place.with_context(|| format!("{} has no volume/ with plugins", root.display()))?;
        let mut subject = Self::discover(PluginSource::Existing(place), name, config, false).await?;
        subject.own_layout = subject.vendor == VENDOR && subject.sr_type == "qcow2";
        Ok(subject)
    }

    /// This project's plugin, by the directory of its two executables.
    ///
    /// # Errors
    /// If they are not there or cannot be asked.
    pub async fn ours(binaries: PathBuf) -> Result<Self> {
        let config = vec![("uri".to_owned(), format!("file://{DIRECTORY}"))];
        let at = binaries.display().to_string();
        let subject = Self::discover(PluginSource::Binaries(binaries), "qcow2", config, true).await;
        subject.with_context(|| format!("the plugin's executables in {at} cannot be used"))
    }

    /// Says what is missing of a need, if it is.
    pub(super) fn lacks(&self, need: Need) -> Option<String> {
        match need {
            Need::Method(name) => self.lacks_script(name),
            Need::Feature(name) => {
                let known = self.features.iter().any(|f| f.split('/').next() == Some(name));
                (!known).then(|| format!("the plugin has not the feature {name}"))
            }
            Need::OwnLayout => (!self.own_layout).then(|| "the plugin's files are laid out otherwise".to_owned()),
            Need::Observer => (!self.observed).then(|| "no observer.py lies beside the scripts".to_owned()),
            Need::Root => (!rustix::process::geteuid().is_root()).then(|| "only root may mount".to_owned()),
        }
    }

    /// Says that a script is missing, if it is.
    pub(super) fn lacks_script(&self, method: &str) -> Option<String> {
        (!self.methods.contains(&method.to_ascii_lowercase())).then(|| format!("the plugin has no {method}"))
    }

    /// The device-config of an SR in a directory.
    pub(super) fn config_in(&self, directory: &Path) -> Vec<(String, String)> {
        let directory = directory.to_string_lossy();
        self.config.iter().map(|(k, v)| (k.clone(), v.replace(DIRECTORY, &directory))).collect()
    }
}

fn add_scripts(dir: &Path, methods: &mut BTreeSet<String>) -> Result<()> {
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        methods.insert(entry?.file_name().to_string_lossy().to_ascii_lowercase());
    }
    Ok(())
}
