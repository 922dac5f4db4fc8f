//! The mirror's supervisor against real storage daemons, through a link that can be cut, stalled and slowed.

#![expect(clippy::unwrap_used, reason = "a test ends where it fails")]

mod daemon;
mod eventually;
mod link;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use daemon::Daemon;
use eventually::eventually;
use link::Link;
use plugin::host::Host;
use plugin::id::{MirrorKey, NodeId, SrUuid, VolumeKey, VolumeUri};
use plugin::mirror::{self, How, MirrorRecord, Phase};
use rustix::process::Signal;
use tempfile::TempDir;

const SIZE: u64 = 32 << 20;

/// A source and a destination, each a qcow2 file in a storage daemon of its own, and a link between them.
struct Scene {
    source: Daemon,
    destination: Daemon,
    link: Link,
    host: Host,
    node: NodeId,
    volume: VolumeKey,
    supervisors: Vec<Child>,
    dir: TempDir,
}

impl Scene {
    /// Sets up the two daemons with a source full of data; `settings` are the host's.
    fn new(settings: &str) -> Self {
        Self::with_destination_size(settings, SIZE)
    }

    fn with_destination_size(settings: &str, size: u64) -> Self {
        let dir = tempfile::Builder::new().prefix("mir-").tempdir_in("/tmp").unwrap();
        let host = Host::at(dir.path());
        let (node, volume) = (NodeId::random(), VolumeKey::random());
        fs::create_dir(dir.path().join("etc")).unwrap();
        fs::write(dir.path().join("etc/xapi-storage-qcow2.json"), settings).unwrap();
        host.make_runtime_dir(&host.volume_dir(volume)).unwrap();
        let source_image = dir.path().join("source.qcow2");
        let destination_image = dir.path().join("destination.qcow2");
        daemon::create(&source_image, SIZE);
        daemon::create(&destination_image, size);
        daemon::io(&source_image, &["write -P 0x5a 0 20M", "write -z 20M 1M", "write -P 0x77 30M 1M"]);
        let node_name = plugin::qemu::graph::node_name(node);
        let source = Daemon::start(&host.volume_dir(volume), &source_image, &node_name);
        let destination = Daemon::start(&dir.path().join("d"), &destination_image, "d");
        let link = Link::start(&dir.path().join("link.sock"), destination.nbd());
        Self { source, destination, link, host, node, volume, supervisors: Vec::new(), dir }
    }

    /// Starts a supervisor on a mirror, and gives the mirror's key.
    fn mirror(&mut self, live: bool) -> MirrorKey {
        let key = self.recorded(live);
        self.supervise(key);
        key
    }

    /// Records a mirror that has no supervisor yet, and gives its key.
    fn recorded(&mut self, live: bool) -> MirrorKey {
        let uri = VolumeUri { sr: SrUuid::random(), volume: self.volume };
        let remote = format!("nbd+unix:///e?socket={}", self.link.socket().display());
        let record = MirrorRecord::new(uri, self.node, "7".parse().unwrap(), remote);
        let mut record = MirrorRecord { live, ..record };
        self.host.make_runtime_dir(&self.host.mirror_dir(record.key)).unwrap();
        record.store(&self.host).unwrap();
        record.key
    }

