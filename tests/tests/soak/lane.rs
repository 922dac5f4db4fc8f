//! One VM and what happens to it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use fake_xapi::conformance::random::Random;
use fake_xapi::db::VmRef;
use fake_xapi::disk::{Links, Sr as SrFiles, Topology};
use fake_xapi::guest::Ledger;
use fake_xapi::smapiv2::{Dp, Vdi, Vm, nbd_server};
use fake_xapi::sxm;

use crate::disk::{Disks, settles};
use crate::site::{Side, Site};

const DBG: &str = "OpaqueRef:soak";
const MIB: u64 = 1 << 20;

/// The most snapshots of a VM.
const SNAPSHOTS: usize = 7;

/// The largest disk, in bytes.
const LARGEST: u64 = 12 * MIB;

/// How many of the last things that happened are told of a failure.
const TOLD: usize = 40;

/// What a snapshot holds and what it lies on.
struct Snapshot {
    parent: Option<String>,
    ledgers: Vec<Ledger>,
}

/// A VM, where it is, and what its volumes hold.
pub struct Lane {
    pub site: Arc<Site>,
    pub index: usize,
    pub random: Random,
    pub vm: VmRef,
    /// Which of the lane's two sides has it.
    pub at: usize,
    pub disks: Arc<Disks>,
    snapshots: BTreeMap<String, Snapshot>,
    parent: Option<String>,
    /// How many snapshots there ever were.
    taken: usize,
    done: BTreeMap<&'static str, usize>,
    story: Vec<String>,
}

impl Lane {
    /// Makes the VM and starts it.
    pub async fn new(site: Arc<Site>, index: usize, seed: u64) -> Result<Self> {
        let mut random = Random::from_seed(seed.wrapping_mul(31).wrapping_add(index as u64));
        let sizes: Vec<u64> = (0..=random.below(2)).map(|_| (2 + random.below(5) as u64) * MIB).collect();
        let side = site.sides[index][0].clone();
        let vm = site.xapi.vm_create(&format!("vm{index}"), &side.host, &side.sr, &sizes).await?;
        let disks = Arc::new(Disks::blank(&sizes, seed.wrapping_add(index as u64 * 1000))?);
        let lane = Self {
            site,
            index,
            random,
            vm,
            at: 0,
            disks,
            snapshots: BTreeMap::new(),
            parent: None,
            taken: 0,
            done: BTreeMap::new(),
            story: vec![format!("disks of {sizes:?} bytes")],
        };
        lane.start().await?;
        Ok(lane)
    }

    /// Has things happen until the time or, without one, that number is reached; then all goes, and nothing may be left.
    pub async fn live(&mut self, until: Option<Instant>, operations: usize) -> Result<()> {
        let mut count = 0;
        while until.map_or(count < operations, |until| Instant::now() < until) {
            count += 1;
            self.disks.writes(5).await.context("the guests at their disks")?;
            self.something().await?;
        }
        self.everything_holds().await?;
        self.disks.suspend().await;
        self.site.xapi.vm_destroy(self.vm).await
    }

