//! Two hosts, the executables called under strace, and all that came out of them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use fake_xapi::processes::Process;
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

use crate::listener::Listener;
use crate::places::below;
use crate::words::{self, Place};

/// Where xapi keeps the configurations of its observers of storage, and wants spans.
const CONFIGURATIONS: &str = "etc/xensource/observer/smapi/enabled";
const SPANS: &str = "var/log/dt/zipkinv2/json";

/// A trace that is recorded.
const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// A host: its log is syslog's or the journal's.
pub struct Host {
    pub root: PathBuf,
    /// Where an SR goes.
    pub place: PathBuf,
    has_devices: bool,
    log: Listener,
}

/// The hosts, and what was found.
pub struct Site {
    pub source: Host,
    pub destination: Host,
    /// Whether there can be block devices here.
    pub has_devices: bool,
    directory: TempDir,
    calls: Cell<usize>,
    called: RefCell<BTreeSet<String>>,
    found: RefCell<BTreeSet<String>>,
    seen: RefCell<BTreeSet<Place>>,
    files: RefCell<BTreeSet<String>>,
}

impl Site {
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("fx-").tempdir_in("/tmp").unwrap();
        let is_there = |path: &str| Path::new(path).exists();
        let has_devices =
            rustix::process::geteuid().is_root() && is_there("/dev/fuse") && is_there("/dev/loop-control");
        let host = |name: &str, log: fn(&Path) -> Listener| {
            let root = directory.path().join(name);
            for path in ["etc", CONFIGURATIONS] {
                fs::create_dir_all(root.join(path)).unwrap();
            }
            let inventory = format!("INSTALLATION_UUID='{}'\n", Uuid::new_v4());
            fs::write(root.join("etc/xensource-inventory"), inventory).unwrap();
            let golden: Value = serde_json::from_str(include_str!("../../golden/observer-span.json")).unwrap();
            fs::write(root.join(CONFIGURATIONS).join("o.observer.conf"), golden["conf"].as_str().unwrap()).unwrap();
            if let Some(programs) = std::env::var_os("TESTED_QEMU") {
                fs::create_dir_all(root.join("usr/libexec")).unwrap();
                std::os::unix::fs::symlink(programs, root.join("usr/libexec/xapi-storage-qcow2")).unwrap();
            }
            let place = directory.path().join(format!("{name}-sr"));
            fs::create_dir(&place).unwrap();
            let host = Host { log: log(&root), root, place, has_devices };
            host.set(60);
            host
        };
        let (source, destination) = (host("a", Listener::syslog), host("b", Listener::journal));
        Self {
            source,
            destination,
            has_devices,
            directory,
            calls: Cell::default(),
            called: RefCell::default(),
            found: RefCell::default(),
            seen: RefCell::default(),
            files: RefCell::default(),
        }
    }

    /// Looks at what came out somewhere.
    pub fn look(&self, place: Place, which: &str, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.seen.borrow_mut().insert(place);
        }
        self.found.borrow_mut().extend(words::judge(place, which, bytes));
    }

    /// Calls a method that may fail, and looks at all that it left. `datapath/` before the name of one that both plugins have
    /// means that of the datapath plugin.
    pub fn try_call(&self, host: &Host, named: &str, request: &Value) -> Result<Value, Value> {
        let (executable, method) = (executable(named), named.trim_start_matches("datapath/"));
        let number = self.calls.replace(self.calls.get() + 1);
        let file = |kind: &str| self.directory.path().join(format!("{kind}.{number}"));
        let (executed, errors) = (file("executed"), file("stderr"));
        let mut command = Command::new("sh");
        let strace = "strace -D -f -qq -v -s 1000000 -e trace=execve --seccomp-bpf";
        // strace itself goes on as long as what the call has started.
        command.arg("-c").arg(format!("umask 0; exec {strace} -o \"$0\" \"$1\" \"$2\" --json"));
        command.arg(&executed).arg(&executable).arg(method).current_dir("/");
        command.env("XAPI_STORAGE_QCOW2_ROOT", &host.root).env("XAPI_STORAGE_QCOW2_LOG", "trace");
        command.env("XAPI_SESSION", words::CREDENTIAL).env("PGPASSWORD", words::CREDENTIAL);
        command.env("OBSERVER_CONFIG_DIR", format!("/{CONFIGURATIONS}")).env("TRACEPARENT", TRACEPARENT);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&errors).unwrap());
        let mut request = request.clone();
        let context = json!({"traceparent": TRACEPARENT, "baggage": words::BAGGAGE});
        request["dbg"] = format!("the canary's task\n{context}").into();
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(request.to_string().as_bytes()).unwrap();
        let Output { stdout, status, .. } = child.wait_with_output().unwrap();
        self.look(if status.success() { Place::Answer } else { Place::Refusal }, method, &stdout);
        self.look(Place::Stderr, method, &fs::read(errors).unwrap());
        self.look_at_files();
        let answer = serde_json::from_slice(&stdout).unwrap_or_else(|error| panic!("{method}: {error}"));
        if status.success() {
            self.called.borrow_mut().insert(method.to_owned());
            if method == "Plugin.diagnostics" {
                self.look(Place::Diagnostics, named, &stdout);
            }
            Ok(answer)
        } else {
            Err(answer)
        }
    }

    /// Calls a method that has to succeed.
    pub fn call(&self, host: &Host, method: &str, request: Value) -> Value {
        self.try_call(host, method, &request).unwrap_or_else(|error| panic!("{method} {request}: {error}"))
    }

    /// Calls a method that has to be refused.
    pub fn refused(&self, host: &Host, method: &str, request: Value) {
        let answered = self.try_call(host, method, &request);
        assert!(answered.is_err(), "{method} {request}: {answered:?}");
    }

    /// Looks at all files of both hosts below /run, and their modes.
    fn look_at_files(&self) {
        for host in [&self.source, &self.destination] {
            let run = host.root.join("run/xapi-storage-qcow2");
            let mut entries = Vec::new();
            below(&run, &mut entries);
            for entry in entries {
                let path = entry.path.strip_prefix(&host.root).unwrap().display().to_string();
                let is_failures = entry.path.starts_with(run.join("failures"));
                self.look(if is_failures { Place::Failures } else { Place::Runtime }, &path, &entry.bytes);
                if entry.is_open() {
                    let found = format!("others may use {path}, {:o}", entry.mode);
                    self.found.borrow_mut().insert(found);
                }
                let name = entry.path.file_name().unwrap().to_string_lossy().into_owned();
                self.files.borrow_mut().insert(name);
            }
        }
    }

    /// Looks at the processes that run, and gives how many there are whose arguments have a word in them.
    pub fn processes(&self, with: &str) -> usize {
        let mut all = Process::of(self.directory.path());
        all.retain(|process| !process.arguments.starts_with(b"strace\0"));
        for process in &all {
            let arguments = process.command();
            self.look(Place::Process, &arguments, &process.arguments);
            self.look(Place::Process, &format!("the environment of {arguments}"), &process.environment());
        }
        all.iter().filter(|process| process.is_told(with)).count()
    }

    /// Looks at what people are shown of the hosts.
    pub fn shown(&self) {
        for host in [&self.source, &self.destination] {
            self.call(host, "Plugin.diagnostics", json!({}));
            self.call(host, "datapath/Plugin.diagnostics", json!({}));
            let sr = host.place.to_str().unwrap();
            let all: [(Place, &[&str]); 6] = [
                (Place::Status, &["status"]),
                (Place::Status, &["status", "--json"]),
                (Place::Tree, &["tree", sr]),
                (Place::Tree, &["tree", sr, "--json"]),
                (Place::Check, &["check", sr]),
                (Place::Check, &["check", sr, "--json"]),
            ];
            for (place, arguments) in all {
                let mut command = Command::new(program("xapi-storage-qcow2"));
                command.args(arguments).env("XAPI_STORAGE_QCOW2_ROOT", &host.root).stdin(Stdio::null());
                let output = command.env("XAPI_STORAGE_QCOW2_LOG", "trace").output().unwrap();
                // With umask 0 it would find what is open to others in the SR, too.
                let said = String::from_utf8_lossy(&output.stdout);
                assert!(output.status.success(), "{arguments:?}: {said}");
                self.look(place, &arguments.join(" "), &output.stdout);
                self.look(Place::Stderr, &arguments.join(" "), &output.stderr);
            }
        }
    }

    /// Looks at what was logged.
    pub fn logged(&self) {
        for host in [&self.source, &self.destination] {
            let last = self.call(host, "Plugin.ls", json!({}));
            assert!(last.is_array());
            host.log.wait_for("Plugin.ls", |line| line.contains("Plugin.ls"));
            for line in host.log.lines() {
                self.look(Place::Log, &line, line.as_bytes());
            }
        }
    }

    /// Looks at the spans.
    pub fn traced(&self) {
        for host in [&self.source, &self.destination] {
            for entry in fs::read_dir(host.root.join(SPANS)).into_iter().flatten() {
                let path = entry.unwrap().path();
                self.look(Place::Span, path.to_str().unwrap(), &fs::read(&path).unwrap());
            }
        }
    }

    /// Looks at everything that was executed, but for what the test itself has; each of these has to be among it.
    pub fn executed(&self, expected: &[&str]) {
        let mut all = String::new();
        for number in 0..self.calls.get() {
            let text = fs::read_to_string(self.directory.path().join(format!("executed.{number}"))).unwrap();
            let mut lines = text.lines();
            let first = lines.next().unwrap_or_default();
            assert!(first.contains("execve(") && first.contains("--json"), "{first}");
            for line in lines {
                let which: String = line.chars().take(200).collect();
                self.look(Place::Executed, &which, line.as_bytes());
                all.push_str(line);
            }
        }
        for word in expected {
            assert!(all.contains(word), "{word} was not executed");
        }
    }

    /// The methods that there are.
    pub fn listed(&self) -> BTreeSet<String> {
        let list = |name: &str| {
            let output = Command::new(program(name)).arg("--list-methods").output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        let all = list("xapi-storage-qcow2-volume") + &list("xapi-storage-qcow2-datapath");
        all.lines().map(str::to_owned).collect()
    }

    /// The methods that were called and answered.
    pub fn called(&self) -> BTreeSet<String> {
        self.called.borrow().clone()
    }

    /// Tells whether a file of that name was looked at.
    pub fn has_seen_file(&self, name: &str) -> bool {
        self.files.borrow().contains(name)
    }

    /// What was found, and where something was to be looked at.
    pub fn verdict(&self) -> (Vec<String>, BTreeSet<Place>) {
        (self.found.borrow().iter().cloned().collect(), self.seen.borrow().clone())
    }

    /// A file for the test itself.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

impl Host {
    /// Writes the host's settings, one of which is how long a mirror's connection may take to be made, in seconds.
    pub fn set(&self, handshake: u32) {
        let devices = if self.has_devices { "always" } else { "never" };
        let settings = json!({"log": "trace", "block_device": devices, "handshake_seconds": handshake});
        fs::write(self.root.join("etc/xapi-storage-qcow2.json"), settings.to_string()).unwrap();
    }

    /// The device-config of the host's SR.
    pub fn configuration(&self) -> Value {
        json!({"uri": format!("file://{}", self.place.display())})
    }

    /// The socket of a volume's NBD server.
    pub fn socket(&self, volume: &str) -> PathBuf {
        self.root.join("run/xapi-storage-qcow2/volumes").join(volume).join("nbd.sock")
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        Process::end_all(self.directory.path());
    }
}

fn program(name: &str) -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_fake-xapi")).with_file_name(name)
}

/// The executable that has a method.
fn executable(named: &str) -> PathBuf {
    let is_datapath = ["datapath/", "Datapath.", "Data.", "Task."].iter().any(|prefix| named.starts_with(prefix));
    program(if is_datapath { "xapi-storage-qcow2-datapath" } else { "xapi-storage-qcow2-volume" })
}
