//! Two hosts, a VM with snapshots and a guest that writes, to be migrated to and fro while a test breaks things.
//!
//! A migration that succeeds leaves the VM at the other side, which is then the source of the next one. What must hold
//! after each is in [`holds`]: of the side that has the VM, of the side that has nothing, of the guest.

#![allow(dead_code, unused_imports, reason = "each suite uses a part of it")]

pub mod holds;
mod player;
mod processes;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fake_xapi::db::VmRef;
use fake_xapi::host::{Host, write_settings};
use fake_xapi::plan::{self, Model, Plan};
use fake_xapi::scenario::{OnXapi, Stage, place_with};
use fake_xapi::smapiv2::{Sr, Vdi};
use fake_xapi::sxm::{self, Failed, Flow, Migrated, Migration};

pub use player::Player;
pub use processes::{daemons, kill_all, kill_daemon, kill_supervisors};

pub const FLOWS: [Flow; 3] = [Flow::Leaf, Flow::Tree, Flow::Base];

/// One snapshot and the disk on it.
pub const CHAIN: &str = r#"{"size": 2097152, "steps": [
    {"write": {"offset": 0, "length": 1048576, "seed": 1}}, {"snapshot": "a"},
    {"write": {"offset": 262144, "length": 786432, "seed": 2}}, {"discard": {"offset": 0, "length": 65536}}]}"#;

/// Two branches: a snapshot that was reverted from, and the disk.
pub const BRANCHES: &str = r#"{"size": 2097152, "steps": [
    {"write": {"offset": 0, "length": 1048576, "seed": 1}}, {"snapshot": "a"},
    {"write": {"offset": 262144, "length": 786432, "seed": 2}}, {"snapshot": "b"},
    {"revert": "a"}, {"zero": {"offset": 0, "length": 131072}},
    {"write": {"offset": 524288, "length": 786432, "seed": 3}}]}"#;

/// Short times, so that a peer that hangs is given up soon.
const SETTINGS: &str = r#"{"handshake_seconds": 3, "peer_silence_seconds": 2,
    "drain_seconds": 3, "qmp_seconds": 5, "lock_seconds": 10}"#;

/// Bytes that must be free in memory, as what a loss of power does is not what breaks here, for worlds to be there.
const ROOM: u64 = 512 << 20;

/// The executables are built beside fake-xapi itself.
pub fn binaries() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_fake-xapi")).parent().unwrap().to_owned()
}

/// What a failed migration failed with.
pub fn told(failed: &Failed) -> String {
    let Failed { error, phase, swept, restarted, .. } = failed;
    format!("after {error} in {phase}, restarted {restarted}, swept {swept:?}")
}

/// A VM that runs at the source.
pub struct World {
    pub stage: Stage,
    pub vm: VmRef,
    pub model: Model,
    pub player: Player,
    pub flow: Flow,
}

impl World {
    /// Makes the hosts, gives the VM its history and starts the guest.
    pub async fn build(plan: &str, flow: Flow) -> Result<Self> {
        Self::installed(&binaries(), plan, flow).await
    }

    /// The same with plugins that are installed somewhere ([`fake_xapi::host::PluginSource::at`]).
    pub async fn installed(plugins: &Path, plan: &str, flow: Flow) -> Result<Self> {
        Self::on(Self::stage(plugins).await?, plan, flow).await
    }

    /// Makes the hosts and their SRs.
    pub async fn stage(plugins: &Path) -> Result<Stage> {
        let stage = Stage::build(plugins, false, place_with(ROOM)).await?;
        for host in [&stage.source, &stage.destination] {
            write_settings(host.root(), SETTINGS)?;
        }
        Ok(stage)
    }

    /// Makes the VM at the source of a stage, with its history, and starts the guest.
    pub async fn on(stage: Stage, plan: &str, flow: Flow) -> Result<Self> {
        let plan = Plan::parse(plan.as_bytes())?;
        let model = plan.model()?;
        let vm = stage.xapi.vm_create("vm", &stage.source, &stage.source_sr, &plan.disks).await?;
        let player = Player::new(model.disks()[0].size())?;
        let world = Self { stage, vm, model, player, flow };
        let mut machine = OnXapi::new(&world.stage.xapi, vm, false);
        plan::run(&plan, &mut machine, |_| {}).await.context("the VM's history")?;
        let disks = machine.running().await?;
        world.player.start(&disks).await?;
        world.player.writes(10).await?;
        Ok(world)
    }

