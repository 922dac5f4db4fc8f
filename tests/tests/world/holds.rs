//! What must hold when no migration is under way: the side with the VM has it whole, the other side has nothing.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fake_xapi::disk::{Inventory, Links, Sr as SrFiles, Topology, model_holds};
use fake_xapi::guest::{Durability, Ledger, verify_export};
use fake_xapi::host::{Host, Leftovers};
use fake_xapi::nbd::Client;
use fake_xapi::plan::Disk;
use fake_xapi::smapiv2::Sr;
use fake_xapi::sxm::Flow;

use super::World;

const DBG: &str = "OpaqueRef:holds";
/// How long what a plugin left running may take to end by itself.
const PATIENCE: Duration = Duration::from_secs(12);
/// Records that the guest has to get written.
const RECORDS: u64 = 10;

impl World {
    /// All of it, with every acknowledged write.
    pub async fn all_is_well(&self) -> Result<()> {
        let stage = &self.stage;
        self.player.writes(RECORDS).await.context("the guest at its disk")?;
        self.has_nothing(&stage.destination, &stage.destination_sr, &stage.destination_path).await?;
        self.has_everything().await
    }

    /// An SR without volumes and node files, on a host where nothing runs.
    pub async fn has_nothing(&self, host: &Host, sr: &Sr, path: &Path) -> Result<()> {
        let name = host.name();
        let listed = host.sr_ls(DBG, sr).await?;
        ensure!(listed.is_empty(), "SR.ls on host {name} still has {listed:?}");
        let mut left = Inventory::of(path)?;
        if !left.is_empty() || !files_below(&path.join("trees"))?.is_empty() {
            // What a script that was killed has left is nobody's until somebody collects it.
            self.collect(host, sr, path).await?;
            left = Inventory::of(path)?;
        }
        ensure!(left.is_empty(), "left in the SR of host {name}: {:?}", left.beyond(&Inventory::default()));
        let files = files_below(&path.join("trees"))?;
        ensure!(files.is_empty(), "left in the SR of host {name}: {files:?}");
        self.nothing_runs(host, None).await
    }

    /// The SR that has the VM: volumes, topology, contents, and nothing beside them.
    async fn has_everything(&self) -> Result<()> {
        let stage = &self.stage;
        let (host, sr) = (&stage.source, &stage.source_sr);
        let known: BTreeSet<String> = stage.xapi.db().vdis_of(sr).map(|v| v.info.vdi.0.clone()).collect();
        let listed: BTreeSet<String> = host.sr_ls(DBG, sr).await?.into_iter().map(|v| v.key).collect();
        ensure!(listed == known, "SR.ls at the source has {listed:?}, not {known:?}");
        self.nothing_runs(host, Some(&self.leaf().0)).await?;
        let mut files = SrFiles::read(&stage.source_path)?;
        if !files.contradictions()?.is_empty() {
            self.collect(host, sr, &stage.source_path).await?;
            files = SrFiles::read(&stage.source_path)?;
        }
        let contradictions = files.contradictions()?;
        ensure!(contradictions.is_empty(), "{contradictions:?}");
        let recorded: BTreeSet<String> = files.volumes().map(str::to_owned).collect();
        ensure!(recorded == known, "the source's records have {recorded:?}, not {known:?}");
        self.topology_holds(&files)?;
        for name in self.model.snapshots() {
            let node = files.node_of(&self.snapshot(name).0)?;
            let disk = &self.model.disks_of(name).context("a snapshot without disks")?[0];
            if let Some(wrong) = model_holds(&node.image, disk, None)? {
                bail!("snapshot {name}: {wrong}");
            }
        }
        self.player.suspend_guest().await;
        let ledger = self.player.ledger().await;
        let client = Client::connect(&self.player.uri()).await?;
        disk_holds(&client, &self.model.disks()[0], &ledger).await?;
        let verdict = verify_export(&ledger, &client, Durability::Acknowledged).await?;
        client.disconnect().await;
        if let Some(first) = verdict.violations.first() {
            bail!("{} of {} blocks of the guest are wrong, {first}", verdict.wrong, verdict.checked);
        }
        self.player.go_on().await
    }

    /// Headers and records have each volume on its parent; the flow leaf has made each a tree of its own.
    fn topology_holds(&self, files: &SrFiles) -> Result<()> {
        let leaf = self.leaf();
        let name = |volume: &str| {
            if volume == leaf.0 {
                return Some("disk".to_owned());
            }
            self.model.snapshots().find(|name| self.snapshot(name).0 == volume).map(str::to_owned)
        };
        let own = |parent: Option<&str>| parent.map(str::to_owned);
        let wanted = self.model.snapshots().map(|name| (name.to_owned(), own(self.model.parent_of(name))));
        let same = Topology::new(wanted.chain([("disk".to_owned(), own(self.model.parent()))]));
        let flat = Topology::new(same.iter().map(|(name, _)| (name.to_owned(), None)));
        for links in [Links::Headers, Links::Records] {
            let found = Topology::of(files, links).renamed(name);
            let as_it_was = same.differences(&found).is_empty();
            let as_it_is_made = self.flow == Flow::Leaf && flat.differences(&found).is_empty();
            ensure!(as_it_was || as_it_is_made, "by {links:?}: {:?}", same.differences(&found));
        }
        Ok(())
    }

    /// Nothing of the plugins runs on a host but what serves one volume, and they have left no files but its own and
    /// the ends of mirrors.
    pub async fn nothing_runs(&self, host: &Host, but_for: Option<&str>) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = beyond(host.leftovers(), &host.runtime_dir(), but_for);
            if left.is_empty() {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "left on host {}: {left:?}", host.name());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// What is left beside one volume's daemon and files and, at the same side, beside records of mirrors that have ended:
/// Data.stat answers from them until the volume is destroyed.
fn beyond(left: Leftovers, runtime: &Path, but_for: Option<&str>) -> Leftovers {
    let Some(volume) = but_for else { return left };
    let left = left.without_ended_mirrors();
    let own = runtime.join("volumes").join(volume);
    let mut daemons = 0;
    let processes = left.processes.into_iter().filter(|(_, command)| {
        let is_daemon = command.contains("qemu-storage-daemon") && command.contains(volume);
        daemons += usize::from(is_daemon);
        !is_daemon || daemons > 1
    });
    Leftovers {
        processes: processes.collect(),
        sockets: left.sockets.into_iter().filter(|path| !Path::new(path).starts_with(&own)).collect(),
        files: left.files.into_iter().filter(|path| !path.starts_with(&own)).collect(),
    }
}

/// A disk read through its export holds what its history says, where the guest has not written.
async fn disk_holds(client: &Client, model: &Disk, guest: &Ledger) -> Result<()> {
    const PIECE: u64 = 4096;
    let size = client.export().size;
    ensure!(size == model.size(), "the disk has {size} bytes, not {}", model.size());
    for offset in (0..size).step_by(1 << 20) {
        let data = client.read(offset, (1 << 20).min(size - offset) as u32).await?;
        for (index, block) in data.chunks(PIECE as usize).enumerate() {
            let place = offset + index as u64 * PIECE;
            if let Err(wrong) = model.check(place, block)
                && !guest.may_have_changed(place)
            {
                bail!("the disk: {wrong}");
            }
        }
    }
    Ok(())
}

fn files_below(directory: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        found.push(entry?.path().display().to_string());
    }
    Ok(found)
}
