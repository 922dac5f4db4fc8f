//! A host and an SR for one check: typed calls with strictly decoded answers, and the clean-up that is a check itself.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use tempfile::TempDir;
use uuid::Uuid;

use super::raw::{self, Printed};
use super::subject::DIRECTORY;
use super::{Need, Subject, answer, invariant};
use crate::host::{Host, Leftovers, lock};
use crate::nbd::{Client, Uri};
use crate::script::{CallLog, script_path};
use crate::wire::{Attached, Failure, Json, MirrorStatus, Operation, Request, SrStat, Volume};

/// What xapi would put here: the task's reference.
pub const DBG: &str = "OpaqueRef:conformance";
/// Bytes of a mebibyte.
pub const MIB: i64 = 1 << 20;

/// What a check works with.
#[derive(Debug)]
pub struct Bench {
    /// The host.
    pub host: Arc<Host>,
    /// What is judged.
    pub subject: Subject,
    /// The SR that is attached to it.
    pub sr: AttachedSr,
    volume_dir: PathBuf,
    /// The datapaths that may have to be taken down.
    used: Mutex<BTreeSet<(String, String)>>,
    /// The device-configs of the SRs that may have to be destroyed.
    made: Mutex<Vec<Vec<(String, String)>>>,
    directory: TempDir,
}

/// A check needs an SR more than there is a place for.
#[derive(Debug, thiserror::Error)]
#[error("the device-config names one place, and a second SR needs {DIRECTORY} in it")]
pub(super) struct OneSrOnly;

/// A datapath shows its bytes by no NBD server, which xapi asks for in migrations alone.
#[derive(Debug, thiserror::Error)]
#[error("Datapath.attach answers no Nbd, by which the bytes are looked at")]
pub(super) struct NoNbd;

/// No datapath plugin lies beside the volume plugin.
#[derive(Debug, thiserror::Error)]
#[error("there is no datapath plugin")]
pub(super) struct NoDatapath;

/// An SR and how to get at it.
#[derive(Debug, Clone)]
pub struct AttachedSr {
    /// What `SR.attach` answered.
    pub sr: String,
    /// Its uuid.
    pub uuid: String,
    /// The directory that it was given.
    pub path: PathBuf,
    /// Its device-config, as `SR.create` answered it.
    pub config: Vec<(String, String)>,
}

impl Bench {
    /// Makes a host and an SR that is attached to it.
    ///
    /// # Errors
    /// If the plugin does not.
    pub async fn new(subject: &Subject) -> Result<Self> {
        // Unix sockets have short names.
        let directory = tempfile::Builder::new().prefix("fx-").tempdir_in("/tmp")?;
        let host = Host::start("a", &directory.path().join("a"), &subject.plugins, &CallLog::default()).await?;
        let volume_dir = host.volume_plugin(&subject.sr_type)?.dir.clone();
        let nowhere = AttachedSr { sr: String::new(), uuid: String::new(), path: PathBuf::new(), config: Vec::new() };
        host.runner().trace(subject.traced);
        let (used, made) = (Mutex::default(), Mutex::default());
        let mut bench = Self { host, subject: subject.clone(), sr: nowhere, volume_dir, used, made, directory };
        bench.sr = bench.new_sr("s").await?;
        Ok(bench)
    }

    /// Everything of this check is below here.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Creates and attaches another SR.
    pub async fn new_sr(&self, name: &str) -> Result<AttachedSr> {
        let place = self.new_place(name)?;
        let path = self.directory.path().join(name);
        let uuid = Uuid::new_v4().to_string();
        let request = Request::sr_create(DBG, &uuid, &place, "an SR", "for a check");
        // One without is for SRs that others have made.
        let config = match self.subject.lacks(Need::Method("SR.create")) {
            Some(_) => place,
            None => self.call(&request).await?.string_map("SR.create")?,
        };
        lock(&self.made).push(config.clone());
        let sr = self.attach_sr(&config).await?;
        Ok(AttachedSr { sr, uuid, path, config })
    }

