//! A host of a test's own, images, and NBD clients.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use plugin::attachment::Attachment;
use plugin::host::Host;
use plugin::id::{Domain, NodeId, SrUuid, VolumeKey, VolumeUri};
use plugin::mirror::Base;
use plugin::qemu::{Image, block_on};
use plugin::store::{Blank, Mode, Unit};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// The size of the images, in bytes.
pub const SIZE: u64 = 8 << 20;

/// A host with one volume. When it is dropped, no process of it is left.
pub struct Scene {
    pub host: Host,
    pub uri: VolumeUri,
    directory: TempDir,
}

impl Scene {
    pub fn new() -> Self {
        Self::with_settings("{}")
    }

    pub fn with_settings(settings: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("at-").tempdir_in("/tmp").unwrap();
        let root = directory.path().join("h");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(root.join("etc/xapi-storage-qcow2.json"), settings).unwrap();
        let uri = VolumeUri { sr: SrUuid::random(), volume: VolumeKey::random() };
        Self { host: Host::at(root), uri, directory }
    }

    /// Gives a path for a file of the test.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Makes an empty image whose header names a backing file that is not there, so that whoever follows it fails.
    pub fn image(&self) -> Image {
        self.image_in(self.directory.path())
    }

    pub fn image_in(&self, directory: &Path) -> Image {
        let node = NodeId::random();
        let path = directory.join(format!("{node}.qcow2"));
        let backing = Some("nowhere.qcow2");
        Blank { virtual_size: SIZE, backing, unit: Unit::Cluster }.create(&path).unwrap();
        Image { node, path, virtual_size: SIZE }
    }

    pub fn attachment(&self) -> Attachment {
        Attachment::lock(&self.host, self.uri).unwrap()
    }

    pub fn attach(&self, domain: &str) {
        block_on(self.attachment().attach(&as_domain(domain))).unwrap();
    }

    pub fn try_activate(&self, domain: &str, mode: Mode, images: &[Image]) -> plugin::Result<()> {
        block_on(self.attachment().activate(&as_domain(domain), mode, images, Some(Base::Unknown)))
    }

    pub fn activate(&self, domain: &str, mode: Mode, images: &[Image]) {
        self.try_activate(domain, mode, images).unwrap();
    }

    pub fn try_deactivate(&self, domain: &str) -> plugin::Result<()> {
        block_on(self.attachment().deactivate(&as_domain(domain)))
    }

    pub fn deactivate(&self, domain: &str) {
        self.try_deactivate(domain).unwrap();
    }

    pub fn detach(&self, domain: &str) {
        block_on(self.attachment().detach(&as_domain(domain))).unwrap();
    }

    pub fn top(&self) -> Option<NodeId> {
        let attachment = self.attachment();
        block_on(attachment.top()).unwrap()
    }

    pub fn open_mode(&self) -> Option<Mode> {
        self.attachment().open_mode()
    }

    /// Changes what is recorded, as if a call had been killed at that point.
    pub fn edit_state(&self, edit: impl FnOnce(&mut Value)) {
        let path = self.host.volume_dir(self.uri.volume).join("state.json");
        let mut state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        edit(&mut state);
        fs::write(&path, state.to_string()).unwrap();
    }

    /// Gives the export's URI, as NBD clients take it.
    pub fn nbd(&self) -> String {
        let socket = self.host.volume_dir(self.uri.volume).join("nbd.sock");
        format!("nbd+unix:///{}?socket={}", self.uri.volume, socket.display())
    }

    /// Runs qemu-io commands on the export, and tells whether all of them succeeded.
    pub fn io(&self, read_only: bool, commands: &[&str]) -> bool {
        let mut command = Command::new("qemu-io");
        if read_only {
            command.arg("-r");
        }
        for text in commands {
            command.args(["-c", text]);
        }
        let output = command.args(["-f", "raw", &self.nbd()]).output().unwrap();
        // It says so on standard output and exits with 0 when a pattern does not match.
        output.status.success() && !text(&output).contains("verification failed")
    }

    /// Gives what nbdinfo says of the export.
    pub fn info(&self, field: &str) -> Value {
        let output = Command::new("nbdinfo").args(["--json", "--no-content", &self.nbd()]).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        let all: Value = serde_json::from_slice(&output.stdout).unwrap();
        all["exports"][0][field].clone()
    }

    /// Lists the storage daemons of this host.
    pub fn daemons(&self) -> Vec<i32> {
        let root = self.directory.path().as_os_str().as_encoded_bytes().to_vec();
        let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        pids.filter(|pid: &i32| {
            let command_line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            command_line.windows(root.len()).any(|window| window == root)
                && command_line.windows(19).any(|window| window == b"qemu-storage-daemon")
        })
        .collect()
    }

    pub fn signal_daemon(&self, signal: Signal) {
        let daemons = self.daemons();
        assert_eq!(daemons.len(), 1);
        kill_process(Pid::from_raw(daemons[0]).unwrap(), signal).unwrap();
    }

    /// Connects a client that stays.
    pub fn client(&self, read_only: bool) -> Client {
        Client::connect(self, read_only)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for pid in self.daemons() {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
    }
}

/// A qemu-io that is connected until it is dropped, and then killed: it says no goodbye and flushes nothing.
pub struct Client {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Client {
    fn connect(scene: &Scene, read_only: bool) -> Self {
        let mut command = Command::new("qemu-io");
        if read_only {
            command.arg("-r");
        }
        // Else each write is flushed.
        command.args(["-t", "writeback", "-f", "raw", &scene.nbd()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut client = Self { child, stdin, stdout };
        client.run("length");
        client
    }

    /// Runs a command and gives the line it answers with.
    pub fn run(&mut self, command: &str) -> String {
        writeln!(self.stdin, "{command}").unwrap();
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_start_matches("qemu-io> ").trim().to_owned()
    }

    /// Writes a pattern over a range, and returns when that is acknowledged.
    pub fn write(&mut self, pattern: u8, offset: &str, length: &str) {
        let answer = self.run(&format!("write -P {pattern} {offset} {length}"));
        assert!(answer.starts_with("wrote "), "{answer}");
        let mut figures = String::new();
        self.stdout.read_line(&mut figures).unwrap();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Parses a domain.
pub fn as_domain(text: &str) -> Domain {
    text.parse().unwrap()
}

/// Waits until something holds.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}
