//! A host and an SR of its own for each test, and the executable run as xapi-storage-script runs it.

#![allow(dead_code, reason = "every test file uses its own part of this")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

/// A size in bytes.
pub const MIB: u64 = 1 << 20;

/// A failed call.
#[derive(Debug)]
pub struct Failure {
    pub code: String,
    pub params: Vec<String>,
}

impl Failure {
    /// Gives all that the caller is told.
    pub fn text(&self) -> String {
        self.params.join(" ")
    }
}

/// A host below a directory of its own.
pub struct Host {
    pub root: PathBuf,
}

impl Host {
    /// Starts a call and leaves it running.
    pub fn start(&self, method: &str, request: &Value) -> Child {
        self.start_bytes(method, request.to_string().as_bytes())
    }

    /// Starts a call with any bytes as its request.
    pub fn start_bytes(&self, method: &str, request: &[u8]) -> Child {
        let mut child = Command::new(env!("CARGO_BIN_EXE_xapi-storage-qcow2-volume"))
            .args([method, "--json"])
            .env("XAPI_STORAGE_QCOW2_ROOT", &self.root)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Who was killed at once does not read it.
        let _ = child.stdin.take().unwrap().write_all(request);
        child
    }

    /// Waits for a call's end and reads its answer as strictly as xapi-storage-script.
    pub fn finish(&self, child: Child) -> Result<Value, Failure> {
        let output = child.wait_with_output().unwrap();
        let shown =
            || format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.code().is_some(), "killed: {}", shown());
        let value: Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", shown()));
        if output.status.success() {
            return Ok(value);
        }
        let strings = |value: &Value| -> Vec<String> {
            value.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
        };
        assert!(value["backtrace"]["error"].is_string());
        strings(&value["backtrace"]["files"]);
        assert!(value["backtrace"]["lines"].as_array().unwrap().iter().all(Value::is_i64));
        Err(Failure { code: value["code"].as_str().unwrap().to_owned(), params: strings(&value["params"]) })
    }

    /// Makes a call.
    pub fn try_call(&self, method: &str, request: Value) -> Result<Value, Failure> {
        self.finish(self.start(method, &request))
    }

    /// Makes a call that is to succeed.
    pub fn call(&self, method: &str, request: Value) -> Value {
        self.try_call(method, request.clone()).unwrap_or_else(|failure| panic!("{method} {request}: {failure:?}"))
    }

    /// Makes a call that is to fail, and gives its code.
    pub fn code(&self, method: &str, request: Value) -> String {
        match self.try_call(method, request.clone()) {
            Err(failure) => failure.code,
            Ok(answer) => panic!("{method} {request} succeeded: {answer}"),
        }
    }
}

/// Gives a host the programs that tests/older.sh says, where the plugins look first.
fn older_qemu(root: &Path) {
    if let Some(programs) = std::env::var_os("TESTED_QEMU") {
        fs::create_dir_all(root.join("usr/libexec")).unwrap();
        std::os::unix::fs::symlink(programs, root.join("usr/libexec/xapi-storage-qcow2")).unwrap();
        let found = plugin::qemu::storage_daemon(&plugin::host::Host::at(root)).unwrap();
        assert!(found.path.starts_with(root), "{found:?}");
    }
}

/// A host with one attached SR.
pub struct Bench {
    pub host: Host,
    pub sr: String,
    pub path: PathBuf,
    directory: TempDir,
}

impl Bench {
    /// Makes a host and an SR.
    pub fn new() -> Self {
        let bench = Self::without_sr();
        bench.create_sr();
        bench
    }