    /// How often each thing happened.
    pub fn done(&self) -> BTreeMap<&'static str, usize> {
        self.done.clone()
    }

    /// Notes what happens, for whoever reads of a failure.
    pub fn tell(&mut self, what: String) {
        tracing::info!(lane = self.index, what);
        self.story.push(what);
    }

    /// The last things that happened, the last calls about this lane's SRs, and how the mirrors ended.
    pub async fn told(&self) -> String {
        let tail = |all: &[String]| all[all.len().saturating_sub(TOLD)..].join("\n  ");
        let srs = self.site.sides[self.index].iter().map(|side| side.sr.0.clone()).collect::<Vec<_>>();
        let about = |request: &str| srs.iter().any(|sr| request.contains(sr.as_str()));
        let calls = self.site.log.calls();
        let calls = calls.iter().filter(|call| about(&call.request.to_string())).map(|call| {
            let (host, method, at) = (&call.host, call.method, call.started.as_secs_f64());
            format!("{at:9.3} {host} {method} {:?} {:?}", call.fault, call.answer)
        });
        format!("  {}\n\n  {}", tail(&self.story), tail(&calls.collect::<Vec<_>>()))
    }

    /// Where the VM is.
    pub fn here(&self) -> Side {
        self.site.sides[self.index][self.at].clone()
    }

    /// Where it could be.
    pub fn there(&self) -> Side {
        self.site.sides[self.index][1 - self.at].clone()
    }

    async fn something(&mut self) -> Result<()> {
        let (name, result) = match self.random.below(20) {
            0..=4 => ("snapshot", self.snapshot().await),
            5..=6 => ("destroy", self.destroy().await),
            7 => ("revert", self.revert().await),
            8 => ("resize", self.resize().await),
            9 => ("clone", self.clone_one().await),
            10..=11 => ("verify", self.everything_holds().await),
            12 => ("restart", self.restart().await),
            13 => ("crash", self.crash_one().await),
            14 => ("collect", self.collect().await),
            15 => ("halted", self.look_at_files().await),
            _ => ("migrate", self.migrate().await),
        };
        *self.done.entry(name).or_default() += 1;
        result.with_context(|| name)
    }

    /// Perhaps orders that a script fails that is about the SR that has the VM.
    fn perhaps_a_break(&mut self) -> bool {
        if self.random.below(3) > 0 {
            return false;
        }
        let sr = self.here().sr;
        let told = self.site.breaks.a_script(&mut self.random, &[&sr]);
        self.tell(format!("  breaks: {told}"));
        true
    }

    fn breaks_no_more(&self) {
        self.site.breaks.none_of(&[&self.here().sr, &self.there().sr], &[]);
    }

    /// Does something that may be tried again as it is when something broke.
    async fn insist(&mut self, what: &str, broken: bool, act: impl AsyncFn(&Self) -> Result<()>) -> Result<()> {
        let first = act(self).await;
        self.breaks_no_more();
        if let Err(error) = first {
            ensure!(broken, "{what} failed although nothing broke: {error:#}");
            self.tell(format!("  {what}: {error:#}"));
            self.clean_by_hand().await?;
            act(self).await.with_context(|| format!("{what} once more, after {error:#}"))?;
        }
        Ok(())
    }

    /// What a user does behind xapi's clean-up: datapaths that belong to no running VM go, and volumes that no database
    /// knows.
    pub async fn clean_by_hand(&self) -> Result<()> {
        let domid = self.site.xapi.vm(self.vm)?.domid;
        let own = domid.map(|domid| format!("vbd/{domid}/"));
        for (index, side) in self.site.sides[self.index].iter().enumerate() {
            for (dp, info) in side.host.dp_list() {
                let is_own = index == self.at && own.as_ref().is_some_and(|own| dp.0.starts_with(own));
                if info.sr == side.sr && !is_own {
                    // A volume that is gone has no datapath either, which the caller sees.
                    let _ = side.host.dp_destroy(DBG, &dp).await;
                }
            }
            let swept = sxm::sweep(&self.site.xapi, &side.host, &side.sr).await?;
            ensure!(swept.iter().all(|one| one.error.is_none()), "{swept:?}");
        }
        Ok(())
    }

    async fn start(&self) -> Result<()> {
        let disks = self.site.xapi.vm_start(self.vm).await.context("VM.start")?;
        self.disks.start(&disks).await
    }

    /// Stops the VM, in an orderly way, whatever breaks.
    pub async fn halt(&mut self) -> Result<()> {
        self.disks.suspend().await;
        let broken = self.perhaps_a_break();
        self.insist("VM.shutdown", broken, async |lane| lane.site.xapi.vm_shutdown(lane.vm).await).await?;
        self.disks.closed().await;
        Ok(())
    }

    /// Starts it, whatever breaks.
    pub async fn boot(&mut self) -> Result<()> {
        let broken = self.perhaps_a_break();
        self.insist("VM.start", broken, async |lane| lane.start().await).await
    }

    async fn restart(&mut self) -> Result<()> {
        self.tell("restart".to_owned());
        self.halt().await?;
        self.boot().await
    }

    async fn snapshot(&mut self) -> Result<()> {
        if self.snapshots.len() == SNAPSHOTS {
            return self.destroy().await;
        }
        self.taken += 1;
        let name = format!("s{}", self.taken);
        let halted = self.random.below(4) == 0;
        self.tell(format!("snapshot {name}{}", if halted { ", halted" } else { "" }));
        if halted {
            self.halt().await?;
        }
        let broken = self.perhaps_a_break();
        let before = self.disks.before_snapshot().await;
        let result = self.site.xapi.vm_snapshot(self.vm, &name).await;
        let after = self.disks.after_snapshot().await;
        self.breaks_no_more();
        match result {
            Ok(_) => {
                let ledgers = before.iter().zip(&after).map(|(before, after)| Ledger::between(before, after));
                let parent = self.parent.replace(name.clone());
                self.snapshots.insert(name, Snapshot { parent, ledgers: ledgers.collect() });
            }
            Err(error) => {
                ensure!(broken, "VM.snapshot failed although nothing broke: {error:#}");
                self.tell(format!("  VM.snapshot: {error:#}"));
                self.clean_by_hand().await?;
            }
        }
        if halted { self.boot().await } else { Ok(()) }
    }

    /// One of the snapshots.
    fn some_snapshot(&mut self) -> Option<String> {
        let names: Vec<&String> = self.snapshots.keys().collect();
        if names.is_empty() { None } else { Some((**self.random.pick(&names)).clone()) }
    }

    /// The VM's snapshot of that name in the database.
    fn reference(&self, name: &str) -> Result<VmRef> {
        let found = self.site.xapi.db().snapshot_named(self.vm, name);
        found.with_context(|| format!("the database has no snapshot {name}"))
    }

    /// The volumes of a VM or a snapshot of it.
    pub fn volumes(&self, vm: VmRef) -> Result<Vec<Vdi>> {
        Ok(self.site.xapi.vm(vm)?.vbds.iter().map(|vbd| vbd.vdi.clone()).collect())
    }

    async fn destroy(&mut self) -> Result<()> {
        let Some(name) = self.some_snapshot() else { return Ok(()) };
        self.tell(format!("destroy {name}"));
        let snapshot = self.reference(&name)?;
        let (volumes, side) = (self.volumes(snapshot)?, self.here());
        let broken = self.perhaps_a_break();
        self.insist("VDI.destroy", broken, async |_| {
            // One that is gone by a call that was told to have failed is not known to xapi any more once it scans.
            let listed = side.host.sr_ls(DBG, &side.sr).await?;
            for volume in volumes.iter().filter(|volume| listed.iter().any(|one| one.key == volume.0)) {
                side.host.vdi_destroy(DBG, &side.sr, volume).await?;
            }
            Ok(())
        })
        .await?;
        {
            let mut db = self.site.xapi.db();
            for volume in &volumes {
                db.remove_vdi(volume);
            }
            db.remove_vm(snapshot);
        }
        let gone = self.snapshots.remove(&name).context("no such snapshot")?;
        let parents = self.snapshots.values_mut().map(|snapshot| &mut snapshot.parent);
        for parent in parents.chain([&mut self.parent]).filter(|parent| parent.as_ref() == Some(&name)) {
            parent.clone_from(&gone.parent);
        }
        Ok(())
    }

    async fn revert(&mut self) -> Result<()> {
        let Some(name) = self.some_snapshot() else { return Ok(()) };
        self.tell(format!("revert to {name}"));
        self.halt().await?;
        let snapshot = self.reference(&name)?;
        let broken = self.perhaps_a_break();
        self.insist("VM.revert", broken, async |lane| lane.site.xapi.vm_revert(snapshot).await).await?;
        self.disks.become_like(&self.snapshots[&name].ledgers).await?;
        self.parent = Some(name);
        self.boot().await
    }

    async fn resize(&mut self) -> Result<()> {
        let ledgers = self.disks.ledgers().await;
        let index = self.random.below(ledgers.len());
        let size = (ledgers[index].region().length + MIB / 2 * (1 + self.random.below(4) as u64)).min(LARGEST);
        self.tell(format!("resize disk {index} to {size}"));
        self.halt().await?;
        let broken = self.perhaps_a_break();
        self.insist("VDI.resize", broken, async |lane| lane.site.xapi.vdi_resize(lane.vm, index, size).await).await?;
        self.disks.grow(index, size).await?;
        self.boot().await
    }

    /// A clone of a snapshot holds what the snapshot does, and goes.
    async fn clone_one(&mut self) -> Result<()> {
        let Some(name) = self.some_snapshot() else { return Ok(()) };
        self.tell(format!("clone {name}"));
        let (volumes, side) = (self.volumes(self.reference(&name)?)?, self.here());
        let broken = self.perhaps_a_break();
        for (index, volume) in volumes.iter().enumerate() {
            let info = self.site.xapi.db().vdi(volume).context("a volume that is not known")?.info.clone();
            match side.host.vdi_clone(DBG, &side.sr, &info).await {
                Ok(clone) => {
                    self.breaks_no_more();
                    let ledger = &mut self.snapshots.get_mut(&name).context("no such snapshot")?.ledgers[index];
                    read(&side, &clone.vdi, ledger).await.with_context(|| format!("the clone of {name}"))?;
                    side.host.vdi_destroy(DBG, &side.sr, &clone.vdi).await?;
                }
                Err(error) => {
                    ensure!(broken, "VDI.clone failed although nothing broke: {error:#}");
                    self.tell(format!("  VDI.clone: {error:#}"));
                    self.breaks_no_more();
                    self.clean_by_hand().await?;
                }
            }
        }
        self.breaks_no_more();
        Ok(())
    }

    /// The daemon of a disk is killed, and the VM started anew.
    async fn crash_one(&mut self) -> Result<()> {
        let volumes = self.volumes(self.vm)?;
        let index = self.random.below(volumes.len());
        self.tell(format!("the daemon of disk {index} is killed"));
        let killed = self.here().host.kill_daemon(&volumes[index].0);
        ensure!(killed == 1, "{killed} daemons of disk {index}");
        self.disks.crash(index).await;
        self.reboot().await
    }

    /// The VM is stopped as well as that goes, and started again.
    pub async fn reboot(&mut self) -> Result<()> {
        self.disks.suspend().await;
        self.insist("VM.shutdown", true, async |lane| lane.site.xapi.vm_shutdown(lane.vm).await).await?;
        self.boot().await
    }

    /// Space is brought back, now and then by a worker that is killed in the middle.
    async fn collect(&mut self) -> Result<()> {
        self.tell("SR.attach once more".to_owned());
        let side = self.here();
        side.collect().await?;
        if self.random.below(2) == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(self.random.below(60) as u64)).await;
            let killed = side.host.kill(|command| command.contains("-volume") && command.contains(&side.sr.0));
            self.tell(format!("  {killed} workers were killed"));
        }
        Ok(())
    }

    /// Reads every byte of every volume by way of the datapath.
    pub async fn everything_holds(&mut self) -> Result<()> {
        self.tell("verify".to_owned());
        self.disks.suspend().await;
        self.disks.hold().await?;
        self.disks.go_on().await?;
        let side = self.here();
        let names: Vec<String> = self.snapshots.keys().cloned().collect();
        for name in names {
            let volumes = self.volumes(self.reference(&name)?)?;
            let snapshot = self.snapshots.get_mut(&name).context("no such snapshot")?;
            for (volume, ledger) in volumes.iter().zip(&mut snapshot.ledgers) {
                read(&side, volume, ledger).await.with_context(|| format!("snapshot {name}, {volume}"))?;
            }
        }
        Ok(())
    }

    /// With the VM halted, what the SR's files say: records, headers, links, space.
    async fn look_at_files(&mut self) -> Result<()> {
        self.tell("look at the files".to_owned());
        self.halt().await?;
        let side = self.here();
        side.collect().await?;
        let files = SrFiles::read(&side.path)?;
        let contradictions = files.contradictions()?;
        ensure!(contradictions.is_empty(), "{contradictions:?}");
        let damage = files.check()?;
        ensure!(damage.is_empty(), "{damage:?}");
        self.topology_holds(&files)?;
        self.no_space_is_lost(&side, &files)?;
        self.program_agrees(&side).await?;
        self.boot().await
    }

    fn topology_holds(&self, files: &SrFiles) -> Result<()> {
        let mut names = BTreeMap::new();
        for (index, volume) in self.volumes(self.vm)?.into_iter().enumerate() {
            names.insert(volume.0, format!("disk#{index}"));
        }
        for name in self.snapshots.keys() {
            for (index, volume) in self.volumes(self.reference(name)?)?.into_iter().enumerate() {
                names.insert(volume.0, format!("{name}#{index}"));
            }
        }
        let disks = self.volumes(self.vm)?.len();
        let wanted = (0..disks).flat_map(|index| {
            let on = move |parent: &Option<String>| parent.as_ref().map(|parent| format!("{parent}#{index}"));
            let snapshots =
                self.snapshots.iter().map(move |(name, one)| (format!("{name}#{index}"), on(&one.parent)));
            snapshots.chain([(format!("disk#{index}"), on(&self.parent))])
        });
        let wanted = Topology::new(wanted);
        for links in [Links::Headers, Links::Records] {
            let found = Topology::of(files, links).renamed(|volume| names.get(volume).cloned());
            let differences = wanted.differences(&found);
            ensure!(differences.is_empty(), "by {links:?}: {differences:?}");
        }
        Ok(())
    }

    /// No node is left that could be merged with its only child. Where sizes differ a node may have to stay.
    fn no_space_is_lost(&self, side: &Side, files: &SrFiles) -> Result<()> {
        let state = side.host.runtime_dir().join("gc").join(format!("{}.json", side.sr));
        let said = || std::fs::read_to_string(&state).unwrap_or_default();
        for tree in files.trees() {
            let sizes: BTreeSet<u64> = tree.nodes.values().map(|node| node.virtual_size).collect();
            let has_volume = |name: &String| tree.volumes.values().any(|node| node == name);
            for name in tree.nodes.keys().filter(|name| !has_volume(name)) {
                let children = tree.nodes.values().filter(|node| node.parent.as_ref() == Some(name)).count();
                let may_stay = children > 1 || sizes.len() > 1;
                ensure!(may_stay, "node {name} has no volume and {children} children: {tree:?} {}", said());
            }
        }
        Ok(())
    }

    /// The administrator's program finds nothing but what a killed daemon may leave, and frees that.
    async fn program_agrees(&self, side: &Side) -> Result<()> {
        for repair in [true, false] {
            let mut check =
                Command::new(Path::new(env!("CARGO_BIN_EXE_fake-xapi")).with_file_name("xapi-storage-qcow2"));
            check.arg("check").args(repair.then_some("--repair")).arg(&side.path);
            check.env("XAPI_STORAGE_QCOW2_ROOT", side.host.root());
            let output = tokio::task::spawn_blocking(move || check.output()).await??;
            let said = String::from_utf8_lossy(&output.stdout);
            let mends = said.lines().any(|line| line.starts_with("error") || line.starts_with("warning"));
            ensure!(!mends, "xapi-storage-qcow2 check: {output:?}");
            ensure!(repair || output.status.success(), "xapi-storage-qcow2 check, after --repair: {output:?}");
        }
        Ok(())
    }
}

/// Sees by a datapath of its own that a volume holds what it must.
async fn read(side: &Side, volume: &Vdi, ledger: &mut Ledger) -> Result<()> {
    let (dp, domain) = (Dp(format!("soak/{volume}")), Vm::from("0"));
    let attached = side.host.vdi_attach3(DBG, &dp, &side.sr, volume, &domain, false).await?;
    let result = async {
        side.host.vdi_activate3(DBG, &dp, &side.sr, volume, &domain).await?;
        settles(&nbd_server(&attached).context("no NBD server")?, ledger).await
    }
    .await;
    side.host.dp_destroy(DBG, &dp).await?;
    result
}