    /// Makes a place for another SR and gives the device-config of one in it.
    ///
    /// # Errors
    /// `OneSrOnly`, which skips the check, where a device-config can name one place alone.
    pub fn new_place(&self, name: &str) -> Result<Vec<(String, String)>> {
        let path = self.directory.path().join(name);
        let place = self.subject.config_in(&path);
        if place == self.subject.config && !lock(&self.made).is_empty() {
            return Err(OneSrOnly.into());
        }
        std::fs::create_dir(&path)?;
        Ok(place)
    }

    /// `SR.attach`
    pub async fn attach_sr(&self, config: &[(String, String)]) -> Result<String> {
        Ok(self.call(&Request::sr_attach(DBG, config)).await?.string("SR.attach")?)
    }

    /// The script of a method.
    pub fn script(&self, method: &str) -> Result<PathBuf> {
        Ok(script_path(self.directory_of(method, None)?, method)?)
    }

    fn directory_of(&self, method: &str, uri: Option<&str>) -> Result<&Path> {
        // xapi calls no Task methods; whichever plugin has them has the operations.
        let is_task = method.starts_with("Task.") && script_path(&self.volume_dir, method).is_err();
        if !method.starts_with("Data") && !is_task {
            return Ok(&self.volume_dir);
        }
        // By the scheme as xapi-storage-script does it, and the only one where there is none to go by.
        let scheme = uri.and_then(|uri| uri.split_once(':')).map(|(scheme, _)| scheme);
        let plugins = &self.host.datapath_plugins;
        let chosen = scheme.and_then(|s| plugins.get(s)).or_else(|| plugins.values().next());
        Ok(&chosen.ok_or(NoDatapath)?.dir)
    }

    /// Calls a script; the answer is decoded as the daemon would.
    pub async fn call(&self, request: &Request) -> Result<Json> {
        self.note(request);
        let dir = self.directory_of(request.method, request.text("uri"))?;
        let called = self.host.runner().call(dir, request).await;
        let answer = called.map_err(|failure| anyhow::Error::new(failure).context(request.method))?;
        answer::decode(request.method, &answer).with_context(|| format!("{}'s answer", request.method))?;
        Ok(answer)
    }

    /// Calls a script with any bytes.
    pub async fn raw(&self, method: &str, input: &[u8]) -> Result<Printed> {
        raw::run(&self.script(method)?, self.host.root(), input, "", "").await
    }

    /// Remembers the datapath that a call may set up.
    fn note(&self, request: &Request) {
        if let (Some(uri), Some(domain)) = (request.text("uri"), request.text("domain")) {
            lock(&self.used).insert((uri.to_owned(), domain.to_owned()));
        }
    }

    /// `SR.ls`
    pub async fn ls(&self) -> Result<Vec<Volume>> {
        let mut volumes = Volume::decode_list(&self.call(&Request::sr("SR.ls", DBG, &self.sr.sr)).await?)?;
        volumes.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(volumes)
    }

    /// `SR.stat`
    pub async fn sr_stat(&self) -> Result<SrStat> {
        Ok(SrStat::decode(&self.call(&Request::sr("SR.stat", DBG, &self.sr.sr)).await?, "stat")?)
    }

    /// `Volume.create` of so many bytes.
    pub async fn create(&self, size: i64) -> Result<Volume> {
        self.made(&Request::volume_create(DBG, &self.sr.sr, "a disk", "for a check", size, false)).await
    }

    /// A call that makes a volume, with the URI that its datapath will be called by: xapi asks Volume.stat for it each
    /// time, and does not use the one in this answer (ocaml/xapi-storage-script/main.ml).
    pub(super) async fn made(&self, request: &Request) -> Result<Volume> {
        let volume = self.volume_answer(request).await?;
        // This project's are the same, for which there is a check.
        if self.subject.own_layout {
            return Ok(volume);
        }
        Ok(Volume { uri: self.stat(&volume.key).await?.uri, ..volume })
    }

    /// A call that answers a volume.
    pub async fn volume_answer(&self, request: &Request) -> Result<Volume> {
        Ok(Volume::decode(&self.call(request).await?, request.method)?)
    }

