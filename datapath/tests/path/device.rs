//! Block devices: what is written to them arrives, and whatever dies, nothing of them is left and nobody hangs.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use plugin::attachment::Attachment;
use plugin::device::{self, Connection, Loop, Mark, kernel};
use plugin::store::Mode;
use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, kill_process};

use super::scene::{SIZE, Scene, answer};

/// What calls may take at most when something hangs, on a busy machine.
fn bound() -> Duration {
    Duration::from_secs(60 * slowness())
}

/// How many times slower this machine is than others: tests/machine.sh emulates one.
fn slowness() -> u64 {
    std::env::var("TESTED_SLOWNESS").map_or(1, |times| times.parse().unwrap())
}

/// The variable that says what devices are made with, which tests/machine.sh sets: `nbd`, or by default `loop`.
const DRIVER: &str = "TESTED_DEVICE";

fn driver() -> &'static str {
    if is_nbd() { "nbd" } else { "loop" }
}

/// Tells whether devices are those of the kernel's nbd driver.
fn is_nbd() -> bool {
    std::env::var_os(DRIVER).is_some_and(|driver| driver == "nbd")
}

/// A scene whose volume is shown as a block device. When it is dropped, no loop device of it is left.
struct Devices {
    scene: Scene,
    mark: Mark,
    /// The connections of nbd devices that were seen.
    seen: RefCell<BTreeMap<u32, Connection>>,
}

impl Devices {
    fn new() -> Self {
        Self::with_patience(3)
    }

    fn with_patience(seconds: u64) -> Self {
        let needed = if is_nbd() { &["/sbin/modprobe"][..] } else { &["/dev/fuse", "/dev/loop-control"] };
        assert!(needed.iter().all(|path| Path::new(path).exists()), "block devices need {needed:?}");
        let scene = Scene::new();
        let devices = format!(r#""block_device": "always", "block_device_driver": "{}""#, driver());
        let settings = format!(r#"{{"gc": false, {devices}, "qmp_seconds": {}}}"#, seconds * slowness());
        fs::write(scene.host.root().join("etc/xapi-storage-qcow2.json"), settings).unwrap();
        scene.call("Datapath.attach", "7");
        let mark = Mark::of(scene.uri.volume, &scene.directory_of_volume()).unwrap();
        Self { scene, mark, seen: RefCell::default() }
    }

    /// The path that attach tells.
    fn path(&self) -> PathBuf {
        device::path(&self.scene.host, self.scene.uri.volume)
    }

    /// The loop devices that are bound for the volume.
    fn loops(&self) -> Vec<Loop> {
        Loop::marked(&self.mark, &device::file(&self.scene.directory_of_volume())).unwrap()
    }

    /// How many devices of the kernel's are there for the volume.
    fn count(&self) -> usize {
        if !is_nbd() {
            return self.loops().len();
        }
        let found = kernel::connection(&self.scene.directory_of_volume()).unwrap();
        let mut seen = self.seen.borrow_mut();
        seen.extend(found.filter(|found| found.ready).map(|found| (found.number, found)));
        seen.values().filter(|connection| connection.is_held().unwrap()).count()
    }

    /// The process whose command line has a word.
    fn pid(&self, word: &str) -> Pid {
        let pids = self.scene.processes().into_iter().filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.windows(word.len()).any(|window| window == word.as_bytes())
        });
        Pid::from_raw(pids.max().unwrap()).unwrap()
    }

    fn signal(&self, word: &str, signal: Signal) {
        kill_process(self.pid(word), signal).unwrap();
    }

    /// Opens the device so that nothing is kept on the way.
    fn open(&self) -> File {
        // Who keeps it open keeps it from being another's.
        self.count();
        let direct = OFlags::DIRECT.bits().cast_signed();
        OpenOptions::new().read(true).write(true).custom_flags(direct).open(self.path()).unwrap()
    }

    /// Waits until so many are bound: who looks for theirs has others' open for a moment, and they are cleared after that.
    fn wait_for(&self, count: usize) {
        let deadline = Instant::now() + bound();
        while self.count() != count {
            assert!(Instant::now() < deadline, "{:?} {:?}", self.loops(), self.seen);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Checks that there is no device any more, though the daemon may run.
    fn assert_no_device(&self) {
        assert!(self.loops().is_empty() && self.count() == 0);
        assert!(self.path().symlink_metadata().is_err());
        assert!(!device::file(&self.scene.directory_of_volume()).exists());
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.scene.host.root().to_str().unwrap()), "{mounts}");
    }

