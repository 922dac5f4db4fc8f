//! A host with an SR of its own, its volumes, and mirrors from them.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use plugin::attachment::Attachment;
use plugin::host::Host;
use plugin::id::{ContentId, MirrorKey, NodeId, SrUuid, VolumeKey, VolumeUri};
use plugin::mirror::{self, How, MirrorRecord, Phase, Plan};
use plugin::store::{LockedTree, Mode, NewTree, Sr, Tree, Volume, plan};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use uuid::Uuid;

use super::eventually::eventually;

/// A mebibyte.
pub const MIB: u64 = 1 << 20;

/// A host and its SR. When it is dropped, no process of it is left.
pub struct Site {
    pub host: Host,
    pub sr: Sr,
    root: PathBuf,
}

impl Site {
    /// Makes a host with an SR below `directory`, whose path is short enough for sockets.
    pub fn new(directory: &Path, name: &str, settings: &Value) -> Self {
        let root = directory.join(name);
        fs::create_dir_all(root.join("etc")).unwrap();
        let inventory = format!("INSTALLATION_UUID='{}'\n", Uuid::new_v4());
        fs::write(root.join("etc/xensource-inventory"), inventory).unwrap();
        let mut settings = settings.clone();
        // Chains are judged without the plugin's locks: no node is to be merged meanwhile.
        settings["gc"] = false.into();
        fs::write(root.join("etc/xapi-storage-qcow2.json"), settings.to_string()).unwrap();
        let host = Host::at(&root);
        let path = root.join("sr");
        fs::create_dir(&path).unwrap();
        let sr = Sr::create(&host, &path, SrUuid::random(), name, "").unwrap();
        sr.attach(&host).unwrap();
        Self { host, sr, root }
    }

    /// Makes a volume.
    pub fn create(&self, size: u64) -> VolumeKey {
        let key = VolumeKey::random();
        let record = Volume::new(String::new(), String::new());
        NewTree::begin(&self.sr).unwrap().commit(Tree::of_one(key, record, size)).unwrap();
        key
    }

    pub fn uri(&self, volume: VolumeKey) -> VolumeUri {
        VolumeUri { sr: self.sr.record.uuid, volume }
    }

    fn lock(&self, volume: VolumeKey) -> LockedTree {
        self.sr.lock(&self.host, volume).unwrap()
    }

    /// Takes a snapshot, as Volume.snapshot does.
    pub fn snapshot(&self, volume: VolumeKey) -> VolumeKey {
        mirror::end_for_snapshot(&self.host, volume).unwrap();
        let snapshot = VolumeKey::random();
        let mut tree = self.lock(volume);
        let change = plan::snapshot(&tree.tree, volume, snapshot, NodeId::random()).unwrap();
        match self.open_mode(volume) {
            Some(Mode::ReadWrite) => tree.switch(&self.host, change).unwrap(),
            Some(Mode::ReadOnly) | None => tree.apply(&change).unwrap(),
        }
        snapshot
    }

    /// Makes a clone of a volume that nobody writes to, as Volume.clone does.
    pub fn clone_of(&self, volume: VolumeKey) -> VolumeKey {
        let clone = VolumeKey::random();
        let mut tree = self.lock(volume);
        let change = plan::clone(&tree.tree, volume, clone, NodeId::random(), None).unwrap();
        tree.apply(&change).unwrap();
        clone
    }

    /// Brings an inactive volume back to what a snapshot holds, as Volume.revert does.
    pub fn revert(&self, volume: VolumeKey, snapshot: VolumeKey) {
        mirror::reap(&self.host, volume).unwrap();
        self.lock(volume).revert(volume, snapshot).unwrap();
    }

    /// Makes an inactive volume larger, as Volume.resize does.
    pub fn grow(&self, volume: VolumeKey, size: u64) {
        let mut tree = self.lock(volume);
        if tree.tree.is_frozen(tree.volume(volume).unwrap().node) {
            let change = plan::overlay(&tree.tree, volume, NodeId::random(), Some(size)).unwrap();
            tree.apply(&change).unwrap();
        } else {
            tree.grow(volume, size).unwrap();
        }
    }

    /// Destroys a volume, as Volume.destroy does.
    pub fn destroy(&self, volume: VolumeKey) {
        mirror::forget_volume(&self.host, volume).unwrap();
        self.lock(volume).destroy(volume).unwrap();
    }

    fn open_mode(&self, volume: VolumeKey) -> Option<Mode> {
        Attachment::lock_existing(&self.host, volume).unwrap().and_then(|attachment| attachment.open_mode())
    }

    /// Gives the name of what a volume's node holds.
    pub fn content(&self, volume: VolumeKey) -> Option<ContentId> {
        let loaded = self.sr.load(volume).unwrap();
        loaded.tree.node(loaded.volume(volume).unwrap().node).unwrap().content
    }

    /// Calls a method of the datapath plugin.
    pub fn call(&self, method: &str, request: &Value) -> Value {
        self.try_call(method, request).unwrap_or_else(|failure| panic!("{method} {request}: {failure}"))
    }

