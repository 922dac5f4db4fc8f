//! Watches a migration: moves the guests with the VM, and judges while source and destination are both there.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::verdict::{Judged, Place};
use super::{Show, Stage, Subject};
use crate::db::{ActiveDisk, VmRef};
use crate::disk::{Pair, Shape};
use crate::guest::{Account, Guest, Latency, Ledger};
use crate::nbd::Uri;
use crate::smapiv2::Vdi;
use crate::sxm::{Event, Flow, Observer};

/// How long guests may take to get a few records written.
const PATIENCE: Duration = Duration::from_secs(60);

/// The observer of one migration.
pub struct Witness {
    place: Arc<Place>,
    show: Show,
    /// The source volumes.
    volumes: BTreeMap<String, Volume>,
    /// The guest of each disk; an asynchronous lock, because guests are started and suspended under it.
    guests: tokio::sync::Mutex<BTreeMap<usize, Guest>>,
    seen: Mutex<Seen>,
}

/// What a source volume is to the VM.
#[derive(Debug, Clone)]
pub(super) struct Volume {
    pub name: String,
    pub disk: usize,
    pub snapshot: Option<String>,
}

#[derive(Default)]
struct Seen {
    /// Where each source volume arrived.
    arrived: BTreeMap<String, String>,
    /// Where each disk is written now.
    uris: BTreeMap<usize, Uri>,
    accounts: BTreeMap<usize, Account>,
    ledgers: BTreeMap<usize, Ledger>,
    suspended: Option<Instant>,
    resumed: Option<Instant>,
    downtime: Option<Duration>,
    /// What happened when, but for progress.
    events: Vec<(Instant, Event)>,
    judged: Option<Result<Judged>>,
}

impl Witness {
    /// Knows the volumes of a VM before it is migrated.
    ///
    /// # Errors
    /// If there is no such VM.
    pub fn new(stage: &Stage, vm: VmRef, subject: Subject, flow: Flow, show: Show) -> Result<Self> {
        let mut guests = BTreeMap::new();
        for (disk, settings) in subject.guests().into_iter().enumerate() {
            if let Some(settings) = settings {
                guests.insert(disk, Guest::new(settings)?);
            }
        }
        let shape = if flow == Flow::Leaf { Shape::Flat } else { Shape::Same };
        let place =
            Place { subject, shape, source: stage.source_path.clone(), destination: stage.destination_path.clone() };
        Ok(Self {
            place: Arc::new(place),
            show,
            volumes: volumes(stage, vm)?,
            guests: tokio::sync::Mutex::new(guests),
            seen: Mutex::default(),
        })
    }

    /// Starts the guests on these disks.
    ///
    /// # Errors
    /// If a guest cannot reach its disk.
    pub async fn start_guests(&self, disks: &[ActiveDisk]) -> Result<()> {
        let mut guests = self.guests.lock().await;
        for active in disks {
            self.seen().uris.insert(active.index, active.uri.clone());
            if let Some(guest) = guests.get_mut(&active.index) {
                guest.start(&active.uri).await.with_context(|| format!("the guest of disk {}", active.index))?;
            }
        }
        Ok(())
    }