    fn supervise(&mut self, key: MirrorKey) {
        let child = Command::new(env!("CARGO_BIN_EXE_xapi-storage-qcow2-datapath"))
            .args(["mirror-supervisor", &key.to_string()])
            .env("XAPI_STORAGE_QCOW2_ROOT", self.dir.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        self.supervisors.push(child);
    }

    fn record(&self, key: MirrorKey) -> MirrorRecord {
        MirrorRecord::load(&self.host, key).unwrap().unwrap()
    }

    /// Gives what Data.stat prints.
    fn stat(&self, key: MirrorKey) -> String {
        let mut child = Command::new(env!("CARGO_BIN_EXE_xapi-storage-qcow2-datapath"))
            .args(["Data.stat", "--json"])
            .env("XAPI_STORAGE_QCOW2_ROOT", self.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let request = format!(r#"{{"dbg": "t", "operation": ["MirrorV1", "{key}"]}}"#);
        child.stdin.take().unwrap().write_all(request.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    }

    /// Waits until the mirror is in one of the phases.
    fn wait_for(&self, key: MirrorKey, phases: &[Phase]) -> MirrorRecord {
        eventually(&format!("mirror in {phases:?}"), || {
            let record = self.record(key);
            assert!(
                phases.contains(&record.phase) || !record.phase.is_terminal(),
                "ended as {:?}: {:?}",
                record.phase,
                record.reason
            );
            phases.contains(&record.phase).then_some(record)
        })
    }

    /// Checks with QEMU's own tool that both images have the same content.
    fn assert_identical(&mut self) {
        self.source.stop();
        self.destination.stop();
        daemon::compare(&self.dir.path().join("source.qcow2"), &self.dir.path().join("destination.qcow2"));
    }

    /// Checks that the daemon has neither the job nor the mirror's nodes any more, and still serves the guest.
    fn assert_source_serves(&self) {
        let names = self.source.node_names();
        assert!(!names.iter().any(|name| name.starts_with("mirror-")), "{names:?}");
        assert!(self.source.jobs().is_empty());
        self.source.write(0x11, "1M", "64k");
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for child in &mut self.supervisors {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn socket_exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

#[test]
fn a_mirror_that_was_ended_before_its_supervisor_began_stays_ended() {
    let mut scene = Scene::new("{}");
    let key = scene.recorded(true);
    let ended = mirror::end(&scene.host, &scene.record(key), How::Cancel, "another was started").unwrap();
    assert_eq!(ended.phase, Phase::Failed);
    scene.supervise(key);
    assert!(scene.supervisors.last_mut().unwrap().wait().unwrap().success());
    assert_eq!(scene.record(key), ended);
    assert!(!MirrorRecord::supervisor_lock(&scene.host, key).exists());
    scene.assert_source_serves();
}

#[test]
fn a_source_nobody_writes_to_finishes_by_itself_identical() {
    let mut scene = Scene::new("{}");
    let key = scene.mirror(false);
    let record = scene.wait_for(key, &[Phase::Finished]);
    assert!(record.progress.sent > 20 << 20 && record.progress.received > 0, "{:?}", record.progress);
    eventually("end of the supervisor", || scene.supervisors[0].try_wait().unwrap());
    assert!(!socket_exists(&scene.host.mirror_dir(key).join("relay.sock")));
    assert!(!socket_exists(&scene.host.mirror_dir(key).join("control.sock")));
    scene.assert_identical();
}

#[test]
fn a_live_source_goes_on_until_it_is_finished_and_then_has_every_write() {
    let mut scene = Scene::new("{}");
    let key = scene.mirror(true);
    scene.wait_for(key, &[Phase::Ready]);
    scene.source.write(0x22, "3M", "4M");
    scene.source.write(0x33, "25M", "1M");
    let record = mirror::end(&scene.host, &scene.record(key), How::Finish, "test").unwrap();
    assert_eq!(record.phase, Phase::Finished);
    scene.assert_source_serves();
    // What the check above wrote came after the end.
    scene.source.write(0x22, "3M", "4M");
    scene.destination.write(0x11, "1M", "64k");
    scene.assert_identical();
}

#[test]
fn finishing_a_mirror_that_is_not_complete_cancels_it() {
    let mut scene = Scene::new("{}");
    scene.link.stall_after(4 << 20);
    let key = scene.mirror(true);
    scene.wait_for(key, &[Phase::Copying]);
    let record = mirror::end(&scene.host, &scene.record(key), How::Finish, "test").unwrap();
    assert_eq!(record.phase, Phase::Cancelled);
    assert_eq!(record.reason.as_deref(), Some("test"));
    scene.assert_source_serves();
}

#[test]
fn a_mirror_can_be_cancelled_before_its_peer_answers() {
    let mut scene = Scene::new("{}");
    scene.link.stall_after(0);
    let key = scene.mirror(true);
    scene.wait_for(key, &[Phase::Connecting]);
    let record = mirror::end(&scene.host, &scene.record(key), How::Cancel, "test").unwrap();
    assert_eq!(record.phase, Phase::Cancelled);
    scene.assert_source_serves();
}

#[test]
fn a_connection_cut_at_any_stage_fails_the_mirror_and_nothing_else() {
    for bytes in [0, 17, 18, 40, 100, 300, 5 << 20] {
        let mut scene = Scene::new("{}");
        scene.link.cut_after(bytes);
        let key = scene.mirror(true);
        let record = scene.wait_for(key, &[Phase::Failed]);
        assert!(record.reason.is_some());
        scene.assert_source_serves();
    }
}

#[test]
fn a_server_that_says_anything_wrong_is_never_believed_to_have_everything() {
    // The greeting, what it says of the export to the supervisor and to QEMU, and answers to writes.
    for byte in [0, 9, 17, 21, 33, 38, 60, 90, 130, 170, 210, 300, 500] {
        let mut scene = Scene::new(r#"{"peer_silence_seconds": 2, "handshake_seconds": 2}"#);
        scene.link.spoil(byte);
        let key = scene.mirror(false);
        let record = scene.wait_for(key, &[Phase::Failed, Phase::Finished]);
        scene.assert_source_serves();
        // What no one reads may be wrong.
        if record.phase == Phase::Finished {
            scene.destination.stop();
            scene.source.stop();
            daemon::io(&scene.dir.path().join("destination.qcow2"), &["read -P 0x5a 0 20M", "read -P 0x77 30M 1M"]);
        } else {
            assert!(record.reason.is_some(), "{byte}");
        }
    }
}

#[test]
fn a_connection_cut_when_the_mirror_was_complete_fails_it_and_must_be_told() {
    let mut scene = Scene::new("{}");
    let key = scene.mirror(true);
    scene.wait_for(key, &[Phase::Ready]);
    scene.link.cut();
    let record = scene.wait_for(key, &[Phase::Failed]);
    assert!(record.must_be_told(&scene.host));
    scene.assert_source_serves();
    let domain = "7".parse().unwrap();
    for _ in 0..2 {
        let error = mirror::before_deactivate(&scene.host, scene.volume, &domain, true).unwrap_err();
        assert!(matches!(error, plugin::Error::MirrorBroken { .. }), "{error}");
    }
    mirror::end_for_snapshot(&scene.host, scene.volume).unwrap();
    mirror::before_deactivate(&scene.host, scene.volume, &domain, true).unwrap();
}

#[test]
fn a_destination_killed_and_started_again_never_ends_in_success() {
    let mut scene = Scene::new("{}");
    let key = scene.mirror(true);
    scene.wait_for(key, &[Phase::Ready]);
    scene.destination.kill();
    scene.destination.restart();
    scene.source.write(0x44, "2M", "1M");
    scene.wait_for(key, &[Phase::Failed]);
    scene.assert_source_serves();
}

#[test]
fn a_peer_that_falls_silent_fails_the_mirror_while_the_guest_goes_on() {
    for bytes in [0, 10, 18, 100, 5 << 20] {
        let mut scene = Scene::new(r#"{"peer_silence_seconds": 1, "handshake_seconds": 1}"#);
        scene.link.stall_after(bytes);
        let key = scene.mirror(true);
        let record = scene.wait_for(key, &[Phase::Failed]);
        assert!(record.reason.unwrap().contains("seconds"));
        scene.assert_source_serves();
    }
}

#[test]
fn a_peer_that_falls_silent_when_complete_holds_up_neither_guest_nor_drain_for_long() {
    let mut scene = Scene::new(r#"{"drain_seconds": 1}"#);
    let key = scene.mirror(true);
    scene.wait_for(key, &[Phase::Ready]);
    scene.link.stall();
    scene.source.write(0x55, "2M", "1M");
    let record = mirror::end(&scene.host, &scene.record(key), How::Finish, "test").unwrap();
    assert_eq!(record.phase, Phase::Failed, "{:?}", record.reason);
    assert!(record.must_be_told(&scene.host));
    scene.assert_source_serves();
}

/// Waits until a guest that outruns its link is slowed.
fn wait_until_slowed(scene: &Scene, key: MirrorKey) {
    let record = eventually("a slower guest", || {
        let record = scene.record(key);
        (record.pace.is_some() || record.phase.is_terminal()).then_some(record)
    });
    assert!(record.pace.is_some(), "{:?}", record.reason);
}

#[test]
fn a_guest_that_outruns_the_link_is_slowed_until_the_mirror_is_complete_and_over() {
    let mut scene = Scene::new("{}");
    scene.link.slow(8 << 20);
    let writer = scene.source.writer();
    let key = scene.mirror(true);
    wait_until_slowed(&scene, key);
    assert!(scene.source.write_limits() > (0, 0));
    scene.wait_for(key, &[Phase::Ready]);
    writer.finish();
    let record = mirror::end(&scene.host, &scene.record(key), How::Finish, "test").unwrap();
    assert_eq!(record.phase, Phase::Finished, "{:?}", record.reason);
    assert_eq!(scene.source.write_limits(), (0, 0));
    scene.assert_identical();
}

#[test]
fn a_slowed_guest_does_not_wait_for_a_silent_peer_and_has_its_pace_back_when_the_mirror_fails() {
    let mut scene = Scene::new(r#"{"peer_silence_seconds": 2}"#);
    scene.link.slow(4 << 20);
    let writer = scene.source.writer();
    let key = scene.mirror(true);
    wait_until_slowed(&scene, key);
    scene.link.stall();
    scene.wait_for(key, &[Phase::Failed]);
    writer.finish();
    assert_eq!(scene.source.write_limits(), (0, 0));
    scene.assert_source_serves();
}

#[test]
fn a_guest_has_its_pace_back_when_a_killed_supervisor_is_found_dead() {
    let mut scene = Scene::new("{}");
    scene.link.slow(4 << 20);
    let writer = scene.source.writer();
    let key = scene.mirror(true);
    wait_until_slowed(&scene, key);
    scene.supervisors[0].kill().unwrap();
    scene.supervisors[0].wait().unwrap();
    assert!(scene.stat(key).contains(r#""failed":true"#));
    assert_eq!(scene.source.write_limits(), (0, 0));
    writer.finish();
    scene.assert_source_serves();
}

#[test]
fn a_killed_supervisor_leaves_a_failed_mirror_and_a_volume_that_can_be_mirrored_again() {
    let mut scene = Scene::new("{}");
    let key = scene.mirror(true);
    scene.wait_for(key, &[Phase::Ready]);
    scene.supervisors[0].kill().unwrap();
    scene.supervisors[0].wait().unwrap();
    assert!(!scene.record(key).status(&scene.host).is_running());
    assert!(scene.record(key).must_be_told(&scene.host));
    let record = mirror::end(&scene.host, &scene.record(key), How::Finish, "test").unwrap();
    assert_eq!(record.phase, Phase::Failed);
    scene.assert_source_serves();
    let key = scene.mirror(false);
    scene.wait_for(key, &[Phase::Finished]);
    scene.assert_identical();
}

#[test]
fn a_stopped_supervisor_is_killed_by_whoever_ends_its_mirror() {
    let mut scene = Scene::new(r#"{"drain_seconds": 1}"#);
    let key = scene.mirror(true);
    scene.wait_for(key, &[Phase::Ready]);
    daemon::signal(scene.supervisors[0].id(), Signal::STOP);
    let record = mirror::end(&scene.host, &scene.record(key), How::Cancel, "test").unwrap();
    assert_eq!(record.phase, Phase::Failed);
    scene.assert_source_serves();
}

#[test]
fn a_killed_storage_daemon_fails_the_mirror() {
    let mut scene = Scene::new("{}");
    let key = scene.mirror(true);
    scene.wait_for(key, &[Phase::Ready]);
    scene.source.kill();
    scene.wait_for(key, &[Phase::Failed]);
}

#[test]
fn a_destination_of_another_size_is_refused_when_smaller_and_filled_when_larger() {
    let mut scene = Scene::with_destination_size("{}", SIZE - (1 << 20));
    let key = scene.mirror(false);
    let record = scene.wait_for(key, &[Phase::Failed]);
    assert!(record.reason.unwrap().contains("invalid size"));
    scene.assert_source_serves();

    let mut scene = Scene::with_destination_size("{}", SIZE + (1 << 20));
    let key = scene.mirror(false);
    scene.wait_for(key, &[Phase::Finished]);
    scene.assert_identical();
}

#[test]
fn a_peer_without_the_export_is_named_in_the_reason() {
    let mut scene = Scene::new("{}");
    scene.destination.remove_export();
    let key = scene.mirror(false);
    let record = scene.wait_for(key, &[Phase::Failed]);
    assert!(record.reason.unwrap().contains("no export \"e\""));
}
