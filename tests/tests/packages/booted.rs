//! systemd itself, booted in namespaces of its own, which starts what the plugins leave running from an installed package.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use uuid::Uuid;

use super::is_root;
use super::scratch::{Kind, Scratch, build, package};

/// Boots systemd as the first process of a machine that has the installed package, a control group of its own, and settings:
/// `$1` is the root that the package is installed in, `$2` the control group, `$3` the settings.
const BOOT: &str = r#"
set -e
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/etc /run/work /run/cgroup
mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/etc,workdir=/run/work /etc
printf %s "$3" >/etc/xapi-storage-qcow2.json
mount -t cgroup2 cgroup2 /run/cgroup
mkdir "/run/cgroup/$2"
echo $$ >"/run/cgroup/$2/cgroup.procs"
umount -l /sys/fs/cgroup 2>/dev/null || true
mount --bind "/run/cgroup/$2" /sys/fs/cgroup
cp "$1"/usr/lib/systemd/system/xapi-storage-qcow2-*@.service /run/systemd/system/
printf '[Unit]\nDefaultDependencies=no\n' >/run/systemd/system/packages.target
mkdir -p /usr/libexec/xapi-storage-script
mount --bind "$1/usr/libexec/xapi-storage-script" /usr/libexec/xapi-storage-script
container=packages exec unshare --cgroup /usr/lib/systemd/systemd --system --unit=packages.target --log-target=null
"#;

/// A machine of namespaces that systemd runs.
struct Machine {
    /// The process that waits for the first one.
    outer: Child,
    /// The first process, as the outside sees it.
    first: u32,
    group: String,
    scratch: Scratch,
}