    /// Waits until every guest has got so many more records written.
    ///
    /// # Errors
    /// If one does not for long, or has stopped.
    pub async fn guests_write(&self, records: u64) -> Result<()> {
        let guests = self.guests.lock().await;
        for (disk, guest) in guests.iter().filter(|(_, guest)| guest.is_started()) {
            let wanted = guest.acknowledged() + records;
            let deadline = Instant::now() + PATIENCE;
            while guest.acknowledged() < wanted {
                ensure!(guest.is_writing(), "the guest of disk {disk} has stopped: {:?}", guest.account().errors);
                ensure!(Instant::now() < deadline, "the guest of disk {disk} gets nothing written");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        Ok(())
    }

    /// Suspends the guests and notes what they went through.
    pub async fn suspend_guests(&self) {
        let mut guests = self.guests.lock().await;
        for (disk, guest) in guests.iter_mut() {
            guest.suspend().await;
            let mut seen = self.seen();
            seen.accounts.insert(*disk, guest.account());
            seen.ledgers.insert(*disk, guest.ledger());
        }
    }

    /// What the guests went through, as of their last suspension.
    pub fn accounts(&self) -> Vec<Account> {
        self.seen().accounts.values().cloned().collect()
    }

    /// What the guests remember, as of their last suspension, and where each disk is now.
    pub fn ledgers(&self) -> Vec<(Ledger, Uri)> {
        let seen = self.seen();
        let with_uri = |(disk, ledger): (&usize, &Ledger)| Some((ledger.clone(), seen.uris.get(disk)?.clone()));
        seen.ledgers.iter().filter_map(with_uri).collect()
    }

    /// From the first guest that was asked to pause until the disks were usable again.
    pub fn downtime(&self) -> Option<Duration> {
        self.seen().downtime
    }

    /// Every volume that arrived, the VM's disks last.
    pub fn pairs(&self) -> Vec<Pair> {
        let seen = self.seen();
        let pair = |(source, volume): (&String, &Volume)| {
            let destination = seen.arrived.get(source)?.clone();
            Some((
                (volume.snapshot.is_none(), volume.name.clone()),
                Pair { name: volume.name.clone(), source: source.clone(), destination },
            ))
        };
        let sorted: BTreeMap<_, _> = self.volumes.iter().filter_map(pair).collect();
        sorted.into_values().collect()
    }

    /// The source volumes and what they are to the VM.
    pub(super) fn volumes(&self) -> &BTreeMap<String, Volume> {
        &self.volumes
    }

    /// What happened when, but for progress.
    pub(super) fn events(&self) -> Vec<(Instant, Event)> {
        self.seen().events.clone()
    }

    /// When the VM was suspended, and when its disks were usable again, if they ever were.
    pub(super) fn pause(&self) -> Option<(Instant, Option<Instant>)> {
        let seen = self.seen();
        Some((seen.suspended?, seen.resumed))
    }

    /// When the guest of each disk was made, and how long its commands took since.
    pub(super) async fn latencies(&self) -> Vec<(usize, Instant, Latency)> {
        let guests = self.guests.lock().await;
        guests.iter().map(|(disk, guest)| (*disk, guest.first_start(), guest.account().latency)).collect()
    }

    /// Snapshots at the destination, and the disks there that they are of.
    pub fn snapshots(&self) -> Vec<(String, String)> {
        let seen = self.seen();
        let leaves: BTreeMap<usize, &String> = self
            .volumes
            .iter()
            .filter(|(_, volume)| volume.snapshot.is_none())
            .filter_map(|(source, volume)| Some((volume.disk, seen.arrived.get(source)?)))
            .collect();
        let of = |(source, volume): (&String, &Volume)| {
            volume.snapshot.as_ref()?;
            Some((seen.arrived.get(source)?.clone(), (*leaves.get(&volume.disk)?).clone()))
        };
        self.volumes.iter().filter_map(of).collect()
    }

    /// Takes out what was judged at the switch.
    ///
    /// # Errors
    /// If it could not be judged, or was not.
    pub fn take_judged(&self) -> Result<Judged> {
        self.seen().judged.take().unwrap_or_else(|| bail!("the migration went past the moment to judge it"))
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything that a judge needs, by value.
    fn case(&self) -> impl FnOnce() -> Result<Judged> + Send + 'static {
        let place = Arc::clone(&self.place);
        let (pairs, volumes) = (self.pairs(), self.volumes.clone());
        let ledgers = self.seen().ledgers.clone();
        move || place.judge(&pairs, &volumes, &ledgers)
    }

    async fn resumed(&self, disks: Vec<ActiveDisk>) -> Result<()> {
        let back = disks.iter().any(|disk| self.volumes.contains_key(&disk.vdi.0));
        if !back {
            let judged = tokio::task::spawn_blocking(self.case()).await?;
            let mut seen = self.seen();
            seen.downtime = seen.suspended.map(|suspended| suspended.elapsed() - seconds_of(&judged));
            seen.judged = Some(judged);
        }
        self.seen().resumed = Some(Instant::now());
        self.start_guests(&disks).await
    }
}

impl Observer for Witness {
    fn event(&self, event: &Event) {
        if !matches!(event, Event::Progress { .. }) {
            self.seen().events.push((Instant::now(), event.clone()));
        }
        match event {
            Event::Arrived { source, destination } => {
                self.seen().arrived.insert(source.0.clone(), destination.0.clone());
            }
            // Nobody says that a live leaf has arrived: what it is mirrored to is what it becomes.
            Event::Started { source, destination }
                if self.volumes.get(&source.0).is_some_and(|volume| volume.snapshot.is_none()) =>
            {
                self.seen().arrived.insert(source.0.clone(), destination.0.clone());
            }
            // The last moment at which a halted VM's volumes are at both sides; a running one's were judged by now.
            Event::Phase("destroy source") if self.seen().judged.is_none() => {
                let judged = self.case()();
                self.seen().judged = Some(judged);
            }
            _ => {}
        }
        let name = subject_of(event).and_then(|source| self.volumes.get(&source.0)).map_or("", |volume| &volume.name);
        (self.show)(event, name);
    }

    fn suspend(&self) -> Pin<Box<dyn Future<Output = Result<()>> + Send + '_>> {
        Box::pin(async {
            self.seen().suspended = Some(Instant::now());
            self.suspend_guests().await;
            Ok(())
        })
    }

    fn resume(&self, disks: Vec<ActiveDisk>) -> Pin<Box<dyn Future<Output = Result<()>> + Send + '_>> {
        Box::pin(self.resumed(disks))
    }
}

/// The source volume that an event is about.
fn subject_of(event: &Event) -> Option<&Vdi> {
    match event {
        Event::Phase(_) => None,
        Event::Started { source, .. }
        | Event::Progress { source, .. }
        | Event::Complete { source }
        | Event::Arrived { source, .. } => Some(source),
    }
}

fn seconds_of(judged: &Result<Judged>) -> Duration {
    judged.as_ref().map_or(Duration::ZERO, |judged| judged.took)
}

fn volumes(stage: &Stage, vm: VmRef) -> Result<BTreeMap<String, Volume>> {
    let record = stage.xapi.vm(vm)?;
    let several = record.vbds.len() > 1;
    let name = |of: &str, disk: usize| if several { format!("{of}/{disk}") } else { of.to_owned() };
    let mut volumes = BTreeMap::new();
    for (disk, vbd) in record.vbds.iter().enumerate() {
        volumes.insert(vbd.vdi.0.clone(), Volume { name: name("disk", disk), disk, snapshot: None });
    }
    let db = stage.xapi.db();
    for (_, snapshot) in db.snapshots_of(vm) {
        for vbd in &snapshot.vbds {
            let disk = record.vbds.iter().position(|other| other.device == vbd.device);
            let disk = disk.with_context(|| format!("snapshot {} has a disk of its own", snapshot.name))?;
            let (name, snapshot) = (name(&snapshot.name, disk), Some(snapshot.name.clone()));
            volumes.insert(vbd.vdi.0.clone(), Volume { name, disk, snapshot });
        }
    }
    Ok(volumes)
}