    /// `Volume.stat`
    pub async fn stat(&self, key: &str) -> Result<Volume> {
        self.volume_answer(&Request::volume("Volume.stat", DBG, &self.sr.sr, key)).await
    }

    /// `Volume.snapshot`
    pub async fn snapshot(&self, key: &str) -> Result<Volume> {
        self.made(&Request::volume("Volume.snapshot", DBG, &self.sr.sr, key)).await
    }

    /// `Volume.clone`
    pub async fn clone_of(&self, key: &str) -> Result<Volume> {
        self.made(&Request::volume("Volume.clone", DBG, &self.sr.sr, key)).await
    }

    /// `Volume.destroy`
    pub async fn destroy(&self, key: &str) -> Result<()> {
        self.call(&Request::volume("Volume.destroy", DBG, &self.sr.sr, key)).await.map(drop)
    }

    /// `Volume.resize`
    pub async fn resize(&self, key: &str, size: i64) -> Result<()> {
        self.call(&Request::volume_resize(DBG, &self.sr.sr, key, size)).await.map(drop)
    }

    /// `Volume.set`
    pub async fn set(&self, key: &str, k: &str, v: &str) -> Result<()> {
        self.call(&Request::volume_set(DBG, &self.sr.sr, key, k, v)).await.map(drop)
    }

    /// `Volume.unset`
    pub async fn unset(&self, key: &str, k: &str) -> Result<()> {
        self.call(&Request::volume_unset(DBG, &self.sr.sr, key, k)).await.map(drop)
    }

    /// `Datapath.attach`
    pub async fn attach(&self, volume: &Volume, domain: &str) -> Result<Attached> {
        let request = Request::datapath("Datapath.attach", DBG, uri_of(volume)?, domain);
        Ok(Attached::decode(&self.call(&request).await?)?)
    }

    /// `Datapath.activate`, `activate_readonly`, `deactivate` or `detach`
    pub async fn datapath(&self, method: &'static str, volume: &Volume, domain: &str) -> Result<()> {
        self.call(&Request::datapath(method, DBG, uri_of(volume)?, domain)).await.map(drop)
    }

    /// `Datapath.activate`
    pub async fn activate(&self, volume: &Volume, domain: &str) -> Result<()> {
        self.datapath("Datapath.activate", volume, domain).await
    }

    /// `Datapath.deactivate` and then `Datapath.detach`
    pub async fn unplug(&self, volume: &Volume, domain: &str) -> Result<()> {
        self.datapath("Datapath.deactivate", volume, domain).await?;
        self.datapath("Datapath.detach", volume, domain).await
    }

    /// Attaches and activates a volume for writing.
    pub async fn start(&self, volume: &Volume, domain: &str) -> Result<Attached> {
        let attached = self.attach(volume, domain).await?;
        self.activate(volume, domain).await?;
        Ok(attached)
    }

    /// Attaches and activates a volume for writing, and says where its NBD server is.
    pub async fn plug(&self, volume: &Volume, domain: &str) -> Result<Uri> {
        nbd_of(&self.start(volume, domain).await?)
    }

    /// Attaches a volume, activates it read-only, and says where its NBD server is.
    pub async fn plug_readonly(&self, volume: &Volume, domain: &str) -> Result<Uri> {
        let attached = self.attach(volume, domain).await?;
        self.datapath("Datapath.activate_readonly", volume, domain).await?;
        nbd_of(&attached)
    }

    /// Writes bytes as a guest would that is started and shut down for it.
    pub async fn write(&self, volume: &Volume, offset: u64, length: usize, byte: u8) -> Result<()> {
        let client = Client::connect(&self.plug(volume, "7").await?).await?;
        client.write(offset, Bytes::from(vec![byte; length])).await?;
        client.flush().await?;
        client.disconnect().await;
        self.unplug(volume, "7").await
    }

