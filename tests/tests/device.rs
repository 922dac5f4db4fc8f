//! Volumes as block devices of this kernel: a file system on one, written to by fio, is snapshotted and migrated.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fake_xapi::db::{ActiveDisk, VmRef};
use fake_xapi::host::{Host, write_settings};
use fake_xapi::scenario::{Stage, place_with};
use fake_xapi::smapiv2::{Dp, Sr, Vdi, Vm};
use fake_xapi::sxm::{self, Event, Flow, Migration, Observer};

/// What an observer gives back.
type Answer<'a> = Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send + 'a>>;

const DBG: &str = "OpaqueRef:device";

/// The variable that says what devices are made with, which tests/machine.sh sets: `nbd`, or by default `loop`.
const DRIVER: &str = "TESTED_DEVICE";

/// The disk's size, in bytes.
const SIZE: u64 = 32 << 20;

/// How long fio may take to get one round done.
const PATIENCE: Duration = Duration::from_secs(60);

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
    said
}

/// Where the block device of a volume is.
fn device(host: &Host, volume: &Vdi) -> PathBuf {
    host.root().join("dev/xapi-storage-qcow2").join(&volume.0)
}

/// A mounted file system, unmounted when this is dropped.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(device: &Path) -> Self {
        let directory = tempfile::Builder::new().prefix("dv-").tempdir().unwrap();
        run(Command::new("mount").args(["-o", "discard"]).arg(device).arg(directory.path()));
        Self(directory)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Files and their checksums.
    fn sums(&self) -> BTreeMap<String, String> {
        let files = fs::read_dir(self.path()).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.is_file()).map(|path| (path.display().to_string(), sum(&path))).map(named).collect()
    }

    fn unmount(self) {
        run(Command::new("umount").arg(self.path()));
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-q", "-l"]).arg(self.path()).status();
    }
}

/// Leaves out where a file is.
fn named((path, sum): (String, String)) -> (String, String) {
    (path.rsplit('/').next().unwrap().to_owned(), sum)
}

fn sum(path: &Path) -> String {
    run(Command::new("sha256sum").arg(path)).split(' ').next().unwrap().to_owned()
}

/// fio on a file system, one round after the other, each of which reads back and checks what it wrote.
struct Load {
    mounted: Mutex<Option<Mounted>>,
    worker: Mutex<Option<std::thread::JoinHandle<()>>>,
    rounds: Arc<AtomicU32>,
    stop: Arc<AtomicU32>,
    /// What the file system held when it was unmounted.
    held: Mutex<BTreeMap<String, String>>,
    /// The rounds that were over when the first pass of the live disk's mirror was complete.
    complete: AtomicU32,
}

impl Load {
    fn on(mounted: Mounted) -> Self {
        let (rounds, stop) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let worker = {
            let (rounds, stop, directory) = (Arc::clone(&rounds), Arc::clone(&stop), mounted.path().to_owned());
            std::thread::spawn(move || {
                while stop.load(Ordering::SeqCst) == 0 {
                    round(&directory, rounds.load(Ordering::SeqCst));
                    rounds.fetch_add(1, Ordering::SeqCst);
                }
            })
        };
        Self {
            mounted: Mutex::new(Some(mounted)),
            worker: Mutex::new(Some(worker)),
            rounds,
            stop,
            held: Mutex::default(),
            complete: AtomicU32::new(0),
        }
    }

    fn rounds(&self) -> u32 {
        self.rounds.load(Ordering::SeqCst)
    }

    /// Waits until another round is over.
    fn another(&self) {
        let (before, deadline) = (self.rounds(), Instant::now() + PATIENCE);
        while self.rounds() == before {
            let ended = self.worker.lock().unwrap().as_ref().is_none_or(std::thread::JoinHandle::is_finished);
            assert!(!ended, "fio has found something wrong");
            assert!(Instant::now() < deadline, "fio gets nothing done");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends the load and unmounts, as a guest that goes down does.
    fn end(&self) {
        self.stop.store(1, Ordering::SeqCst);
        if let Some(worker) = self.worker.lock().unwrap().take() {
            assert!(worker.join().is_ok(), "fio has found something wrong");
        }
        if let Some(mounted) = self.mounted.lock().unwrap().take() {
            *self.held.lock().unwrap() = mounted.sums();
            mounted.unmount();
        }
    }
}

impl Observer for Load {
    fn event(&self, event: &Event) {
        // The live disk's is the last one.
        if matches!(event, Event::Complete { .. }) {
            self.complete.store(self.rounds(), Ordering::SeqCst);
        }
    }

    fn suspend(&self) -> Answer<'_> {
        Box::pin(async {
            tokio::task::block_in_place(|| {
                self.another();
                self.end();
            });
            Ok(())
        })
    }

    fn resume(&self, _: Vec<ActiveDisk>) -> Answer<'_> {
        Box::pin(std::future::ready(Ok(())))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(1, Ordering::SeqCst);
        if let Some(worker) = self.worker.lock().unwrap().take() {
            let _ = worker.join();
        }
    }
}

/// Hosts whose devices are cleared when this is dropped: those of a test that has failed would stay.
struct Cleared([Arc<Host>; 2]);

impl Drop for Cleared {
    fn drop(&mut self) {
        for host in &self.0 {
            let links = fs::read_dir(host.root().join("dev/xapi-storage-qcow2")).into_iter().flatten().flatten();
            for device in links.filter_map(|link| fs::read_link(link.path()).ok()) {
                let _ = Command::new("losetup").arg("-d").arg(device).status();
            }
        }
    }
}

