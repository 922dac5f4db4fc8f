//! One host: its root directory, its plugins, what xapi and xapi-storage-script remember on it, and its proxies.
//!
//! Several hosts live in one process. A script is told by `XAPI_STORAGE_QCOW2_ROOT` on which it runs.

mod descriptor;
mod export;
mod layout;
mod leftover;
mod plugins;
mod pump;
mod server;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use tokio::net::UnixStream;
use tokio::task::AbortHandle;
use uuid::Uuid;

pub use descriptor::pass;
pub use export::ImportPath;
pub use layout::{DATAPATH, VOLUME, inventory, write_settings};
pub use leftover::Leftovers;
pub(crate) use leftover::outlasts_calls;
pub use plugins::{DatapathPlugin, VolumePlugin};
pub use pump::{Sample, Wire, WireFault, WireHarm, WireMoment, Wires};

use crate::script::{CallLog, Faults, Runner};
use crate::smapiv2::{Dp, DpInfo, Sr, Vdi, Vm};
use crate::sxm::State;
use crate::wire::{Request, Volume};

/// Where a host's plugins come from.
#[derive(Debug, Clone)]
pub enum PluginSource {
    /// The directory that holds the two executables; links are made to them.
    Binaries(PathBuf),
    /// A directory with `volume/` and `datapath/`, used as it is.
    Existing(PathBuf),
}

impl PluginSource {
    /// Takes a directory for what it is: that of the two executables; one with `volume/` and `datapath/`; or a root below
    /// which the plugins are installed.
    #[must_use]
    pub fn at(directory: &Path) -> Self {
        if directory.join(VOLUME).exists() {
            return Self::Binaries(directory.to_owned());
        }
        let installed = directory.join(layout::PLUGINS);
        Self::Existing(if installed.join("volume").is_dir() { installed } else { directory.to_owned() })
    }
}

/// A host. Dropping it stops its tasks; [`Host::leftovers`] says what its plugins left running.
#[derive(Debug)]
pub struct Host {
    name: String,
    root: PathBuf,
    uuid: Uuid,
    pub(crate) session: Uuid,
    runner: Runner,
    pub(crate) volume_plugins: BTreeMap<String, VolumePlugin>,
    pub(crate) datapath_plugins: BTreeMap<String, DatapathPlugin>,
    pub(crate) srs: Mutex<BTreeMap<Sr, AttachedSr>>,
    pub(crate) dps: Mutex<BTreeMap<Dp, DpInfo>>,
    pub(crate) stat_cache: Mutex<HashMap<(Sr, Vdi), Volume>>,
    pub(crate) sxm: Mutex<State>,
    wires: Wires,
    next_domid: AtomicU32,
    tasks: Mutex<Vec<AbortHandle>>,
    /// How often each proxy was claimed.
    export_claims: Mutex<HashMap<Vm, u64>>,
    /// Connections that xapi forgets to close when its proxy fails before it pumps.
    pub(crate) forgotten: Mutex<Vec<UnixStream>>,
}

/// What xapi-storage-script remembers of an attached SR.
#[derive(Debug, Clone)]
pub struct AttachedSr {
    /// The string that `SR.attach` answered.
    pub sr: String,
    /// The directory of the volume plugin.
    pub dir: PathBuf,
    /// The SR type.
    pub kind: String,
}

impl Host {
    /// Lays out a host below `root`, registers its plugins and starts its HTTP server.
    ///
    /// # Errors
    /// The root cannot be written, a plugin has no list of methods or refuses to be queried.
    pub async fn start(name: &str, root: &Path, plugins: &PluginSource, log: &CallLog) -> Result<Arc<Self>> {
        let uuid = layout::prepare(root).with_context(|| format!("cannot lay out {}", root.display()))?;
        let plugin_root = match plugins {
            PluginSource::Binaries(dir) => layout::link_plugins(root, dir).await?,
            PluginSource::Existing(dir) => dir.clone(),
        };
        let runner = Runner::new(name, root, log.clone(), Faults::default());
        let volume_plugins = plugins::register_volume(&runner, &plugin_root).await?;
        let datapath_plugins = plugins::register_datapath(&runner, &plugin_root).await?;
        let host = Arc::new(Self {
            name: name.to_owned(),
            root: root.to_owned(),
            uuid,
            session: Uuid::new_v4(),
            runner,
            volume_plugins,
            datapath_plugins,
            srs: Mutex::default(),
            dps: Mutex::default(),
            stat_cache: Mutex::default(),
            sxm: Mutex::default(),
            wires: Wires::default(),
            next_domid: AtomicU32::new(1),
            tasks: Mutex::default(),
            export_claims: Mutex::default(),
            forgotten: Mutex::default(),
        });
        server::serve(&host)?;
        Ok(host)
    }