    /// Sees that a volume has these stretches of one byte each and zeroes everywhere else, read through a datapath
    /// of its own and, where the files are known, by qemu-img.
    pub async fn expect_content(&self, volume: &Volume, stretches: &[(u64, usize, u8)]) -> Result<()> {
        let client = Client::connect(&self.plug_readonly(volume, "CP0dd5ee").await?).await?;
        let size = client.export().size;
        let mut expected = vec![0u8; usize::try_from(size)?];
        for (offset, length, byte) in stretches {
            expected[*offset as usize..][..*length].fill(*byte);
        }
        let mut offset = 0;
        while offset < size {
            let length = (size - offset).min(MIB as u64);
            let read = client.read(offset, length as u32).await?;
            let place = read.iter().zip(&expected[offset as usize..]).position(|(a, b)| a != b);
            if let Some(place) = place {
                let (at, found) = (offset + place as u64, read[place]);
                bail!("{}: byte {at} is {found:#x}, not {:#x}", volume.key, expected[at as usize]);
            }
            offset += length;
        }
        client.disconnect().await;
        self.unplug(volume, "CP0dd5ee").await?;
        if self.subject.own_layout {
            invariant::image_holds(&self.sr.path, &volume.key, &expected)?;
        }
        Ok(())
    }

    /// `Data.mirror`
    pub async fn mirror(&self, volume: &Volume, domain: &str, remote: &str) -> Result<Operation> {
        let request = Request::data_mirror(DBG, uri_of(volume)?, domain, remote);
        Ok(Operation::decode(&self.call(&request).await?)?)
    }

    /// `Data.stat`
    pub async fn data_stat(&self, operation: &Operation) -> Result<MirrorStatus> {
        Ok(MirrorStatus::decode(&self.call(&Request::data("Data.stat", DBG, operation)).await?)?)
    }