    /// Ends what there is and checks that nothing is left.
    fn end(&self) {
        self.scene.call("Datapath.deactivate", "7");
        self.assert_no_device();
        self.scene.call("Datapath.detach", "7");
        self.assert_no_device();
        self.scene.assert_nothing_left();
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        let servers = self.scene.processes();
        for pid in servers {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
        for left in self.loops() {
            let _ = left.clear(&self.mark);
        }
    }
}

/// A file system on a device, unmounted when this is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(devices: &Devices) -> Self {
        let directory = devices.scene.host.root().join("mnt");
        fs::create_dir_all(&directory).unwrap();
        run(Command::new("mount").arg(devices.path()).arg(&directory));
        Self(directory)
    }

    fn unmount(self) {
        run(Command::new("umount").arg(&self.0));
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-q", "-l"]).arg(&self.0).status();
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A block for a device without a page cache.
#[repr(align(4096))]
struct Block([u8; 4096]);

#[test]
fn the_path_is_known_at_attach_and_there_from_activate_to_deactivate() {
    let devices = Devices::new();
    let scene = &devices.scene;
    let path = devices.path();
    for _ in 0..2 {
        let answer = scene.call("Datapath.attach", "7");
        let implementations = answer["implementations"].as_array().unwrap();
        assert_eq!(implementations.len(), 3);
        assert_eq!(implementations[0][0], "XenDisk");
        assert_eq!(implementations[0][1]["backend_type"], "vbd");
        assert_eq!(implementations[0][1]["params"], path.to_str().unwrap());
        assert_eq!(implementations[1], serde_json::json!(["BlockDevice", {"path": path}]));
        assert_eq!(implementations[2][0], "Nbd");
        devices.assert_no_device();
    }
    // Before, between and after: the same path, and each call twice.
    for _ in 0..2 {
        for _ in 0..2 {
            scene.call("Datapath.activate", "7");
            assert_eq!(devices.count(), 1);
            let size = rustix::fs::seek(devices.open(), rustix::fs::SeekFrom::End(0)).unwrap();
            assert_eq!(size, SIZE);
        }
        let is_for_root_alone = |path: &Path, mode| fs::metadata(path).unwrap().permissions().mode() & 0o777 == mode;
        assert!(is_for_root_alone(&device::file(&scene.directory_of_volume()), 0o600));
        assert!(is_for_root_alone(path.parent().unwrap(), 0o700));
        for _ in 0..2 {
            scene.call("Datapath.deactivate", "7");
            devices.assert_no_device();
        }
    }
    devices.end();
}

#[test]
fn who_is_given_a_device_is_a_matter_of_the_host_and_the_domain() {
    let devices = Devices::new();
    let scene = &devices.scene;
    let settings = scene.host.root().join("etc/xapi-storage-qcow2.json");
    let with = |who| format!(r#"{{"block_device": "{who}", "block_device_driver": "{}"}}"#, driver());
    let is_told = |domain| scene.call("Datapath.attach", domain)["implementations"][1][0] == "BlockDevice";
    assert!(is_told("7") && is_told("u0_vbd_0_xvda") && is_told("0"));
    for migration in ["MIR0a1b2c", "CP0a1b2c"] {
        assert!(!is_told(migration));
        scene.call("Datapath.activate", migration);
        devices.assert_no_device();
        scene.call("Datapath.detach", migration);
    }
    fs::write(&settings, with("never")).unwrap();
    assert!(!is_told("7"));
    scene.call("Datapath.activate", "7");
    devices.assert_no_device();
    scene.call("Datapath.deactivate", "7");
    fs::write(&settings, with("auto")).unwrap();
    assert!(!is_told("7"));
    let xen = scene.host.root().join("proc/xen");
    fs::create_dir_all(&xen).unwrap();
    fs::write(xen.join("capabilities"), "control_d\n").unwrap();
    assert!(is_told("7") && is_told("0") && is_told("u0_vbd_0_xvda"));
    // xapi has a way of its own for dom0 there.
    let manager = scene.host.root().join("opt/xensource/libexec/nbd_client_manager.py");
    fs::create_dir_all(manager.parent().unwrap()).unwrap();
    fs::write(manager, "").unwrap();
    assert!(is_told("7") && !is_told("0") && !is_told("u0_vbd_0_xvda"));
    fs::write(xen.join("capabilities"), "\n").unwrap();
    assert!(!is_told("7"));
    fs::write(&settings, r#"{"gc": false}"#).unwrap();
    for domain in ["0", "u0_vbd_0_xvda"] {
        scene.call("Datapath.detach", domain);
    }
    devices.end();
}

#[test]
fn what_is_flushed_on_a_device_survives_the_daemon() {
    let devices = Devices::new();
    devices.scene.call("Datapath.activate", "7");
    let device = devices.open();
    for place in 0..8 {
        device.write_all_at(&Block([place as u8 + 1; 4096]).0, place * (1 << 20)).unwrap();
    }
    device.sync_all().unwrap();
    // Its tables are in its memory: without the flush it takes them along.
    devices.signal("qmp.sock", Signal::KILL);
    let lost = device.write_all_at(&Block([9; 4096]).0, 0).and_then(|()| device.sync_all());
    assert!(lost.is_err());
    drop(device);
    devices.scene.call("Datapath.activate", "7");
    for place in 0..8_u64 {
        assert!(devices.scene.io(&format!("read -P {} {}M 4k", place + 1, place)), "{place}");
    }
    devices.end();
}

#[test]
fn zeroes_and_discards_on_a_device_are_zeroes_in_the_volume_and_take_no_space() {
    let devices = Devices::new();
    devices.scene.call("Datapath.activate", "7");
    let device = devices.open();
    let space = || {
        let loaded = devices.scene.sr.load(devices.scene.uri.volume).unwrap();
        let node = loaded.volume(devices.scene.uri.volume).unwrap().node;
        let path = devices.scene.sr.path.join("volumes").join(devices.scene.uri.volume.to_string());
        std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path.join(format!("{node}.qcow2"))).unwrap())
    };
    // Linux 6.10 is the first whose nbd driver has a request for zeroes; before it they are written.
    let freed = if is_nbd() { 1 } else { 2 };
    // By way of the page cache, in large requests.
    let written = OpenOptions::new().write(true).open(devices.path()).unwrap();
    written.write_all_at(&vec![5; SIZE as usize], 0).unwrap();
    written.sync_all().unwrap();
    drop(written);
    let full = space();
    for (option, offset) in [("--zeroout", "1MiB"), ("--discard", "4MiB")] {
        let mut command = Command::new("blkdiscard");
        if option == "--zeroout" {
            command.arg(option);
        }
        run(command.args(["-o", offset, "-l", "2MiB"]).arg(devices.path()));
        assert!(devices.scene.io(&format!("read -P 0 {} 2M", offset.trim_end_matches("iB"))), "{option}");
    }
    device.sync_all().unwrap();
    assert!(space() + freed * 2048 * 3 / 2 < full, "{} of {full}", space());
    drop(device);
    devices.end();
}

#[test]
fn a_file_system_whose_daemon_is_killed_gives_errors_and_is_whole_afterwards() {
    let devices = Devices::new();
    devices.scene.call("Datapath.activate", "7");
    run(Command::new("mkfs.ext4").arg("-q").arg(devices.path()));
    let mounted = Mounted::new(&devices);
    fs::write(mounted.0.join("kept"), "kept").unwrap();
    run(Command::new("sync").arg("-f").arg(&mounted.0));
    let mut writer = File::create(mounted.0.join("lost")).unwrap();
    writer.write_all(&[1; 1 << 20]).unwrap();
    let begun = Instant::now();
    devices.signal("qmp.sock", Signal::KILL);
    assert!(writer.sync_all().is_err());
    drop(writer);
    // With the file system still mounted: nobody waits for it.
    devices.scene.call("Datapath.deactivate", "7");
    assert!(devices.path().symlink_metadata().is_err());
    devices.scene.call("Datapath.detach", "7");
    devices.scene.assert_nothing_left();
    assert!(begun.elapsed() < bound());
    // The last one that has it open takes the device along.
    mounted.unmount();
    devices.wait_for(0);
    devices.scene.call("Datapath.activate", "7");
    let mounted = Mounted::new(&devices);
    assert_eq!(fs::read(mounted.0.join("kept")).unwrap(), b"kept");
    mounted.unmount();
    run(Command::new("e2fsck").arg("-fn").arg(devices.path()));
    devices.end();
}

#[test]
fn a_device_whose_server_was_killed_is_made_anew_and_its_volume_goes_on() {
    let devices = Devices::new();
    devices.scene.call("Datapath.activate", "7");
    let device = devices.open();
    device.write_all_at(&Block([3; 4096]).0, 0).unwrap();
    devices.signal(device::ENTRY, Signal::KILL);
    // The kernel's own goes on without.
    assert_eq!(device.sync_all().is_ok(), is_nbd());
    drop(device);
    // Bound to nothing that answers, and still no other's.
    assert_eq!(devices.count(), 1);
    devices.scene.call("Datapath.activate", "7");
    assert_eq!(devices.count(), 1);
    let mut block = Block([0; 4096]);
    devices.open().read_exact_at(&mut block.0, 0).unwrap();
    assert!(block.0.iter().all(|byte| *byte == 3));
    devices.signal(device::ENTRY, Signal::KILL);
    devices.end();
}

#[test]
fn whoever_stays_when_the_volume_is_deactivated_gets_errors() {
    let devices = Devices::new();
    devices.scene.call("Datapath.activate", "7");
    let stays = devices.open();
    stays.write_all_at(&Block([4; 4096]).0, 4096).unwrap();
    devices.scene.call("Datapath.deactivate", "7");
    assert!(devices.path().symlink_metadata().is_err());
    let late = stays.write_all_at(&Block([5; 4096]).0, 4096).and_then(|()| stays.sync_all());
    assert!(late.is_err());
    devices.scene.call("Datapath.activate", "7");
    assert!(devices.scene.io("read -P 4 4k 4k"));
    assert_eq!(devices.count(), 2);
    drop(stays);
    devices.wait_for(1);
    devices.end();
}

#[test]
fn a_device_lasts_as_long_as_any_domain_that_was_given_it() {
    let devices = Devices::new();
    let scene = &devices.scene;
    let can_write = || {
        let opened = OpenOptions::new().write(true).open(devices.path());
        opened.is_ok_and(|device| device.write_all_at(&[6; 512], 0).and_then(|()| device.sync_all()).is_ok())
    };
    scene.call("Datapath.activate_readonly", "7");
    assert!(!can_write());
    // Another reader has the same one; a writer has to wait for them.
    scene.call("Datapath.activate_readonly", "8");
    assert_eq!(devices.count(), 1);
    let refused = scene.try_call("Datapath.activate", "8").unwrap_err();
    assert_eq!(refused.code, "SR_BACKEND_FAILURE_24");
    scene.call("Datapath.deactivate", "7");
    let open = File::open(devices.path()).unwrap();
    assert_eq!(scene.try_call("Datapath.activate", "8").unwrap_err().code, "SR_BACKEND_FAILURE_24");
    assert!(rustix::io::pread(&open, &mut [0; 512], 0).is_ok(), "one that could not be taken away goes on");
    drop(open);
    scene.call("Datapath.activate", "8");
    assert!(can_write());
    scene.call("Datapath.activate", "7");
    for domain in ["7", "8"] {
        assert!(can_write());
        scene.call("Datapath.deactivate", domain);
    }
    scene.call("Datapath.detach", "8");
    devices.end();
}

#[test]
fn nobody_hangs_with_a_daemon_that_does_not_answer() {
    ends_although_it_hangs("qmp.sock", true);
}

#[test]
fn nobody_hangs_with_a_device_server_that_does_not_answer() {
    ends_although_it_hangs(device::ENTRY, !is_nbd());
}

/// Ends a device while a process hangs. If something that was written to it is lost, the deactivation says so.
fn ends_although_it_hangs(hangs: &str, is_lost: bool) {
    let devices = Devices::with_patience(1);
    devices.scene.call("Datapath.activate", "7");
    // Held back by the kernel until the device is closed or cleared.
    let device = OpenOptions::new().write(true).open(devices.path()).unwrap();
    device.write_all_at(&[8; 1 << 16], 0).unwrap();
    devices.signal(hangs, Signal::STOP);
    let begun = Instant::now();
    assert_eq!(devices.scene.try_call("Datapath.deactivate", "7").is_err(), is_lost);
    devices.scene.call("Datapath.detach", "7");
    assert!(begun.elapsed() < bound(), "{:?}", begun.elapsed());
    devices.scene.assert_nothing_left();
    drop(device);
    devices.wait_for(0);
}

#[test]
fn calls_that_are_killed_anywhere_leave_nothing_that_the_next_does_not_find() {
    let devices = Devices::new();
    let scene = &devices.scene;
    for step in 0..8 {
        for method in ["activate", "deactivate", "activate_readonly", "activate", "detach"] {
            let method = format!("Datapath.{method}");
            let mut killed = scene.start(&method, "7");
            // What is swept is where the call is cut; nothing is waited for.
            std::thread::sleep(Duration::from_micros(step * 4000));
            killed.kill().unwrap();
            killed.wait().unwrap();
            if method == "Datapath.activate" && step % 2 == 0 {
                continue;
            }
            scene.call(&method, "7");
            assert!(devices.count() <= 1 && scene.processes().len() <= 2);
        }
        devices.assert_no_device();
        scene.assert_nothing_left();
    }
}

#[test]
fn what_is_unmounted_elsewhere_is_not_kept_busy() {
    if is_nbd() {
        // Nothing is mounted then, and no namespace made.
        return;
    }
    let devices = Devices::new();
    // As where systemd runs, where every mount is shared with those of other namespaces.
    let shared = Tmpfs::new(&devices.scene.host.root().join("shared"));
    run(Command::new("mount").arg("--make-shared").arg(&shared.0));
    let other = Tmpfs::new(&shared.0.join("other"));
    let path = other.0.to_str().unwrap().to_owned();
    devices.scene.call("Datapath.activate", "7");
    let server = devices.pid(device::ENTRY).as_raw_nonzero();
    let seen = || fs::read_to_string(format!("/proc/{server}/mountinfo")).unwrap().contains(&path);
    assert!(seen());
    drop(other);
    assert!(!seen());
    drop(shared);
    devices.end();
}

#[test]
fn volumes_that_are_activated_at_once_have_a_device_each() {
    let all: Vec<Devices> = (0..4).map(|_| Devices::new()).collect();
    let calls: Vec<_> = all.iter().map(|devices| devices.scene.start("Datapath.activate", "7")).collect();
    for call in calls {
        answer(call).unwrap();
    }
    for (content, devices) in (1_u8..).zip(&all) {
        devices.open().write_all_at(&Block([content; 4096]).0, 0).unwrap();
    }
    for (content, devices) in (1_u8..).zip(&all) {
        assert!(devices.scene.io(&format!("read -P {content} 0 4k")));
        assert_eq!(devices.count(), 1);
    }
    // One that goes takes no other along.
    for (content, devices) in (1_u8..=4).rev().zip(all.iter().rev()) {
        let mut block = Block([0; 4096]);
        devices.open().read_exact_at(&mut block.0, 0).unwrap();
        assert!(block.0.iter().all(|byte| *byte == content));
        devices.end();
    }
}

#[test]
fn where_the_kernels_driver_cannot_be_had_a_loop_device_takes_its_place_unless_it_was_asked_for() {
    let devices = Devices::new();
    let scene = &devices.scene;
    let settings = scene.host.root().join("etc/xapi-storage-qcow2.json");
    fs::write(&settings, r#"{"gc": false, "block_device": "always", "block_device_driver": "auto"}"#).unwrap();
    scene.call("Datapath.activate", "7");
    // It is loaded by now if it can be.
    let has_driver = Path::new("/sys/module/nbd").exists();
    assert!(has_driver || !is_nbd());
    let target = fs::read_link(devices.path()).unwrap();
    let expected = if has_driver { "/dev/nbd" } else { "/dev/loop" };
    assert!(target.to_str().unwrap().starts_with(expected), "{target:?}");
    scene.call("Datapath.deactivate", "7");
    fs::write(&settings, r#"{"gc": false, "block_device": "always", "block_device_driver": "nbd"}"#).unwrap();
    match scene.try_call("Datapath.activate", "7") {
        Ok(_) => assert!(has_driver),
        Err(refused) => {
            assert!(!has_driver && refused.code == "SR_BACKEND_FAILURE_453", "{refused:?}");
            assert!(refused.params.iter().any(|param| param.contains("nbd driver")), "{refused:?}");
        }
    }
    devices.end();
}

/// A file system in memory, unmounted when this is dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(path: &Path) -> Self {
        fs::create_dir(path).unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(path));
        Self(path.to_owned())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn activations_at_once_make_one_device() {
    let devices = Devices::new();
    let scene = &devices.scene;
    let calls: Vec<_> = (0..5).map(|_| scene.start("Datapath.activate", "7")).collect();
    for call in calls {
        answer(call).unwrap();
    }
    assert_eq!((devices.count(), scene.processes().len()), (1, 2));
    let attachment = Attachment::lock_existing(&scene.host, scene.uri.volume).unwrap().unwrap();
    assert_eq!(attachment.open_mode(), Some(Mode::ReadWrite));
    drop(attachment);
    devices.end();
}