    /// The host's name, as it stands in the call log.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory that is put before the host's absolute paths.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The host's uuid.
    #[must_use]
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// What calls the scripts.
    #[must_use]
    pub fn runner(&self) -> &Runner {
        &self.runner
    }

    /// The mirrors that leave this host.
    #[must_use]
    pub fn wires(&self) -> &Wires {
        &self.wires
    }

    /// The socket of the HTTP server.
    #[must_use]
    pub fn http_socket(&self) -> PathBuf {
        self.root.join("var/run/xapi.sock")
    }

    /// Where the plugins keep their state until the host is off.
    #[must_use]
    pub fn runtime_dir(&self) -> PathBuf {
        self.root.join("run/xapi-storage-qcow2")
    }

    /// The number of the next domain. Hosts count alike, as real ones do.
    pub fn new_domid(&self) -> u32 {
        self.next_domid.fetch_add(1, Ordering::SeqCst)
    }

    /// Gives the host a new boot id, as switching it off and on would. What ran on it has to be killed by the caller.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn power_cycle(&self) -> Result<()> {
        layout::write_boot_id(&self.root)?;
        for dir in ["srs", "volumes", "mirrors"] {
            let _ = std::fs::remove_dir_all(self.runtime_dir().join(dir));
        }
        lock(&self.dps).clear();
        lock(&self.stat_cache).clear();
        Ok(())
    }

    /// Starts a task that ends with the host.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let handle = tokio::spawn(task).abort_handle();
        let mut tasks = lock(&self.tasks);
        tasks.retain(|t| !t.is_finished());
        tasks.push(handle);
    }

    /// What each plugin says of itself, or why it does not.
    pub async fn diagnostics(&self) -> Vec<String> {
        let volume = self.volume_plugins.values().map(|plugin| &plugin.dir);
        let mut texts = Vec::new();
        for dir in volume.chain(self.datapath_plugins.values().map(|plugin| &plugin.dir)) {
            let text = match self.runner.call(dir, &Request::diagnostics("OpaqueRef:diagnostics")).await {
                Ok(answer) => answer.string("diagnostics").unwrap_or_else(|error| error.to_string()),
                Err(failure) => failure.to_string(),
            };
            texts.push(format!("{} {}\n{text}", self.name, dir.display()));
        }
        texts
    }

    /// Stops the server and every proxy of this host.
    pub fn close(&self) {
        for task in lock(&self.tasks).drain(..) {
            task.abort();
        }
        lock(&self.forgotten).clear();
    }

    /// What the plugins of this host have running or lying about now.
    #[must_use]
    pub fn leftovers(&self) -> Leftovers {
        leftover::look(&self.root, &self.runtime_dir())
    }

    /// Kills the storage daemon of a volume; gives how many there were.
    pub fn kill_daemon(&self, volume: &str) -> usize {
        self.kill(|command| command.contains("qemu-storage-daemon") && command.contains(volume))
    }

    /// Kills the processes of this host's plugins whose command line is one that `matches`; gives how many there were.
    pub fn kill(&self, matches: impl Fn(&str) -> bool) -> usize {
        let mut killed = 0;
        for (pid, command) in self.leftovers().processes.into_iter().filter(|(_, command)| matches(command)) {
            tracing::warn!(pid, command, "killed");
            if let Some(pid) = Pid::from_raw(pid.cast_signed()) {
                killed += usize::from(kill_process(pid, Signal::KILL).is_ok());
            }
        }
        killed
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.close();
    }
}

/// Locks what only ever holds whole values, so that a panic elsewhere leaves nothing half-done.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