    /// Asks until an operation is complete or has failed.
    pub async fn data_wait(&self, operation: &Operation) -> Result<MirrorStatus> {
        let asked = async {
            loop {
                let status = self.data_stat(operation).await?;
                ensure!(!(status.complete && status.failed), "complete and failed at once: {status:?}");
                if status.complete || status.failed {
                    return Ok(status);
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(25), asked)
            .await
            .context("the mirror neither completes nor fails")?
    }

    /// Why mirrors have failed, where this project's plugin has remembered it: Data.stat has no field for that.
    pub(super) fn mirror_reasons(&self) -> String {
        let mut reasons = String::new();
        let mirrors = self.host.runtime_dir().join("mirrors");
        for entry in std::fs::read_dir(mirrors).into_iter().flatten().flatten() {
            let record = std::fs::read(entry.path().join("state.json")).unwrap_or_default();
            let record: serde_json::Value = serde_json::from_slice(&record).unwrap_or_default();
            let (phase, reason) = (&record["phase"], &record["reason"]);
            reasons.push_str(&format!("\na mirror's record says {phase}, because of {reason}"));
        }
        reasons
    }

    /// Takes down and destroys everything, and sees that nothing is left of it.
    pub(super) async fn finish(&self) -> Result<()> {
        let used = std::mem::take(&mut *lock(&self.used));
        for method in ["Datapath.deactivate", "Datapath.detach"] {
            for (uri, domain) in &used {
                // Made-up names were remembered too: whether those are refused is no matter here.
                let request = Request::datapath(method, DBG, uri, domain);
                let _ = self.host.runner().call(self.directory_of(method, Some(uri))?, &request).await;
            }
        }
        for volume in self.ls().await? {
            self.take_down(&volume, &used).await;
            self.destroy(&volume.key).await?;
        }
        let left = self.ls().await?;
        ensure!(left.is_empty(), "SR.ls lists destroyed volumes: {left:?}");
        if self.subject.own_layout {
            invariant::nothing_on_disk(&self.sr.path)?;
        }
        self.call(&Request::sr("SR.detach", DBG, &self.sr.sr)).await?;
        if self.subject.own_layout {
            let left = leftovers(&self.host).await;
            ensure!(left.is_empty(), "left over: {left:?}");
            return Ok(());
        }
        if self.subject.lacks(Need::Method("SR.destroy")).is_some() {
            return Ok(());
        }
        // As xapi does it: SR.destroy is of an SR that was attached for it.
        let sr = self.attach_sr(&self.sr.config).await?;
        self.call(&Request::sr("SR.destroy", DBG, &sr)).await.map(drop)
    }

    /// Takes down what calls have set up that were not remembered: those that were printed by hand, or made several
    /// things at once. This project's is known to have none left.
    async fn take_down(&self, volume: &Volume, used: &BTreeSet<(String, String)>) {
        if self.subject.own_layout {
            return;
        }
        let domains: BTreeSet<&str> = used.iter().map(|(_, domain)| domain.as_str()).chain(["7"]).collect();
        for domain in domains {
            for method in ["Datapath.deactivate", "Datapath.detach"] {
                if let Ok(uri) = uri_of(volume) {
                    let _ = self.call(&Request::datapath(method, DBG, uri, domain)).await;
                }
            }
        }
    }

    /// Takes away what a check that failed has left, as far as the plugin lets it. SRs that are directories go with
    /// the check's own.
    pub(super) async fn tidy(&self) {
        if self.subject.own_layout {
            return;
        }
        let used = std::mem::take(&mut *lock(&self.used));
        for method in ["Datapath.deactivate", "Datapath.detach"] {
            for (uri, domain) in &used {
                let _ = self.call(&Request::datapath(method, DBG, uri, domain)).await;
            }
        }
        let made = lock(&self.made).clone();
        for config in made {
            let Ok(sr) = self.attach_sr(&config).await else { continue };
            let listed = self.call(&Request::sr("SR.ls", DBG, &sr)).await;
            for volume in listed.ok().and_then(|answer| Volume::decode_list(&answer).ok()).unwrap_or_default() {
                self.take_down(&volume, &used).await;
                let _ = self.call(&Request::volume("Volume.destroy", DBG, &sr, &volume.key)).await;
            }
            let _ = self.call(&Request::sr("SR.destroy", DBG, &sr)).await;
        }
    }

    /// Kills what a failed check has left running on this host. Another plugin may have one daemon for everything.
    pub async fn end_what_is_left(&self) {
        if !self.subject.own_layout {
            self.host.close();
            return;
        }
        self.host.kill(|_| true);
        self.host.close();
    }
}

/// What is left on a host. A socket of a process that is gone does not count if it goes as well: io_uring lets go of the
/// descriptors of an ended process in its own time.
pub async fn leftovers(host: &Host) -> Leftovers {
    let mut left = host.leftovers();
    for _ in 0..500 {
        if left.sockets.is_empty() || !left.processes.is_empty() || !left.files.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        left = host.leftovers();
    }
    left
}

/// The URI by which datapaths find a volume.
pub fn uri_of(volume: &Volume) -> Result<&str> {
    Ok(volume.uri.first().with_context(|| format!("volume {} has no uri", volume.key))?)
}

/// The NBD server that xapi would use.
pub fn nbd_of(attached: &Attached) -> Result<Uri> {
    Ok(Uri::parse(attached.nbd().ok_or(NoNbd)?)?)
}

/// The failure of a call that has to be refused by the plugin itself, in a well-formed way.
pub fn refused<T: std::fmt::Debug>(called: Result<T>) -> Result<Failure> {
    match called {
        Ok(answer) => bail!("it was not refused, but answered {answer:?}"),
        Err(error) => match error.downcast_ref::<Failure>() {
            Some(failure) if failure.backtrace.is_some() => {
                ensure!(!failure.code.is_empty(), "the error has no code: {failure:?}");
                Ok(failure.clone())
            }
            _ => Err(error.context("it was not refused with a well-formed error")),
        },
    }
}

/// Sees that a call is refused with a code.
pub fn refused_with<T: std::fmt::Debug>(called: Result<T>, code: &str) -> Result<Failure> {
    let failure = refused(called)?;
    ensure!(failure.code == code, "refused with {failure}, not with {code}");
    Ok(failure)
}

/// Polls a condition until it holds; a bound is for when it never will.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    for _ in 0..2000 {
        if holds() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    bail!("20 seconds and not yet: {what}")
}