    /// Makes a host and an empty directory for an SR.
    pub fn without_sr() -> Self {
        let directory = tempfile::Builder::new().prefix("vt-").tempdir_in("/tmp").unwrap();
        let path = directory.path().join("sr");
        fs::create_dir(&path).unwrap();
        let host = Host { root: directory.path().join("h") };
        fs::create_dir_all(host.root.join("etc")).unwrap();
        fs::write(host.root.join("etc/xensource-inventory"), format!("INSTALLATION_UUID='{}'\n", Uuid::new_v4()))
            .unwrap();
        // Tests look at trees; those of gc start it themselves.
        fs::write(host.root.join("etc/xapi-storage-qcow2.json"), r#"{"gc": false}"#).unwrap();
        older_qemu(&host.root);
        Self { host, sr: Uuid::new_v4().to_string(), path, directory }
    }

    /// Makes and attaches the SR.
    pub fn create_sr(&self) {
        let request = json!({"uuid": self.sr, "configuration": self.configuration(), "name": "n", "description": "d", "dbg": "t"});
        let configuration = self.host.call("SR.create", request);
        assert_eq!(self.host.call("SR.attach", json!({"configuration": configuration})), json!(self.sr));
    }

    /// Gives the SR's device-config.
    pub fn configuration(&self) -> Value {
        json!({"uri": format!("file://{}", self.path.display())})
    }

    /// Gives another host that shares the SR's directory and has attached it.
    pub fn other_host(&self) -> Host {
        let host = Host { root: self.directory.path().join("h2") };
        fs::create_dir_all(host.root.join("etc")).unwrap();
        let inventory = format!("INSTALLATION_UUID='{}'\n", Uuid::new_v4());
        fs::write(host.root.join("etc/xensource-inventory"), inventory).unwrap();
        fs::write(host.root.join("etc/xapi-storage-qcow2.json"), r#"{"gc": false}"#).unwrap();
        older_qemu(&host.root);
        host.call("SR.attach", json!({"configuration": self.configuration()}));
        host
    }

    /// Makes a request about the SR.
    pub fn request(&self, more: Value) -> Value {
        let mut request = json!({"dbg": "t", "sr": self.sr});
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        request
    }

    /// Makes a call about the SR.
    pub fn call(&self, method: &str, more: Value) -> Value {
        self.host.call(method, self.request(more))
    }

    /// Makes a call about the SR that may fail.
    pub fn try_call(&self, method: &str, more: Value) -> Result<Value, Failure> {
        self.host.try_call(method, self.request(more))
    }

    /// Makes a call about the SR that is to fail.
    pub fn code(&self, method: &str, more: Value) -> String {
        self.host.code(method, self.request(more))
    }

    /// Makes a volume and gives its key.
    pub fn create(&self, size: u64) -> String {
        key(&self.call("Volume.create", json!({"name": "v", "description": "", "size": size, "sharable": false})))
    }

    /// Snapshots a volume and gives the snapshot's key.
    pub fn snapshot(&self, volume: &str) -> String {
        key(&self.call("Volume.snapshot", json!({"key": volume})))
    }

    /// Clones a volume and gives the clone's key.
    pub fn clone_of(&self, volume: &str) -> String {
        key(&self.call("Volume.clone", json!({"key": volume})))
    }

    /// Destroys a volume.
    pub fn destroy(&self, volume: &str) {
        assert_eq!(self.call("Volume.destroy", json!({"key": volume})), Value::Null);
    }

    /// Lists the volumes' keys, sorted.
    pub fn keys(&self) -> Vec<String> {
        let mut keys: Vec<String> = self.call("SR.ls", json!({})).as_array().unwrap().iter().map(key).collect();
        keys.sort();
        keys
    }

    /// Gives the directory of a volume's tree.
    pub fn tree_directory(&self, volume: &str) -> PathBuf {
        fs::canonicalize(self.path.join("volumes").join(volume)).unwrap()
    }

    /// Reads the record of a volume's tree.
    pub fn tree(&self, volume: &str) -> Value {
        serde_json::from_slice(&fs::read(self.tree_directory(volume).join("tree.json")).unwrap()).unwrap()
    }

    /// Gives the node files of all trees.
    pub fn node_files(&self) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = fs::read_dir(self.path.join("trees"))
            .unwrap()
            .flat_map(|tree| fs::read_dir(tree.unwrap().path()).unwrap())
            .map(|file| file.unwrap().path())
            .filter(|file| file.extension().is_some_and(|extension| extension == "qcow2"))
            .collect();
        files.sort();
        files
    }

    /// Gives a volume's own node file.
    pub fn node_file(&self, volume: &str) -> PathBuf {
        let node = self.tree(volume)["volumes"][volume]["node"].as_str().unwrap().to_owned();
        self.tree_directory(volume).join(format!("{node}.qcow2"))
    }

    /// Checks that what is listed is what is on disk: every listed volume has its chain of files, no file is left
    /// that no record names, and every symlink leads to a volume. Called when no call is under way.
    pub fn check(&self) {
        self.wait_for_orphans();
        let configuration = json!({"configuration": self.configuration()});
        self.host.call("SR.attach", configuration);
        let listed = self.keys();
        for key in &listed {
            assert_eq!(self.call("Volume.stat", json!({"key": key}))["key"], json!(key));
            let file = self.node_file(key);
            let output = Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(&file).output().unwrap();
            assert!(output.status.success(), "{}: {output:?}", file.display());
            let info = Command::new("qemu-img").args(["info", "--backing-chain"]).arg(&file).output().unwrap();
            assert!(info.status.success(), "{info:?}");
        }
        let mut named = Vec::new();
        for entry in fs::read_dir(self.path.join("trees")).unwrap() {
            let directory = entry.unwrap().path();
            let tree: Value = serde_json::from_slice(&fs::read(directory.join("tree.json")).unwrap()).unwrap();
            assert_eq!(tree.get("intent"), None, "{tree}");
            for node in tree["nodes"].as_object().unwrap().keys() {
                named.push(directory.join(format!("{node}.qcow2")));
            }
            let expected = ["lock", "spare", "tree.json"];
            let others: Vec<String> =
                names(&directory).into_iter().filter(|name| !name.ends_with(".qcow2")).collect();
            assert!(others.iter().all(|name| expected.contains(&name.as_str())), "{others:?}");
        }
        named.sort();
        assert_eq!(named, self.node_files());
        assert_eq!(names(&self.path.join("volumes")), listed);
        let expected = ["lock", "sr.json", "trees", "volumes"];
        assert!(names(&self.path).iter().all(|name| expected.contains(&name.as_str())), "{:?}", names(&self.path));
    }
}

impl Host {
    /// Starts what brings space back.
    pub fn start_gc(&self, sr: &str) -> Child {
        Command::new(env!("CARGO_BIN_EXE_xapi-storage-qcow2-volume"))
            .args(["gc", sr])
            .env("XAPI_STORAGE_QCOW2_ROOT", &self.root)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Brings space back, and gives what was logged of it.
    pub fn gc(&self, sr: &str) -> String {
        let output = self.start_gc(sr).wait_with_output().unwrap();
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{log}");
        log
    }
}

impl Bench {
    /// Brings space back; nothing may fail, nor be left that could be merged.
    pub fn gc(&self) {
        let log = self.host.gc(&self.sr);
        assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
        for entry in fs::read_dir(self.path.join("trees")).unwrap() {
            let directory = entry.unwrap().path();
            let record = fs::read(directory.join("tree.json")).unwrap();
            let tree: plugin::store::Tree = serde_json::from_slice(&record).unwrap();
            assert_eq!((tree.merge, plugin::store::coalesce::pairs(&tree)), (None, Vec::new()), "{log}");
        }
    }
}

/// Gives a volume record's key.
pub fn key(record: &Value) -> String {
    record["key"].as_str().unwrap().to_owned()
}

/// Lists a directory, sorted.
pub fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Writes a pattern into an image that nobody has open.
pub fn write(image: &Path, pattern: u8, offset: u64, length: u64) {
    qemu_io(image, &[], &format!("write -P {pattern} {offset} {length}"));
}

/// Writes zeroes, which are data too, into an image that nobody has open.
pub fn write_zeroes(image: &Path, offset: u64, length: u64) {
    qemu_io(image, &[], &format!("write -z {offset} {length}"));
}

/// Checks that an image's chain reads as a pattern.
pub fn assert_reads(image: &Path, pattern: u8, offset: u64, length: u64) {
    qemu_io(image, &["-r", "-U"], &format!("read -P {pattern} {offset} {length}"));
}

fn qemu_io(image: &Path, mode: &[&str], command: &str) {
    let output = Command::new("qemu-io").args(mode).args(["-f", "qcow2", "-c", command]).arg(image).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && !text.contains("verification failed"), "{command}: {text} {output:?}");
}

/// System calls that change what is on disk.
pub const CHANGING: &str = "fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,symlink,symlinkat,mkdir,\
                            mkdirat,link,linkat,ftruncate,fallocate,write,flock,clone3,vfork";

/// The same, and those that talk to a daemon.
pub const SPEAKING: &str = "fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,symlink,symlinkat,mkdir,\
                            mkdirat,ftruncate,fallocate,write,sendto,sendmsg,recvfrom,connect,flock,clone3,vfork";

/// The system calls by which a volume that goes to another tree changes something, or waits. strace counts each by itself.
const STEPS: [&str; 11] =
    ["flock", "write", "fsync", "link", "linkat", "rename", "symlink", "unlink", "unlinkat", "rmdir", "clone3"];

/// Gives every system call of [`STEPS`] and number at which a call is killed, until `kill` says that there are no more
/// of one. False without strace.
pub fn at_every_step(mut kill: impl FnMut(&str, u32) -> Option<bool>) -> bool {
    let mut killed = 0;
    for call in STEPS {
        for number in 1..100 {
            match kill(call, number) {
                Some(true) => killed += 1,
                Some(false) => break,
                None => return false,
            }
        }
    }
    assert!(killed > 10, "{killed}");
    true
}

impl Host {
    /// Makes a call that is killed at its n-th of some system calls; false when it was through before. `None` without
    /// strace, by which this is done.
    pub fn killed_at(&self, method: &str, request: &Value, calls: &str, n: u32) -> Option<bool> {
        let output = self.kill_at(method, request, calls, n)?;
        if output.status.success() {
            return Some(false);
        }
        let signal = std::os::unix::process::ExitStatusExt::signal(&output.status);
        assert_eq!(signal, Some(9), "{method}: {output:?}");
        Some(true)
    }