    /// A migration to the other side.
    pub fn migration(&self) -> Migration {
        let Stage { destination, destination_sr, .. } = &self.stage;
        let poll = Duration::from_millis(10);
        Migration { poll, ..Migration::new(self.vm, destination, destination_sr, self.flow) }
    }

    /// Migrates the VM.
    pub async fn migrate(&self) -> Result<Migrated, Box<Failed>> {
        sxm::migrate(&self.stage.xapi, &self.migration(), &self.player).await
    }

    /// Migrates the VM, which must succeed and leave everything as it should be; the sides are changed after it.
    pub async fn migrate_well(&mut self) -> Result<Migrated> {
        let migrated = self.migrate().await.map_err(|failed| anyhow::anyhow!(told(&failed)))?;
        self.change_sides();
        self.all_is_well().await.context("after a migration that nothing disturbed")?;
        Ok(migrated)
    }

    /// The side that has the VM is the source from now on.
    pub fn change_sides(&mut self) {
        let stage = &mut self.stage;
        std::mem::swap(&mut stage.source, &mut stage.destination);
        std::mem::swap(&mut stage.source_sr, &mut stage.destination_sr);
        std::mem::swap(&mut stage.source_path, &mut stage.destination_path);
    }

    /// The volume of the VM's disk.
    pub fn leaf(&self) -> Vdi {
        self.stage.xapi.vm(self.vm).unwrap().vbds[0].vdi.clone()
    }

    /// The volume of one of its snapshots.
    pub fn snapshot(&self, name: &str) -> Vdi {
        let db = self.stage.xapi.db();
        let snapshot = db.snapshot_named(self.vm, name).unwrap();
        db.vm(snapshot).unwrap().vbds[0].vdi.clone()
    }

    /// The guest's disk is gone with its daemon: the VM is stopped as well as that goes, and started again.
    pub async fn reboot(&self) -> Result<()> {
        self.player.crash().await;
        if self.stage.xapi.vm_shutdown(self.vm).await.is_err() {
            // Datapath.deactivate says once that the mirror broke.
            self.stage.xapi.vm_shutdown(self.vm).await?;
        }
        let disks = self.stage.xapi.vm_start(self.vm).await?;
        self.player.start(&disks).await
    }

    /// What a user does after failures of xapi's own clean-up: datapaths that belong to no VM are destroyed, and volumes
    /// that no database knows.
    pub async fn clean_by_hand(&self) -> Result<()> {
        let stage = &self.stage;
        let domid = stage.xapi.vm(self.vm)?.domid.unwrap_or_default();
        for (host, sr) in [(&stage.source, &stage.source_sr), (&stage.destination, &stage.destination_sr)] {
            for (dp, _) in host.dp_list() {
                if !Arc::ptr_eq(host, &stage.source) || !dp.0.starts_with(&format!("vbd/{domid}/")) {
                    // A volume that is gone by now has no datapath either, which the caller sees for itself.
                    let _ = host.dp_destroy("OpaqueRef:hand", &dp).await;
                }
            }
            let swept = sxm::sweep(&stage.xapi, host, sr).await?;
            ensure!(swept.iter().all(|one| one.error.is_none()), "{swept:?}");
        }
        Ok(())
    }

    /// A pass of garbage collection on an SR: SR.attach of an attached SR is one.
    pub async fn collect(&self, host: &Host, sr: &Sr, path: &Path) -> Result<()> {
        let config = [("uri".to_owned(), format!("file://{}", path.display()))];
        host.sr_attach("OpaqueRef:collect", "qcow2", sr, &config).await?;
        Ok(())
    }

    /// Stops the VM and takes everything down; nothing may be left.
    pub async fn close(self) -> Result<()> {
        self.player.suspend_guest().await;
        self.stage.xapi.vm_shutdown(self.vm).await?;
        for host in [&self.stage.source, &self.stage.destination] {
            self.nothing_runs(host, None).await?;
        }
        Ok(())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for host in [&self.stage.source, &self.stage.destination] {
            processes::kill_all(host);
        }
    }
}
