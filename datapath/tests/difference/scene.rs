//! A source with snapshots, and destinations that announce what a test wants: storage daemons that belong to no SR.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use plugin::id::{ContentId, MirrorKey, VolumeKey};
use plugin::mirror::{Announcement, Base, MirrorRecord, Phase};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::eventually::eventually;
use super::link::Link;
use super::site::{MIB, Site, assert_same};

pub const SIZE: u64 = 32 * MIB;

/// A storage daemon with one image behind the export `e`. It is killed when dropped.
pub struct Target {
    child: Child,
    pub image: PathBuf,
    pub socket: PathBuf,
}

impl Target {
    /// Opens an image, and says of it what is given.
    pub fn start(directory: &Path, image: PathBuf, description: Option<&str>) -> Self {
        let socket = directory.join(format!("{}.sock", image.file_stem().unwrap().to_str().unwrap()));
        let mut export = json!({
            "type": "nbd", "id": "e", "name": "e", "node-name": "d", "writable": true,
        });
        if let Some(description) = description {
            export["description"] = description.into();
        }
        let node = json!({
            "driver": "qcow2", "node-name": "d", "discard": "unmap", "backing": Value::Null,
            "file": {"driver": "file", "filename": &image, "discard": "unmap"},
        });
        let child = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &node.to_string()])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())])
            .args(["--export", &export.to_string()])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        eventually("storage daemon", || std::os::unix::net::UnixStream::connect(&socket).ok());
        Self { child, image, socket }
    }

    pub fn stop(&mut self) {
        let pid = rustix::process::Pid::from_raw(self.child.id().cast_signed()).unwrap();
        while self.child.try_wait().unwrap().is_none() {
            // Not once: QEMU's main loop does not notice a signal that comes right before it begins to wait.
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A source with two snapshots below a volume, and somewhere for destinations.
pub struct Scene {
    pub site: Site,
    pub first: VolumeKey,
    pub second: VolumeKey,
    pub leaf: VolumeKey,
    pub directory: TempDir,
}

impl Scene {
    pub fn new() -> Self {
        Self::with(&json!({}))
    }

    pub fn with(settings: &Value) -> Self {
        let directory = tempfile::Builder::new().prefix("df-").tempdir_in("/tmp").unwrap();
        let site = Site::new(directory.path(), "s", settings);
        let leaf = site.create(SIZE);
        site.write(leaf, &["write -P 1 0 8M", "write -P 2 20M 1M"]);
        let first = site.snapshot(leaf);
        site.write(leaf, &["write -P 3 1M 1M", "write -z 20M 512k"]);
        let second = site.snapshot(leaf);
        site.write(leaf, &["write -P 4 2M 1M", "discard 4M 1M", "write -P 5 30M 1M"]);
        Self { site, first, second, leaf, directory }
    }

    /// Makes a destination that holds what a volume of the source holds, or nothing.
    pub fn target(&self, holds: Option<VolumeKey>, description: Option<&str>) -> Target {
        self.target_of(SIZE, holds, description)
    }

    pub fn target_of(&self, size: u64, holds: Option<VolumeKey>, description: Option<&str>) -> Target {
        let image = self.directory.path().join(format!("{:08x}.qcow2", rand()));
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2"]).arg(&image).arg(size.to_string());
        assert!(create.status().unwrap().success());
        if let Some(volume) = holds {
            let mut convert = Command::new("qemu-img");
            convert.args(["convert", "-n", "-O", "qcow2", &self.site.chain(volume)]).arg(&image);
            assert!(convert.status().unwrap().success());
        }
        Target::start(self.directory.path(), image, description)
    }

    pub fn mirror(&self, volume: VolumeKey, target: &Target) -> MirrorKey {
        self.site.mirror(volume, "-1", "e", &target.socket)
    }

    /// Mirrors to the end, and checks that the destination then holds the same.
    pub fn mirrored(&self, volume: VolumeKey, target: &mut Target) -> MirrorRecord {
        let key = self.mirror(volume, target);
        let record = self.site.wait(key, Phase::Finished);
        target.stop();
        assert_same(&self.site.chain(volume), target.image.to_str().unwrap());
        record
    }

    pub fn content(&self, volume: VolumeKey) -> ContentId {
        self.site.content(volume).unwrap()
    }

    /// Announces, in a session that nothing was sent in, what a volume of the source holds.
    pub fn promise(&self, holds: VolumeKey) -> String {
        announce(ContentId::random(), Base::Content(self.content(holds)))
    }

    /// Puts a link before a destination.
    pub fn link(&self, target: &Target) -> Link {
        Link::start(&target.image.with_extension("link"), target.socket.clone())
    }

    /// Checks that no job, node or export of a mirror is left in the daemon of a volume that is active, and that it
    /// serves its guest.
    pub fn assert_serves(&self, volume: VolumeKey) {
        for (command, member) in
            [("query-named-block-nodes", "node-name"), ("query-jobs", "id"), ("query-block-exports", "id")]
        {
            let answer = self.site.qmp(volume, command);
            let named = |item: &Value| item[member].as_str().is_some_and(|name| name.starts_with("mirror"));
            assert!(!answer.as_array().unwrap().iter().any(named), "{command}: {answer}");
        }
        self.site.io(volume, &["write -P 0x66 9M 64k"]);
    }
}

/// Gives how much was sent beyond `bytes`; nothing else of any size may be.
#[track_caller]
pub fn assert_sent(record: &MirrorRecord, bytes: u64) {
    let sent = record.progress.sent;
    assert!(sent >= bytes && sent < bytes + (64 << 10), "{sent} for {bytes}");
}

fn rand() -> u32 {
    uuid::Uuid::new_v4().as_fields().0
}

pub fn announce(session: ContentId, base: Base) -> String {
    Announcement { session, base }.to_string()
}
