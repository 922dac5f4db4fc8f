//! Hosts, an SR that they share, and the executable.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use plugin::host::Host;
use plugin::id::{SrUuid, VolumeKey, VolumeUri};
use plugin::store::{NewTree, Sr, Tree, Volume};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

/// The size of volumes, in bytes.
pub const SIZE: u64 = 8 << 20;

/// An SR with a volume, and two hosts that have it attached. When it is dropped, no process of it is left.
pub struct Scene {
    pub host: Host,
    pub other: Host,
    pub sr: Sr,
    pub uri: VolumeUri,
    directory: TempDir,
}

/// Gives a host the programs that tests/older.sh says, where the plugins look first.
fn older_qemu(root: &Path) {
    if let Some(programs) = std::env::var_os("TESTED_QEMU") {
        fs::create_dir_all(root.join("usr/libexec")).unwrap();
        std::os::unix::fs::symlink(programs, root.join("usr/libexec/xapi-storage-qcow2")).unwrap();
        let found = plugin::qemu::storage_daemon(&Host::at(root)).unwrap();
        assert!(found.path.starts_with(root), "{found:?}");
    }
}

/// Why a call failed.
#[derive(Debug)]
pub struct Failure {
    pub code: String,
    pub params: Vec<String>,
}

impl Scene {
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("dp-").tempdir_in("/tmp").unwrap();
        let hosts = ["a", "b"].map(|name| {
            let root = directory.path().join(name);
            fs::create_dir_all(root.join("etc")).unwrap();
            let inventory = format!("INSTALLATION_UUID='{}'\n", Uuid::new_v4());
            fs::write(root.join("etc/xensource-inventory"), inventory).unwrap();
            older_qemu(&root);
            // What is left running is counted.
            fs::write(root.join("etc/xapi-storage-qcow2.json"), r#"{"gc": false}"#).unwrap();
            Host::at(root)
        });
        let path = directory.path().join("sr");
        fs::create_dir(&path).unwrap();
        let sr = Sr::create(&hosts[0], &path, SrUuid::random(), "name", "description").unwrap();
        for host in &hosts {
            sr.attach(host).unwrap();
        }
        let volume = VolumeKey::random();
        let record = Volume::new(String::new(), String::new());
        NewTree::begin(&sr).unwrap().commit(Tree::of_one(volume, record, SIZE)).unwrap();
        let uri = VolumeUri { sr: sr.record.uuid, volume };
        let [host, other] = hosts;
        Self { host, other, sr, uri, directory }
    }

    /// Calls a method for the volume and a domain.
    pub fn call(&self, method: &str, domain: &str) -> Value {
        self.try_call(method, domain).unwrap()
    }

    pub fn try_call(&self, method: &str, domain: &str) -> Result<Value, Failure> {
        self.try_call_on(&self.host, method, domain)
    }

    pub fn try_call_on(&self, host: &Host, method: &str, domain: &str) -> Result<Value, Failure> {
        answer(start(&mut command(host, method), self.request(domain).to_string().as_bytes()))
    }

    /// Calls a method with any request.
    pub fn try_request(&self, method: &str, request: &[u8]) -> Result<Value, Failure> {
        answer(start(&mut command(&self.host, method), request))
    }

    /// Gives a request as xapi-storage-script sends it.
    pub fn request(&self, domain: &str) -> Value {
        json!({"domain": domain, "uri": self.uri.to_string(), "dbg": "OpaqueRef:dbg"})
    }

    /// Starts a call, to be answered later or killed.
    pub fn start(&self, method: &str, domain: &str) -> Child {
        start(&mut command(&self.host, method), self.request(domain).to_string().as_bytes())
    }

    /// Runs qemu-io on the volume's export on the first host, and tells whether it succeeded.
    pub fn io(&self, text: &str) -> bool {
        let socket = self.directory_of_volume().join("nbd.sock");
        let uri = format!("nbd+unix:///{}?socket={}", self.uri.volume, socket.display());
        let mut command = Command::new("qemu-io");
        if text.starts_with("read") {
            command.arg("-r");
        }
        let output = command.args(["-f", "raw", "-c", text, &uri]).output().unwrap();
        output.status.success() && !String::from_utf8_lossy(&output.stdout).contains("verification failed")
    }

    /// Gives the volume's runtime directory on the first host.
    pub fn directory_of_volume(&self) -> PathBuf {
        self.host.volume_dir(self.uri.volume)
    }

    /// Gives who has claims on the volume.
    pub fn claims(&self) -> Vec<Uuid> {
        let loaded = self.sr.load(self.uri.volume).unwrap();
        loaded.volume(self.uri.volume).unwrap().active.iter().map(|claim| claim.host).collect()
    }

    /// Lists the processes whose command line names this scene.
    pub fn processes(&self) -> Vec<i32> {
        let root = self.directory.path().as_os_str().as_encoded_bytes().to_vec();
        let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        pids.filter(|pid: &i32| {
            let command_line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            command_line.windows(root.len()).any(|window| window == root)
        })
        .collect()
    }

    /// Checks that nothing of the volume is left on the first host, nor a claim in the SR.
    pub fn assert_nothing_left(&self) {
        assert!(self.processes().is_empty());
        assert!(!self.directory_of_volume().exists());
        assert!(self.claims().is_empty());
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for pid in self.processes() {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
    }
}

/// Gives the command of a call.
pub fn command(host: &Host, method: &str) -> Command {
    let mut command = Command::new(executable());
    command.args([method, "--json"]).env(plugin::host::ROOT_VARIABLE, host.root());
    command
}

/// Gives the executable's path.
pub fn executable() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_xapi-storage-qcow2-datapath"))
}

/// Starts a call with both pipes held, and sends it the request.
pub fn start(command: &mut Command, request: &[u8]) -> Child {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A call that ends before it has read everything is judged by its answer.
    let _ = child.stdin.take().unwrap().write_all(request);
    child
}

/// Reads both pipes to their ends, as xapi-storage-script does: whatever holds one of them open hangs the call.
pub fn answer(mut child: Child) -> Result<Value, Failure> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    child.stdout.take().unwrap().read_to_end(&mut stdout).unwrap();
    child.stderr.take().unwrap().read_to_end(&mut stderr).unwrap();
    let status = child.wait().unwrap();
    let value: Value = serde_json::from_slice(&stdout)
        .unwrap_or_else(|error| panic!("{error}: {:?}", String::from_utf8_lossy(&stderr)));
    if status.success() {
        return Ok(value);
    }
    assert_eq!(status.code(), Some(1), "{}", String::from_utf8_lossy(&stderr));
    assert!(value["backtrace"]["error"].is_string() && value["backtrace"]["lines"].is_array());
    let params = value["params"].as_array().unwrap().iter().map(|param| param.as_str().unwrap().to_owned());
    Err(Failure { code: value["code"].as_str().unwrap().to_owned(), params: params.collect() })
}

/// Makes a call that is killed at the n-th of a system call; false when it was through before. `None` without strace.
pub fn killed_at(scene: &Scene, method: &str, request: &Value, call: &str, n: u32) -> Option<bool> {
    let mut strace = Command::new("strace");
    strace.args(["-qq", "-o", "/dev/null", "-e", &format!("inject={call}:signal=KILL:when={n}")]);
    strace.arg(executable()).args([method, "--json"]).env(plugin::host::ROOT_VARIABLE, scene.host.root());
    if Command::new("strace").arg("-V").output().is_err() {
        return None;
    }
    let output = start(&mut strace, request.to_string().as_bytes()).wait_with_output().unwrap();
    Some(!output.status.success())
}
