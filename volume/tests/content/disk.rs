//! A volume as a destination has it: its datapath, its export, and what both say of the content.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use plugin::attachment::Attachment;
use plugin::host::{Host, Process};
use plugin::id::{ContentId, Domain, VolumeUri};
use plugin::mirror::{Announcement, Base};
use plugin::qemu::block_on;
use plugin::store::Mode;
use plugin::{Result, activation};
use serde_json::Value;

use super::support::{Bench, Guest};

/// A domain of xapi's for receiving a mirror.
pub const MIRROR: &str = "MIR0a1b2c";

/// A volume of a bench, on its first host.
pub struct Disk<'a> {
    pub bench: &'a Bench,
    pub host: Host,
    pub key: String,
    pub uri: VolumeUri,
}

impl<'a> Disk<'a> {
    pub fn of(bench: &'a Bench, key: &str) -> Self {
        let uri = format!("qsd://{}/{key}", bench.sr).parse().unwrap();
        Self { bench, host: Host::at(&bench.host.root), key: key.to_owned(), uri }
    }

    /// Makes a new volume of four mebibytes.
    pub fn new(bench: &'a Bench) -> Self {
        Self::of(bench, &bench.create(4 << 20))
    }

    /// Makes a new volume that is open for a mirror.
    pub fn open(bench: &'a Bench) -> Self {
        let disk = Self::new(bench);
        disk.plug();
        disk
    }

    /// Opens it for a mirror, as xapi does.
    pub fn plug(&self) {
        self.attach(MIRROR);
        self.activate(MIRROR);
        self.attach(MIRROR);
    }

    pub fn attach(&self, domain: &str) {
        self.try_attach(domain).unwrap();
    }

    pub fn try_attach(&self, domain: &str) -> Result<PathBuf> {
        activation::attach(&self.host, self.uri, &domain_of(domain))
    }

    pub fn activate(&self, domain: &str) {
        activation::activate(&self.host, self.uri, &domain_of(domain), Mode::ReadWrite).unwrap();
    }

    pub fn activate_readonly(&self, domain: &str) {
        activation::activate(&self.host, self.uri, &domain_of(domain), Mode::ReadOnly).unwrap();
    }

    pub fn deactivate(&self, domain: &str) {
        activation::deactivate(&self.host, self.uri, &domain_of(domain)).unwrap();
    }

    pub fn release(&self, domain: &str) {
        activation::release(&self.host, self.uri, &domain_of(domain)).unwrap();
    }

    /// Connects a client that stays.
    pub fn client(&self) -> Guest {
        Guest::connect(&self.host.volume_dir(self.uri.volume).join("nbd.sock"), &self.key, true)
    }

    /// Writes as one connection of a mirror does, and waits until it is gone.
    pub fn write(&self, pattern: u8, offset: u64, length: u64) {
        let mut client = self.client();
        client.write(pattern, offset, length);
        client.disconnect();
        self.wait_for_clients();
    }

    /// Waits until no client is connected.
    pub fn wait_for_clients(&self) {
        self.wait_for(0);
    }

    fn wait_for(&self, left: usize) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.clients() > left {
            assert!(Instant::now() < deadline, "a client stays");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn clients(&self) -> usize {
        let attachment = Attachment::lock_existing(&self.host, self.uri.volume).unwrap();
        attachment.map_or(0, |attachment| block_on(attachment.clients()).unwrap())
    }

    /// Gives the export's URI.
    pub fn nbd(&self) -> String {
        let socket = self.host.volume_dir(self.uri.volume).join("nbd.sock");
        format!("nbd+unix:///{}?socket={}", self.key, socket.display())
    }

    /// Gives the export's description.
    pub fn description(&self) -> Option<String> {
        let before = self.clients();
        let output = Command::new("nbdinfo").args(["--json", "--no-content", &self.nbd()]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let all: Value = serde_json::from_slice(&output.stdout).unwrap();
        self.wait_for(before);
        all["exports"][0]["description"].as_str().map(str::to_owned)
    }

    /// Gives what the export announces.
    pub fn announced(&self) -> Option<Announcement> {
        self.description().map(|text| text.parse().unwrap_or_else(|reason| panic!("{text}: {reason}")))
    }

    /// Comes for a connection as xapi's proxy does, and gives what the export announces then.
    pub fn next(&self) -> Announcement {
        self.attach(MIRROR);
        self.announced().unwrap()
    }

    /// Gives the name of what a volume's node holds.
    pub fn content_of(&self, key: &str) -> Option<ContentId> {
        let tree = self.bench.tree(key);
        let node = tree["volumes"][key]["node"].as_str().unwrap();
        tree["nodes"][node]["content"].as_str().map(|text| text.parse().unwrap())
    }

    /// The same for this volume.
    pub fn content(&self) -> Option<ContentId> {
        self.content_of(&self.key)
    }

    /// Kills the volume's storage daemon.
    pub fn kill_daemon(&self) {
        let path = self.host.volume_dir(self.uri.volume).join("state.json");
        let state: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let pid = i32::try_from(state["daemon"]["pid"].as_i64().unwrap()).unwrap();
        let process = Process::of_pid(&self.host, pid).unwrap();
        process.kill(&self.host, Duration::from_secs(60)).unwrap();
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let Ok(Some(mut attachment)) = Attachment::lock_existing(&self.host, self.uri.volume) else { return };
        let _ = block_on(attachment.stop());
    }
}

pub fn domain_of(text: &str) -> Domain {
    text.parse().unwrap()
}

/// The base of who knows what a session left.
pub fn content(announced: Announcement) -> Base {
    Base::Content(announced.session)
}