/// One round: two files, written and rewritten at random places with several requests under way, and verified.
fn round(directory: &Path, number: u32) {
    let mut fio = Command::new("fio");
    fio.args(["--name=load", "--rw=randwrite", "--bsrange=4k-64k", "--size=2m", "--numjobs=2", "--thread"]);
    fio.args(["--ioengine=libaio", "--iodepth=8", "--direct=1", "--fsync=32", "--output-format=terse"]);
    fio.args(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"]);
    fio.arg(format!("--randseed={number}")).arg(format!("--directory={}", directory.display()));
    run(&mut fio);
}

/// The checksum of a snapshot's content, read by dom0 from a block device of its own.
async fn content(host: &Host, sr: &Sr, volume: &Vdi) -> String {
    let (dp, vm) = (Dp(format!("vbd/0/{volume}")), Vm::from("0"));
    let attached = host.vdi_attach3(DBG, &dp, sr, volume, &vm, false).await.unwrap();
    host.vdi_activate3(DBG, &dp, sr, volume, &vm).await.unwrap();
    assert_eq!(attached.path().map(Path::new), Some(device(host, volume).as_path()));
    let sum = tokio::task::block_in_place(|| sum(&device(host, volume)));
    host.dp_destroy(DBG, &dp).await.unwrap();
    sum
}

/// A VM's volumes with their SR: its disk and its snapshots' disks.
fn volumes(stage: &Stage, vms: &[VmRef]) -> Vec<Vdi> {
    vms.iter().map(|vm| stage.xapi.vm(*vm).unwrap().vbds[0].vdi.clone()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_system_that_fio_writes_to_migrates_whole_with_its_snapshots() {
    let driver = std::env::var(DRIVER).unwrap_or_else(|_| "loop".to_owned());
    for needed in ["/dev/fuse", "/dev/loop-control"].into_iter().filter(|_| driver == "loop") {
        assert!(Path::new(needed).exists(), "block devices need {needed}");
    }
    let binaries = Path::new(env!("CARGO_BIN_EXE_fake-xapi")).parent().unwrap();
    let stage = Stage::build(binaries, false, place_with(1 << 29)).await.unwrap();
    let (source, destination) = (Arc::clone(&stage.source), Arc::clone(&stage.destination));
    let _cleared = Cleared([Arc::clone(&source), Arc::clone(&destination)]);
    for host in [&source, &destination] {
        let settings = format!(r#"{{"block_device": "always", "block_device_driver": "{driver}"}}"#);
        write_settings(host.root(), &settings).unwrap();
    }
    let vm = stage.xapi.vm_create("vm", &source, &stage.source_sr, &[SIZE]).await.unwrap();
    stage.xapi.vm_start(vm).await.unwrap();
    let disk = device(&source, &volumes(&stage, &[vm])[0]);
    assert!(fs::read_link(&disk).unwrap().to_str().unwrap().starts_with(&format!("/dev/{driver}")));
    run(Command::new("mkfs.ext4").arg("-q").arg(&disk));
    let load = Load::on(Mounted::new(&disk));
    let mut snapshots = Vec::new();
    for name in ["a", "b"] {
        tokio::task::block_in_place(|| load.another());
        snapshots.push(stage.xapi.vm_snapshot(vm, name).await.unwrap());
    }
    let mut before = Vec::new();
    for snapshot in volumes(&stage, &snapshots) {
        before.push(content(&source, &stage.source_sr, &snapshot).await);
    }
    tokio::task::block_in_place(|| load.another());

    let poll = Duration::from_millis(20);
    let migration = Migration { poll, ..Migration::new(vm, &destination, &stage.destination_sr, Flow::Tree) };
    let began = load.rounds();
    sxm::migrate(&stage.xapi, &migration, &load).await.unwrap_or_else(|failed| panic!("{failed:?}"));
    assert!(
        load.rounds() > load.complete.load(Ordering::SeqCst) && load.rounds() > began,
        "fio did not write meanwhile"
    );

    let disk = device(&destination, &volumes(&stage, &[vm])[0]);
    run(Command::new("e2fsck").arg("-fn").arg(&disk));
    let mounted = Mounted::new(&disk);
    assert_eq!(mounted.sums(), *load.held.lock().unwrap());
    round(mounted.path(), 1000);
    mounted.unmount();
    for (snapshot, before) in volumes(&stage, &snapshots).iter().zip(&before) {
        assert_eq!(content(&destination, &stage.destination_sr, snapshot).await, *before);
    }
    // A snapshot under load is what a crash at that moment leaves: whole once its journal is played.
    stage.xapi.vm_revert(snapshots[0]).await.unwrap();
    stage.xapi.vm_start(vm).await.unwrap();
    let disk = device(&destination, &volumes(&stage, &[vm])[0]);
    Mounted::new(&disk).unmount();
    run(Command::new("e2fsck").arg("-fn").arg(&disk));

    stage.xapi.vm_destroy(vm).await.unwrap();
    for host in [&source, &destination] {
        let mut problems = Vec::new();
        assert!(stage.settled(host, PATIENCE, &mut problems).await, "{problems:?}");
        let devices = fs::read_dir(host.root().join("dev/xapi-storage-qcow2")).unwrap();
        assert_eq!(devices.count(), 0);
    }
    stage.close().await;
}