impl Machine {
    fn boot(scratch: Scratch) -> Self {
        let group = format!("fx-{}", Uuid::new_v4().simple());
        let outer = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child=KILL", "--propagation", "private"])
            .args(["sh", "-c", BOOT, "sh"])
            .arg(scratch.root())
            .args([&group, r#"{"block_device": "always"}"#])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut machine = Self { outer, first: 0, group, scratch };
        let children = format!("/proc/{0}/task/{0}/children", machine.outer.id());
        machine.wait("the first process", |machine| {
            let first = fs::read_to_string(&children).unwrap_or_default().trim().parse();
            first.is_ok_and(|first| {
                machine.first = first;
                fs::read_to_string(format!("/proc/{first}/comm")).is_ok_and(|name| name.trim() == "systemd")
            })
        });
        machine.wait("systemd", |machine| machine.systemctl(&["is-system-running"]).trim() == "running");
        machine
    }

    fn wait(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !done(self) {
            assert!(self.outer.try_wait().unwrap().is_none(), "the machine has ended before {what}");
            assert!(Instant::now() < deadline, "no {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Makes the command of a program that runs in the machine.
    fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.first.to_string(), "--mount", "--pid", "--cgroup"]).arg(program.as_ref());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn systemctl(&self, arguments: &[&str]) -> String {
        let output = self.command("systemctl").args(arguments).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a program that is to succeed, and gives what it prints.
    fn run(&self, words: &[&str]) -> Vec<u8> {
        let output = self.command(words[0]).args(&words[1..]).output().unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
        output.stdout
    }

    /// Makes a call as xapi-storage-script does.
    fn call(&self, method: &str, mut request: Value) -> Value {
        request.as_object_mut().unwrap().insert("dbg".to_owned(), "booted".into());
        let class = method.split('.').next().unwrap();
        let plugin =
            if matches!(class, "Datapath" | "Data") { "datapath/qsd" } else { "volume/org.xen.xapi.storage.qcow2" };
        let script = Path::new("/usr/libexec/xapi-storage-script").join(plugin).join(method);
        let mut child = self.command(script).arg("--json").spawn().unwrap();
        child.stdin.take().unwrap().write_all(request.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{method} {request}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Gives the service's only process and what its status says.
    fn service(&self, unit: &str) -> String {
        let pid = self.systemctl(&["show", "--property=MainPID", "--value", unit]);
        assert_ne!(pid.trim(), "0", "{unit} does not run");
        let status = self.run(&["cat", &format!("/proc/{}/status", pid.trim())]);
        let groups = self.run(&["cat", &format!("/proc/{}/cgroup", pid.trim())]);
        let groups = String::from_utf8(groups).unwrap();
        assert!(groups.lines().any(|line| line.starts_with("0::") && line.contains(unit)), "{groups}");
        String::from_utf8(status).unwrap()
    }

    /// Gives the units of a kind that there are.
    fn units(&self, kind: &str) -> usize {
        let pattern = format!("xapi-storage-qcow2-{kind}@*");
        self.systemctl(&["list-units", "--all", "--plain", "--no-legend", &pattern]).lines().count()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // With the first process all others of its namespace are killed.
        drop(self.outer.kill());
        drop(self.outer.wait());
        let deadline = Instant::now() + Duration::from_secs(10);
        let unified = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(|path| PathBuf::from(path).join(&self.group));
        for group in unified {
            while group.exists() && Instant::now() < deadline {
                remove_group(&group);
            }
        }
        let _ = self.scratch.root();
    }
}

/// Removes a control group with those below it, as far as nobody is in them any more.
fn remove_group(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_group(&entry.path());
        }
    }
    let _ = fs::remove_dir(group);
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap_or_default().trim()
}

#[test]
#[ignore = "boots systemd: make sweep"]
fn systemd_starts_all_that_outlives_a_call_and_each_works_in_its_sandbox() {
    if !is_root() {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(Kind::Deb).unwrap();
    scratch.install(&package(Kind::Deb, &build(), 1, files.path()).unwrap()).unwrap();
    let path = scratch.root().join("sr");
    fs::create_dir(&path).unwrap();
    let machine = Machine::boot(scratch);
    let sr = Uuid::new_v4().to_string();
    let configuration = json!({"uri": format!("file://{}", path.display())});
    let create = json!({"uuid": sr, "configuration": configuration, "name": "n", "description": ""});
    let configuration = machine.call("SR.create", create);
    machine.call("SR.attach", json!({"configuration": configuration}));
    let volume = || {
        let request = json!({"sr": sr, "name": "v", "description": "", "size": 4 << 20, "sharable": false});
        machine.call("Volume.create", request)["key"].as_str().unwrap().to_owned()
    };
    let uri = |volume: &str| format!("qsd://{sr}/{volume}");
    let (source, destination) = (volume(), volume());

    // A guest's disk, by its block device.
    let guest = json!({"uri": uri(&source), "domain": "7"});
    machine.call("Datapath.attach", guest.clone());
    machine.call("Datapath.activate", guest.clone());
    let daemon = machine.service(&format!("xapi-storage-qcow2-daemon@{source}.service"));
    let device = machine.service(&format!("xapi-storage-qcow2-device@{source}.service"));
    for (status, bounds) in [(&daemon, "0000000000000002"), (&device, "0000000000200000")] {
        assert_eq!(
            (field(status, "CapBnd"), field(status, "NoNewPrivs"), field(status, "Seccomp")),
            (bounds, "1", "2")
        );
    }
    assert_eq!(field(&device, "CapEff"), "0000000000000000", "it has given its capability up");
    let disk = format!("/dev/xapi-storage-qcow2/{source}");
    let write = |block: &str| {
        machine.run(&[
            "dd",
            "if=/dev/urandom",
            &format!("of={disk}"),
            "bs=64k",
            "count=4",
            &format!("seek={block}"),
            "oflag=direct",
        ]);
    };
    let read = || machine.run(&["sha256sum", &disk])[..64].to_vec();
    write("0");
    let key = |volume: Value| volume["key"].as_str().unwrap().to_owned();
    let first = key(machine.call("Volume.snapshot", json!({"sr": sr, "key": source})));
    write("8");
    let second = key(machine.call("Volume.snapshot", json!({"sr": sr, "key": source})));
    write("16");
    let content = read();

    // A mirror of it, and space that comes back under it.
    let target = json!({"uri": uri(&destination), "domain": "MIRx"});
    machine.call("Datapath.attach", target.clone());
    machine.call("Datapath.activate", target.clone());
    machine.call("Datapath.import_activate", target.clone());
    machine.service(&format!("xapi-storage-qcow2-import@{destination}.service"));
    let remote = format!("nbd+unix:///{destination}?socket=/run/xapi-storage-qcow2/volumes/{destination}/nbd.sock");
    let mirror = machine.call("Data.mirror", json!({"uri": uri(&source), "domain": "7", "remote": remote}));
    assert_eq!(machine.units("mirror"), 1);
    let deadline = Instant::now() + Duration::from_secs(60);
    while machine.call("Data.stat", json!({"operation": mirror}))["complete"] != json!(true) {
        assert!(Instant::now() < deadline, "the mirror is not complete");
    }
    machine.call("Datapath.deactivate", guest.clone());
    machine.call("Datapath.deactivate", target.clone());
    assert_eq!((machine.units("import"), machine.units("device")), (0, 0));
    machine.call("Datapath.activate", guest.clone());
    assert_eq!(read(), content);
    for snapshot in [&first, &second] {
        machine.call("Volume.destroy", json!({"sr": sr, "key": snapshot}));
    }
    let images = || {
        let found = fs::read_dir(path.join("trees")).unwrap();
        let files = found.flat_map(|tree| fs::read_dir(tree.unwrap().path()).unwrap());
        files.filter(|file| file.as_ref().unwrap().path().extension().is_some_and(|end| end == "qcow2")).count()
    };
    // The guest's own node, one below it, and the destination's.
    while images() > 3 || path.join("gc").exists() {
        assert!(Instant::now() < deadline, "no space comes back: {} images", images());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(read(), content);
    for closed in [&guest, &target] {
        machine.call("Datapath.deactivate", closed.clone());
        machine.call("Datapath.detach", closed.clone());
    }
    while images() > 2 || path.join("gc").exists() || machine.units("gc") > 0 {
        assert!(Instant::now() < deadline, "no space comes back: {} images", images());
        std::thread::sleep(Duration::from_millis(20));
    }
    let copy = json!({"uri": uri(&destination), "domain": "8"});
    machine.call("Datapath.attach", copy.clone());
    machine.call("Datapath.activate", copy.clone());
    let disk = format!("/dev/xapi-storage-qcow2/{destination}");
    assert_eq!(machine.run(&["sha256sum", &disk])[..64], content, "the mirror's destination");
    machine.call("Datapath.deactivate", copy.clone());
    machine.call("Datapath.detach", copy);
    machine.call("SR.detach", json!({"sr": sr}));
    assert_eq!(machine.units("*"), 0);
    assert_eq!(machine.run(&["ls", "/run/xapi-storage-qcow2/launch"]), b"", "what they were started by is left");
}
