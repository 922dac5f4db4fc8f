//! An SR with a volume whose guest runs, and what is to hold of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use plugin::activation;
use plugin::host::Host;
use plugin::id::{Domain, NodeId, VolumeUri};
use plugin::store::{Header, Mode, Sr};
use serde_json::{Value, json};

use super::guest::{Account, Guest, Model};
use super::support::{Bench, MIB};

/// The size of the disks.
pub const SIZE: u64 = 16 * MIB;

/// Where the guest writes.
pub const REGION: std::ops::Range<u64> = 12 * MIB..14 * MIB;

const CLUSTER: u64 = 64 << 10;

/// An SR, a volume, and its guest.
pub struct Scene {
    pub bench: Bench,
    pub volume: String,
    pub guest: Option<Guest>,
    uri: VolumeUri,
    /// Whether its daemon was killed, which leaves clusters unused in what it wrote to.
    pub died: bool,
}

impl Scene {
    /// Makes a volume of layers, each with what was written to it; a snapshot was taken between each two, and those are
    /// given as well.
    pub fn new(layers: &[&[&str]]) -> (Self, Vec<String>) {
        let bench = Bench::new();
        // As it is in earnest, but that the tests start it themselves.
        fs::write(bench.host.root.join("etc/xapi-storage-qcow2.json"), r#"{"gc": false}"#).unwrap();
        let volume = bench.create(SIZE);
        let mut snapshots = Vec::new();
        let uri = format!("qsd://{}/{volume}", bench.sr).parse().unwrap();
        let scene = Self { bench, volume, guest: None, uri, died: false };
        for (index, commands) in layers.iter().enumerate() {
            if index > 0 {
                snapshots.push(scene.bench.snapshot(&scene.volume));
            }
            scene.write_offline(commands);
        }
        (scene, snapshots)
    }

    fn write_offline(&self, commands: &[&str]) {
        let host = self.host();
        let key = self.volume.parse().unwrap();
        let sr = Sr::attached(&host, self.bench.sr.parse().unwrap()).unwrap();
        sr.lock(&host, key).unwrap().make_writable(key).unwrap();
        let mut command = Command::new("qemu-io");
        command.args(["-d", "unmap", "-f", "qcow2"]).args(commands.iter().flat_map(|command| ["-c", command]));
        let output = command.arg(self.bench.node_file(&self.volume)).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    pub fn host(&self) -> Host {
        Host::at(&self.bench.host.root)
    }

    /// Sets how fast is copied, in MiB a second.
    pub fn set_speed(&self, mib: u64) {
        let path = self.bench.host.root.join("etc/xapi-storage-qcow2.json");
        fs::write(path, json!({"gc": false, "gc_live_mib": mib}).to_string()).unwrap();
    }

    /// Activates the volume.
    pub fn activate(&self) {
        activation::attach(&self.host(), self.uri, &domain()).unwrap();
        activation::activate(&self.host(), self.uri, &domain(), Mode::ReadWrite).unwrap();
    }

    pub fn release(&self) {
        activation::release(&self.host(), self.uri, &domain()).unwrap();
    }

    /// Activates the volume and starts its guest, on a disk that holds what it should.
    pub fn start(&mut self) {
        let before = content(&self.bench.node_file(&self.volume));
        self.go_on(Model::of(before), REGION);
    }

    /// Activates the volume, and lets a guest go on with what it knows.
    pub fn go_on(&mut self, model: Model, region: std::ops::Range<u64>) {
        self.activate();
        let socket = self.host().volume_dir(self.uri.volume).join("nbd.sock");
        self.guest = Some(Guest::start(&socket, &self.volume, model, region));
    }

    /// Ends the guest and deactivates its volume.
    pub fn stop(&mut self) -> Account {
        let account = self.guest.take().unwrap().end();
        self.release();
        account
    }

    /// Ends the guest, and sees that its disk holds all it has written.
    pub fn stop_and_look(&mut self) -> Account {
        let account = self.stop();
        assert!(!account.lost);
        account.model.assert_holds(&content(&self.bench.node_file(&self.volume)), true);
        self.check();
        account
    }

    /// Sees that everything is in order; nobody has anything open.
    pub fn check(&self) {
        if self.died {
            let mut command = Command::new("qemu-img");
            command.args(["check", "-q", "-r", "leaks", "-f", "qcow2"]).arg(self.bench.node_file(&self.volume));
            assert!(command.status().unwrap().success());
        }
        self.bench.check();
    }

    /// Reads what the volume's daemon has open, from its record.
    pub fn state(&self) -> Value {
        let path = self.host().volume_dir(self.uri.volume).join("state.json");
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    /// Gives the number of the volume's storage daemon.
    pub fn daemon(&self) -> i32 {
        i32::try_from(self.state()["daemon"]["pid"].as_i64().unwrap()).unwrap()
    }

    /// Gives the record of the volume's tree.
    pub fn tree(&self) -> plugin::store::Tree {
        serde_json::from_value(self.bench.tree(&self.volume)).unwrap()
    }

    /// Gives how many nodes the tree has.
    pub fn nodes(&self) -> usize {
        self.tree().nodes.len()
    }

    /// Brings space back, and gives what was logged of it; nothing may go wrong.
    pub fn gc(&self) -> String {
        let log = self.bench.host.gc(&self.bench.sr);
        assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
        log
    }

    /// Starts what brings space back, and waits until it copies. False when it was through before.
    pub fn merging(&self) -> (Child, bool) {
        let mut worker = self.bench.host.start_gc(&self.bench.sr);
        let daemon = self.bench.host.root.join(format!("run/xapi-storage-qcow2/gc/{}/daemon.pid", self.bench.sr));
        loop {
            let is_written = fs::read_to_string(&daemon).is_ok_and(|text| text.ends_with('\n'));
            if self.tree().merge.is_some() && is_written {
                return (worker, true);
            }
            if worker.try_wait().unwrap().is_some() {
                return (worker, false);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Reads what all snapshots hold.
    pub fn kept(&self) -> BTreeMap<String, Vec<u8>> {
        let keys = self.bench.keys().into_iter().filter(|key| *key != self.volume);
        keys.map(|key| (key.clone(), content(&self.bench.node_file(&key)))).collect()
    }

    /// Sees that the record, the headers and the daemon agree on the volume's chain.
    pub fn assert_agree(&self) {
        let tree = self.tree();
        assert_eq!((tree.merge, &tree.intent), (None, &None));
        let directory = self.bench.tree_directory(&self.volume);
        for (id, node) in &tree.nodes {
            let parent = node.parent.map(|parent| format!("{parent}.qcow2"));
            let header = Header::read(&directory.join(format!("{id}.qcow2"))).unwrap();
            assert_eq!(header.check_backing(parent.as_deref()), Ok(()));
        }
        let state = self.state();
        let chain = tree.chain(tree.volumes[&self.uri.volume].node);
        assert_eq!(state["open"]["nodes"], json!(chain));
        assert_eq!(state["open"].get("exchange"), None);
        let mut files: Vec<PathBuf> = open_files(self.daemon());
        files.retain(|file| file.starts_with(&directory));
        let mut expected: Vec<PathBuf> = chain.iter().map(|id| directory.join(format!("{id}.qcow2"))).collect();
        files.sort();
        expected.sort();
        files.dedup();
        assert_eq!(files, expected, "what the daemon has open");
        let text = self.bench.host.call("Plugin.diagnostics", json!({"dbg": ""}));
        assert!(!text.as_str().unwrap().contains("header names"), "{text}");
    }

    /// Sees that the nodes take no more than 2 % over what fresh copies of them do, and one cluster each. Nobody may have
    /// them open.
    pub fn assert_small(&self) {
        let fresh = tempfile::tempdir().unwrap();
        let directory = self.bench.tree_directory(&self.volume);
        for (node, record) in self.tree().nodes {
            let (file, copy) = (directory.join(format!("{node}.qcow2")), fresh.path().join(node.to_string()));
            let mut command = Command::new("qemu-img");
            command.args(["convert", "-f", "qcow2", "-O", "qcow2"]);
            if let Some(parent) = record.parent {
                command.args(["-F", "qcow2", "-B"]).arg(directory.join(format!("{parent}.qcow2")));
            }
            assert!(command.args([&file, &copy]).status().unwrap().success());
            let [ours, fresh] = [&file, &copy].map(|path| fs::metadata(path).unwrap().blocks() * 512);
            assert!(ours <= fresh * 102 / 100 + CLUSTER, "{}: {ours} instead of {fresh}", file.display());
        }
    }

    /// Sees that all nodes together take no more than 2 % over what fresh copies of the volumes do, one cluster each, and what
    /// a worker leaves to the end of a quiet guest: one hidden node below what that writes to, of which less than a
    /// mebibyte is hidden.
    pub fn assert_small_while_open(&self) {
        let fresh = tempfile::tempdir().unwrap();
        let directory = self.bench.tree_directory(&self.volume);
        let tree = self.tree();
        let file = |node: &NodeId| directory.join(format!("{node}.qcow2"));
        let taken = |path: &Path| fs::metadata(path).unwrap().blocks() * 512;
        let named: BTreeSet<NodeId> = tree.volumes.values().map(|volume| volume.node).collect();
        let hidden: Vec<&NodeId> = tree.nodes.keys().filter(|node| !named.contains(node)).collect();
        let top = tree.volumes[&self.uri.volume].node;
        assert!(hidden.iter().all(|node| Some(**node) == tree.nodes[&top].parent), "{hidden:?} are hidden");
        let mut copies = 0;
        for node in &named {
            let copy = fresh.path().join(node.to_string());
            let mut command = Command::new("qemu-img");
            command.args(["convert", "-U", "-f", "qcow2", "-O", "qcow2"]);
            if let Some(below) = tree.chain(*node).iter().skip(1).find(|node| named.contains(node)) {
                command.args(["-F", "qcow2", "-B"]).arg(file(below));
            }
            assert!(command.args([&file(node), &copy]).status().unwrap().success());
            copies += taken(&copy);
        }
        let ours: u64 = tree.nodes.keys().map(|node| taken(&file(node))).sum();
        // A file without data has five clusters.
        let left = hidden.len() as u64 * (MIB + 5 * CLUSTER);
        let nodes = tree.nodes.len() as u64;
        assert!(ours <= copies * 102 / 100 + nodes * CLUSTER + left, "{ours} instead of {copies}, {nodes} nodes");
    }

    /// Waits until a daemon of this SR's host has ended. Its number may be another's by then.
    pub fn wait_for_end(&self, daemon: i32) {
        let root = self.bench.host.root.to_str().unwrap().to_owned();
        self.wait("the daemon's end", || {
            let read = |name| fs::read_to_string(format!("/proc/{daemon}/{name}")).unwrap_or_default();
            let (line, stat) = (read("cmdline"), read("stat"));
            // One that is dying has no command line any more, and its files for a moment.
            let is_dying = line.is_empty() && stat.contains("(qemu-storage") && !stat.contains(") Z");
            !line.contains(&root) && !is_dying
        });
    }

    /// Waits until something holds.
    fn wait(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let began = Instant::now();
        while !holds() {
            assert!(began.elapsed() < Duration::from_secs(60), "{what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        drop(self.guest.take());
        if std::thread::panicking() {
            // Its daemon is below the directory that goes.
            drop(activation::release(&self.host(), self.uri, &domain()));
        }
    }
}

fn domain() -> Domain {
    "7".parse().unwrap()
}

/// Reads all of an image.
pub fn content(image: &Path) -> Vec<u8> {
    let raw = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-U", "-f", "qcow2", "-O", "raw"]).args([image, raw.path()]);
    assert!(command.status().unwrap().success());
    fs::read(raw.path()).unwrap()
}

/// Lists the files that a process has open.
fn open_files(pid: i32) -> Vec<PathBuf> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok()).collect()
}