    /// Makes a call that is killed at its n-th of some system calls, unless it ends before; `None` without strace.
    pub fn kill_at(&self, method: &str, request: &Value, calls: &str, n: u32) -> Option<Output> {
        self.struck(method, request, &format!("{calls}:signal=KILL"), n)
    }

    /// Makes a call to which something happens, in strace's words, at its n-th of some system calls; `None` without strace.
    pub fn struck(&self, method: &str, request: &Value, what: &str, n: u32) -> Option<Output> {
        // Only the executable itself is followed: a qemu-img that it started lives on, as it does in earnest.
        let mut child = Command::new("strace")
            .args(["-qq", "-o", "/dev/null", "-e"])
            .arg(format!("inject={what}:when={n}"))
            .arg(env!("CARGO_BIN_EXE_xapi-storage-qcow2-volume"))
            .args([method, "--json"])
            .env("XAPI_STORAGE_QCOW2_ROOT", &self.root)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .ok()?;
        let _ = child.stdin.take().unwrap().write_all(request.to_string().as_bytes());
        Some(child.wait_with_output().unwrap())
    }
}

impl Bench {
    /// Waits until no qemu-img of a killed call is at work; it holds its tree's lock until then.
    pub fn wait_for_orphans(&self) {
        let directory = self.path.to_str().unwrap();
        let at_work = |entry: fs::DirEntry| {
            let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let text = String::from_utf8_lossy(&arguments).into_owned();
            text.contains("qemu-img") && text.contains(directory)
        };
        while fs::read_dir("/proc").unwrap().flatten().any(at_work) {}
    }