    /// Calls a method that may fail.
    pub fn try_call(&self, method: &str, request: &Value) -> Result<Value, Value> {
        let mut child = Command::new(env!("CARGO_BIN_EXE_xapi-storage-qcow2-datapath"))
            .args([method, "--json"])
            .env(plugin::host::ROOT_VARIABLE, self.host.root())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(request.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
        if output.status.success() { Ok(value) } else { Err(value) }
    }

    /// Calls a method of Datapath for a volume and a domain.
    pub fn path(&self, method: &str, volume: VolumeKey, domain: &str) -> Value {
        let request = json!({"dbg": "", "uri": self.uri(volume).to_string(), "domain": domain});
        self.call(&format!("Datapath.{method}"), &request)
    }

    pub fn activate(&self, volume: VolumeKey, domain: &str) {
        self.path("attach", volume, domain);
        self.path("activate", volume, domain);
    }

    pub fn release(&self, volume: VolumeKey, domain: &str) {
        self.path("deactivate", volume, domain);
        self.path("detach", volume, domain);
    }

    pub fn socket(&self, volume: VolumeKey) -> PathBuf {
        self.host.volume_dir(volume).join("nbd.sock")
    }

    /// Runs commands of qemu-io through the export of an active volume, as its guest.
    pub fn io(&self, volume: VolumeKey, commands: &[&str]) {
        let uri = format!("nbd+unix:///{volume}?socket={}", self.socket(volume).display());
        let mut command = Command::new("qemu-io");
        for text in commands {
            command.args(["-c", text]);
        }
        let output = command.args(["-f", "raw", &uri]).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && !said.contains("failed"), "{commands:?}: {output:?}");
    }

    /// Writes to a volume that nobody has active, and closes it again.
    pub fn write(&self, volume: VolumeKey, commands: &[&str]) {
        self.activate(volume, "1");
        self.io(volume, commands);
        self.release(volume, "1");
    }

    /// Asks a volume's storage daemon.
    pub fn qmp(&self, volume: VolumeKey, command: &str) -> Value {
        let socket = self.host.volume_dir(volume).join("qmp.sock");
        plugin::qemu::block_on(async {
            let client = plugin::qemu::qmp::Client::connect(&socket, Duration::from_secs(20)).await?;
            client.execute(command, ()).await
        })
        .unwrap()
    }

    /// Starts a mirror for a domain, and gives its key.
    pub fn mirror(&self, volume: VolumeKey, domain: &str, export: &str, socket: &Path) -> MirrorKey {
        let remote = format!("nbd+unix:///{export}?socket={}", socket.display());
        let request = json!({"dbg": "", "uri": self.uri(volume).to_string(), "domain": domain, "remote": remote});
        let answer = self.call("Data.mirror", &request);
        answer[1].as_str().unwrap().parse().unwrap()
    }

    pub fn record(&self, key: MirrorKey) -> MirrorRecord {
        MirrorRecord::load(&self.host, key).unwrap().unwrap()
    }

    /// Waits until a mirror is in a phase; another end than that fails the test.
    pub fn wait(&self, key: MirrorKey, phase: Phase) -> MirrorRecord {
        let record = eventually(&format!("{phase:?}"), || {
            let record = self.record(key);
            (record.phase == phase || record.phase.is_terminal()).then_some(record)
        });
        assert_eq!(record.phase, phase, "{:?} {:?}", record.plan, record.reason);
        record
    }

    /// Ends a live mirror as the guest's deactivation does.
    pub fn finish(&self, key: MirrorKey) -> MirrorRecord {
        mirror::end(&self.host, &self.record(key), How::Finish, "test").unwrap()
    }

    /// Gives what QEMU's tools read a volume as, by its files.
    pub fn chain(&self, volume: VolumeKey) -> String {
        let images = self.sr.load(volume).unwrap().chain_images(volume).unwrap();
        plugin::qemu::chain_filename(&images).unwrap()
    }

    pub fn size_of(&self, volume: VolumeKey) -> u64 {
        let loaded = self.sr.load(volume).unwrap();
        loaded.tree.node(loaded.volume(volume).unwrap().node).unwrap().virtual_size
    }

    /// Kills a volume's storage daemon.
    pub fn kill_daemon(&self, volume: VolumeKey) {
        let directory = self.host.volume_dir(volume).into_os_string().into_encoded_bytes();
        for pid in self.processes() {
            let command_line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if command_line.windows(directory.len()).any(|window| window == directory) {
                let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
                // The next call is to find it dead, not dying.
                while fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty()) {
                    std::thread::yield_now();
                }
            }
        }
    }

    /// Lists the processes whose command line names this host.
    pub fn processes(&self) -> Vec<i32> {
        let root = format!("{}/", self.root.display()).into_bytes();
        let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        pids.filter(|pid: &i32| {
            let command_line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            command_line.windows(root.len()).any(|window| window == root)
        })
        .collect()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for pid in self.processes() {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
        for record in MirrorRecord::all(&self.host).unwrap_or_default() {
            if let Some(process) = record.supervisor.filter(|_| record.is_running(&self.host)) {
                let _ = process.kill(&self.host, Duration::from_secs(20));
            }
        }
    }
}

/// Compares with QEMU's own tool what two names read as.
pub fn assert_same(one: &str, other: &str) {
    let output = Command::new("qemu-img").args(["compare", "-U", "-p", one, other]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// Gives the reason for a full mirror.
pub fn reason(record: &MirrorRecord) -> &str {
    match record.plan.as_ref().unwrap() {
        Plan::Full(reason) => reason,
        other => panic!("{other:?}"),
    }
}

/// Gives how many layers a mirror sent as a difference.
pub fn layers(record: &MirrorRecord) -> usize {
    match record.plan.as_ref().unwrap() {
        Plan::Difference { layers, .. } => layers.len(),
        other => panic!("{other:?}"),
    }
}
