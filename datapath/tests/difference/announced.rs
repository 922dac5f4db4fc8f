//! A destination that announces what the test wants: a storage daemon that belongs to no SR.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use plugin::id::{ContentId, MirrorKey, VolumeKey};
use plugin::mirror::{self, Announcement, Base, How, MirrorRecord, Phase, Plan};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::link::Link;
use super::site::{MIB, Site, assert_same, eventually, layers, reason};

const SIZE: u64 = 32 * MIB;

/// A storage daemon with one image behind the export `e`. It is killed when dropped.
struct Target {
    child: Child,
    image: PathBuf,
    socket: PathBuf,
}

impl Target {
    /// Opens an image, and says of it what is given.
    fn start(directory: &Path, image: PathBuf, description: Option<&str>) -> Self {
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

    fn stop(&mut self) {
        let pid = rustix::process::Pid::from_raw(self.child.id().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A source with two snapshots below a volume, and somewhere for destinations.
struct Scene {
    site: Site,
    first: VolumeKey,
    second: VolumeKey,
    leaf: VolumeKey,
    directory: TempDir,
}

impl Scene {
    fn new() -> Self {
        Self::with(&json!({}))
    }

    fn with(settings: &Value) -> Self {
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
    fn target(&self, holds: Option<VolumeKey>, description: Option<&str>) -> Target {
        self.target_of(SIZE, holds, description)
    }

    fn target_of(&self, size: u64, holds: Option<VolumeKey>, description: Option<&str>) -> Target {
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

    fn mirror(&self, volume: VolumeKey, target: &Target) -> MirrorKey {
        self.site.mirror(volume, "-1", "e", &target.socket)
    }

    /// Mirrors to the end, and checks that the destination then holds the same.
    fn mirrored(&self, volume: VolumeKey, target: &mut Target) -> MirrorRecord {
        let key = self.mirror(volume, target);
        let record = self.site.wait(key, Phase::Finished);
        target.stop();
        assert_same(&self.site.chain(volume), target.image.to_str().unwrap());
        record
    }

    fn content(&self, volume: VolumeKey) -> ContentId {
        self.site.content(volume).unwrap()
    }

    /// Announces, in a session that nothing was sent in, what a volume of the source holds.
    fn promise(&self, holds: VolumeKey) -> String {
        announce(ContentId::random(), Base::Content(self.content(holds)))
    }

    /// Puts a link before a destination.
    fn link(&self, target: &Target) -> Link {
        Link::start(&target.image.with_extension("link"), target.socket.clone())
    }

    /// Checks that no job, node or export of a mirror is left in the daemon of a volume that is active, and that it
    /// serves its guest.
    fn assert_serves(&self, volume: VolumeKey) {
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
fn assert_sent(record: &MirrorRecord, bytes: u64) {
    let sent = record.progress.sent;
    assert!(sent >= bytes && sent < bytes + (64 << 10), "{sent} for {bytes}");
}

fn rand() -> u32 {
    uuid::Uuid::new_v4().as_fields().0
}

fn announce(session: ContentId, base: Base) -> String {
    Announcement { session, base }.to_string()
}

#[test]
fn a_destination_that_promises_nothing_is_sent_everything() {
    let scene = Scene::new();
    let content = scene.content(scene.first);
    let other =
        announce(ContentId::random(), Base::Content(content)).replace("xapi-storage-qcow2", "xapi-storage-lvm");
    for (description, words) in [
        (None, "announces nothing"),
        (Some("a disk"), "not of this product"),
        (Some(&*other), "not of this product"),
        (Some("xapi-storage-qcow2 session=1 base=2"), "not a lower-case uuid"),
        (Some(&*announce(ContentId::random(), Base::Unknown)), "does not know"),
        (Some(&*announce(ContentId::random(), Base::Content(ContentId::random()))), "not sent from here"),
    ] {
        let mut target = scene.target(None, description);
        let record = scene.mirrored(scene.second, &mut target);
        assert!(reason(&record).contains(words), "{record:?}");
        assert!(record.progress.sent > 8 * MIB, "{record:?}");
    }
}

#[test]
fn only_the_layers_above_what_the_destination_holds_are_sent() {
    let scene = Scene::new();
    for (volume, holds, expected, bytes) in [
        (scene.second, scene.first, 1, MIB),
        (scene.leaf, scene.second, 1, 2 * MIB),
        (scene.leaf, scene.first, 2, 3 * MIB),
    ] {
        let description = announce(ContentId::random(), Base::Content(scene.content(holds)));
        let mut target = scene.target(Some(holds), Some(&description));
        let record = scene.mirrored(volume, &mut target);
        assert_eq!(layers(&record), expected);
        assert_sent(&record, bytes);
        assert!((record.progress.fraction() - 1.0).abs() < 1e-6, "{:?}", record.progress);
    }
}

#[test]
fn a_live_leaf_is_sent_as_a_difference_with_all_that_its_guest_writes() {
    let scene = Scene::new();
    for holds in [scene.second, scene.first] {
        let description = scene.promise(holds);
        let mut target = scene.target(Some(holds), Some(&description));
        scene.site.activate(scene.leaf, "7");
        let key = scene.site.mirror(scene.leaf, "7", "e", &target.socket);
        scene.site.io(scene.leaf, &["write -P 6 3M 1M"]);
        scene.site.wait(key, Phase::Ready);
        scene.site.io(scene.leaf, &["write -P 7 12M 1M", "write -z 0 64k", "discard 1M 64k"]);
        let record = scene.site.finish(key);
        assert_eq!(record.phase, Phase::Finished, "{:?}", record.reason);
        assert_eq!(layers(&record), if holds == scene.second { 1 } else { 2 });
        assert!(record.progress.sent < 8 * MIB, "{:?}", record.progress);
        scene.assert_serves(scene.leaf);
        scene.site.io(scene.leaf, &["write -P 1 0 1"]);
        scene.site.release(scene.leaf, "7");
        // What the checks above wrote came after the end.
        write_both(&scene, &mut target, &["write -P 0x66 9M 64k", "write -P 1 0 1"]);
    }
}

/// Writes the same to the leaf and to a destination, and compares them.
fn write_both(scene: &Scene, target: &mut Target, commands: &[&str]) {
    scene.site.write(scene.leaf, commands);
    let uri = format!("nbd+unix:///e?socket={}", target.socket.display());
    let mut io = Command::new("qemu-io");
    for text in commands {
        io.args(["-c", text]);
    }
    assert!(io.args(["-f", "raw", &uri]).output().unwrap().status.success());
    target.stop();
    assert_same(&scene.site.chain(scene.leaf), target.image.to_str().unwrap());
}

#[test]
fn a_guest_that_was_resized_is_sent_as_a_difference_through_layers_of_every_size() {
    let scene = Scene::new();
    let size = SIZE + 16 * MIB;
    scene.site.grow(scene.leaf, size);
    scene.site.write(scene.leaf, &["write -P 9 40M 1M"]);
    let third = scene.site.snapshot(scene.leaf);
    scene.site.write(scene.leaf, &["write -P 10 31M 2M"]);
    for (volume, holds, expected) in
        [(third, scene.second, 1), (scene.leaf, scene.second, 2), (scene.leaf, scene.first, 3)]
    {
        let mut target = scene.target_of(size, Some(holds), Some(&scene.promise(holds)));
        assert_eq!(layers(&scene.mirrored(volume, &mut target)), expected);
    }
    // Of what is larger than the source nobody knows what lies beyond.
    let mut target = scene.target_of(size, Some(scene.first), Some(&scene.promise(scene.first)));
    let record = scene.mirrored(scene.second, &mut target);
    assert!(reason(&record).contains("another size"), "{record:?}");
    let target = scene.target_of(SIZE, Some(scene.first), Some(&scene.promise(scene.first)));
    let record = scene.site.wait(scene.mirror(scene.leaf, &target), Phase::Failed);
    assert!(record.reason.unwrap().contains("invalid size"));
}

#[test]
fn a_blank_destination_costs_the_data_and_not_the_size() {
    let scene = Scene::new();
    for size in [64 * MIB, 1 << 40] {
        let volume = scene.site.create(size);
        scene.site.write(volume, &["write -P 1 0 4M", "write -P 2 60M 2M", "write -z 8M 1M"]);
        for larger in [0, MIB] {
            let description = announce(ContentId::random(), Base::Blank);
            let mut target = scene.target_of(size + larger, None, Some(&description));
            let record = scene.site.wait(scene.mirror(volume, &target), Phase::Finished);
            assert_eq!(record.plan, Some(Plan::Blank));
            assert_sent(&record, 6 * MIB);
            target.stop();
            use std::os::unix::fs::MetadataExt;
            let taken = target.image.metadata().unwrap().blocks() * 512;
            assert!(taken < 7 * MIB, "{taken}");
            let blocks = target.image.to_str().unwrap().to_owned();
            if size < 1 << 40 {
                assert_same(&scene.site.chain(volume), &blocks);
            } else {
                check_pattern(&blocks);
            }
        }
    }
}

/// Checks what is written to a disk that is too large to be compared.
fn check_pattern(image: &str) {
    let mut io = Command::new("qemu-io");
    for text in ["read -P 1 0 4M", "read -P 0 4M 56M", "read -P 2 60M 2M", "read -P 0 62M 100M", "read -P 0 512G 4M"]
    {
        io.args(["-c", text]);
    }
    let output = io.args(["-r", "-f", "qcow2", image]).output().unwrap();
    assert!(!String::from_utf8_lossy(&output.stdout).contains("failed"), "{output:?}");
}

#[test]
fn a_live_leaf_on_a_blank_destination_is_sent_whole() {
    let scene = Scene::new();
    let mut target = scene.target(None, Some(&announce(ContentId::random(), Base::Blank)));
    scene.site.activate(scene.leaf, "7");
    let key = scene.site.mirror(scene.leaf, "7", "e", &target.socket);
    scene.site.io(scene.leaf, &["write -P 6 3M 1M", "write -z 0 1M"]);
    scene.site.wait(key, Phase::Ready);
    scene.site.io(scene.leaf, &["write -P 7 12M 1M", "write -z 1M 1M", "discard 3M 64k"]);
    let record = scene.site.finish(key);
    assert_eq!((record.phase, record.plan), (Phase::Finished, Some(Plan::Blank)), "{:?}", record.reason);
    scene.site.release(scene.leaf, "7");
    target.stop();
    assert_same(&scene.site.chain(scene.leaf), target.image.to_str().unwrap());
}

#[test]
fn what_was_sent_in_a_session_is_known_in_the_next_until_the_host_boots() {
    let scene = Scene::new();
    let session = ContentId::random();
    let mut target = scene.target(None, Some(&announce(session, Base::Blank)));
    scene.mirrored(scene.first, &mut target);
    for lost in [false, true] {
        if lost {
            std::fs::remove_dir_all(scene.site.host.runtime_dir().join("sessions")).unwrap();
        }
        let description = announce(ContentId::random(), Base::Content(session));
        let mut target = scene.target(Some(scene.first), Some(&description));
        let record = scene.mirrored(scene.second, &mut target);
        match lost {
            false => assert_eq!(layers(&record), 1),
            true => assert!(reason(&record).contains("not sent from here")),
        }
    }
}

#[test]
fn a_session_that_was_begun_is_never_trusted_again() {
    let scene = Scene::new();
    let session = ContentId::random();
    let promise = announce(session, Base::Content(scene.content(scene.first)));
    // Begun and broken off.
    let mut target = scene.target(Some(scene.first), Some(&promise));
    let link = scene.link(&target);
    link.cut_after(MIB / 2);
    let key = scene.site.mirror(scene.second, "-1", "e", link.socket());
    assert_eq!(layers(&scene.site.wait(key, Phase::Failed)), 1);
    // Another node, into what is announced as before.
    let record = scene.mirrored(scene.leaf, &mut target);
    assert!(reason(&record).contains("was sent"), "{record:?}");
    // Nor is what the session left known.
    let description = announce(ContentId::random(), Base::Content(session));
    let mut target = scene.target(Some(scene.leaf), Some(&description));
    let leaf = scene.site.snapshot(scene.leaf);
    scene.site.write(scene.leaf, &["write -P 11 5M 1M"]);
    let record = scene.mirrored(scene.leaf, &mut target);
    assert!(reason(&record).contains("not sent from here"), "{record:?}");
    scene.site.destroy(leaf);
}

#[test]
fn what_was_sent_to_a_larger_destination_is_not_all_that_it_holds() {
    let scene = Scene::new();
    let size = SIZE + 16 * MIB;
    let session = ContentId::random();
    let target = scene.target_of(size, None, Some(&announce(session, Base::Unknown)));
    let record = scene.site.wait(scene.mirror(scene.first, &target), Phase::Finished);
    assert!(reason(&record).contains("does not know"), "{record:?}");
    scene.site.grow(scene.leaf, size);
    let mut target = scene.target_of(size, None, Some(&announce(ContentId::random(), Base::Content(session))));
    let record = scene.mirrored(scene.leaf, &mut target);
    assert!(reason(&record).contains("not sent from here"), "{record:?}");
}

#[test]
fn what_another_host_sent_is_not_taken_for_ones_own() {
    let scene = Scene::new();
    let other = Site::new(scene.directory.path(), "o", &json!({}));
    let session = ContentId::random();
    let mut target = scene.target(None, Some(&announce(session, Base::Blank)));
    scene.mirrored(scene.first, &mut target);
    let volume = other.create(SIZE);
    other.write(volume, &["write -P 21 0 1M"]);
    other.snapshot(volume);
    let description = announce(ContentId::random(), Base::Content(session));
    let mut target = scene.target(Some(scene.first), Some(&description));
    let key = other.mirror(volume, "-1", "e", &target.socket);
    let record = other.wait(key, Phase::Finished);
    assert!(reason(&record).contains("not sent from here"), "{record:?}");
    target.stop();
    assert_same(&other.chain(volume), target.image.to_str().unwrap());
}

#[test]
fn differences_can_be_switched_off() {
    let scene = Scene::with(&json!({"difference": false}));
    let mut target = scene.target(Some(scene.first), Some(&scene.promise(scene.first)));
    let record = scene.mirrored(scene.second, &mut target);
    assert!(reason(&record).contains("difference is off"), "{record:?}");
}

#[test]
fn a_destination_that_lies_is_caught_by_verifying_and_only_by_that() {
    for (verify, phase) in [(false, Phase::Finished), (true, Phase::Failed)] {
        let scene = Scene::with(&json!({"verify": verify}));
        let description = scene.promise(scene.first);
        let target = scene.target(None, Some(&description));
        let record = scene.site.wait(scene.mirror(scene.second, &target), phase);
        assert_eq!(layers(&record), 1);
        if verify {
            assert!(record.reason.unwrap().contains("differ at byte 0"));
        }
        let target = scene.target(Some(scene.second), Some(&announce(ContentId::random(), Base::Blank)));
        let volume = scene.site.create(SIZE);
        scene.site.wait(scene.mirror(volume, &target), phase);
    }
}

#[test]
fn what_is_verified_and_right_is_complete_and_leaves_nothing() {
    let scene = Scene::with(&json!({"verify": true}));
    let mut target = scene.target(Some(scene.first), Some(&scene.promise(scene.first)));
    scene.mirrored(scene.leaf, &mut target);
    let mut target = scene.target(Some(scene.first), Some(&scene.promise(scene.first)));
    scene.site.activate(scene.leaf, "7");
    let key = scene.site.mirror(scene.leaf, "7", "e", &target.socket);
    scene.site.wait(key, Phase::Ready);
    scene.site.io(scene.leaf, &["write -P 6 3M 1M"]);
    scene.site.path("deactivate", scene.leaf, "7");
    let record = scene.site.record(key);
    assert_eq!((record.phase, layers(&record)), (Phase::Finished, 2), "{:?}", record.reason);
    scene.site.path("detach", scene.leaf, "7");
    target.stop();
    assert_same(&scene.site.chain(scene.leaf), target.image.to_str().unwrap());
}

#[test]
fn a_mirror_of_several_layers_can_be_ended_at_any_place_and_leaves_nothing() {
    let scene = Scene::new();
    scene.site.activate(scene.leaf, "7");
    // Within the first layer, in its flush, within the second, and in the first bytes of all.
    for bytes in [40, 300, MIB / 2, MIB + 700, 2 * MIB] {
        for how in ["cut", "stall", "kill"] {
            let target = scene.target(Some(scene.first), Some(&scene.promise(scene.first)));
            let link = scene.link(&target);
            match how {
                "cut" => link.cut_after(bytes),
                _ => link.stall_after(bytes),
            }
            let key = scene.site.mirror(scene.leaf, "7", "e", link.socket());
            match how {
                "cut" => drop(scene.site.wait(key, Phase::Failed)),
                "stall" => {
                    eventually("progress", || (link.passed() >= bytes).then_some(()));
                    let record = mirror::end(&scene.site.host, &scene.site.record(key), How::Cancel, "test").unwrap();
                    assert_eq!(record.phase, Phase::Cancelled, "{:?}", record.reason);
                }
                _ => {
                    eventually("progress", || (link.passed() >= bytes).then_some(()));
                    let process = scene.site.record(key).supervisor.unwrap();
                    process.kill(&scene.site.host, std::time::Duration::from_secs(20)).unwrap();
                    link.cut();
                    mirror::reap(&scene.site.host, scene.leaf).unwrap();
                }
            }
            scene.assert_serves(scene.leaf);
        }
    }
    let snapshot = scene.site.snapshot(scene.leaf);
    scene.site.release(scene.leaf, "7");
    scene.site.destroy(snapshot);
}

#[test]
fn progress_never_goes_back_over_several_layers() {
    let scene = Scene::new();
    let target = scene.target(Some(scene.first), Some(&scene.promise(scene.first)));
    let link = scene.link(&target);
    link.slow(4 * MIB);
    let key = scene.site.mirror(scene.leaf, "-1", "e", link.socket());
    let (mut last, mut jobs) = (0.0, std::collections::BTreeSet::new());
    let record = eventually("end", || {
        let record = scene.site.record(key);
        let fraction = record.progress.fraction();
        assert!(fraction >= last, "{fraction} after {last}");
        last = fraction;
        jobs.insert((record.progress.earlier, record.progress.later));
        record.phase.is_terminal().then_some(record)
    });
    assert_eq!((record.phase, layers(&record)), (Phase::Finished, 2));
    assert!(jobs.len() >= 2, "{jobs:?}");
}