    /// Checks what can be checked while volumes are open: what is listed has its files.
    pub fn check_records(&self) {
        for key in self.keys() {
            let tree = self.tree(&key);
            assert_eq!(tree.get("intent"), None, "{tree}");
            for node in tree["nodes"].as_object().unwrap().keys() {
                assert!(self.tree_directory(&key).join(format!("{node}.qcow2")).exists());
            }
        }
    }
}

/// A guest: one connection to an export, which every request and its answer go through.
pub struct Guest {
    child: Child,
    answers: std::io::BufReader<std::process::ChildStdout>,
}

impl Guest {
    /// Connects to an export.
    pub fn connect(socket: &Path, export: &str, writable: bool) -> Self {
        let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
        let mut child = Command::new("qemu-io")
            .args(if writable { &[][..] } else { &["-r"] })
            .args(["-f", "raw", &uri])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let answers = std::io::BufReader::new(child.stdout.take().unwrap());
        let mut guest = Self { child, answers };
        // An answer shows that it is connected.
        guest.ask("length", "iB");
        guest
    }

    /// Writes a pattern and waits until it is on the disk.
    pub fn write(&mut self, pattern: u8, offset: u64, length: u64) {
        // One command at a time: qemu-io looks at its input again only when more comes.
        self.ask(&format!("write -f -P {pattern} {offset} {length}"), "ops");
    }

    /// Writes a pattern, which may stay in the caches of whoever is below.
    pub fn write_unflushed(&mut self, pattern: u8, offset: u64, length: u64) {
        self.ask(&format!("write -P {pattern} {offset} {length}"), "ops");
    }

    /// Reads a pattern.
    pub fn read(&mut self, pattern: u8, offset: u64, length: u64) {
        self.ask(&format!("read -P {pattern} {offset} {length}"), "ops");
    }

    /// Disconnects, as a guest that shuts down.
    pub fn disconnect(mut self) {
        self.send("quit");
        assert!(self.child.wait().unwrap().success());
    }

    /// Tells whether its connection was closed by the other side.
    pub fn is_cut_off(&mut self) -> bool {
        use std::io::BufRead;
        self.send("read 0 512");
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.contains("failed") || line.is_empty()
    }

    /// Ends the guest whose disk is gone.
    pub fn abandon(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn send(&mut self, command: &str) {
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(format!("{command}\n").as_bytes()).unwrap();
        stdin.flush().unwrap();
    }

    /// Gives a command and reads up to a line that has the word of its success.
    fn ask(&mut self, command: &str, success: &str) {
        use std::io::BufRead;
        self.send(command);
        loop {
            let mut line = String::new();
            assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "{command}: the guest ended");
            for failure in ["failed", "Error", "error", "No space"] {
                assert!(!line.contains(failure), "{command}: {line}");
            }
            if line.contains(success) {
                return;
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
