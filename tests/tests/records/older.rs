//! What a host of an older version left when it died (`tests/golden/older`), put where the present one finds it.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use fake_xapi::processes::Process;
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

/// All that there are: by the commit that made each, the oldest first, and what was left in the middle.
pub const ALL: [&str; 7] =
    ["533b700", "73da036", "e2fd61c", "b874d62", "422c3de-merge", "422c3de-relink", "a5ce434-open"];

/// What is known of the files.
#[derive(Deserialize)]
pub struct Expected {
    pub host: String,
    pub sr: String,
    pub mirror: String,
    /// Volumes by what became of them.
    pub named: BTreeMap<String, String>,
    /// The formats of trees that there are.
    pub formats: Vec<u64>,
    /// The operations that were begun and not ended.
    pub intents: Vec<String>,
    /// The SHA-256 of what each volume reads as, where that is known.
    pub contents: BTreeMap<String, Option<String>>,
}

/// Gives the directory of a version's files.
pub fn files(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/older").join(version)
}

/// A host with the uuid of the one that died, and that one's SR.
pub struct Site {
    pub expected: Expected,
    pub root: PathBuf,
    pub path: PathBuf,
    directory: TempDir,
}

impl Site {
    /// Unpacks what a version left in the SR.
    pub fn of(version: &str) -> Self {
        let expected: Expected =
            serde_json::from_slice(&fs::read(files(version).join("expected.json")).unwrap()).unwrap();
        let site = Self::empty(expected);
        let unpacked = Command::new("tar")
            .args(["--extract", "--gzip", "--file"])
            .arg(files(version).join("sr.tar.gz"))
            .arg("--directory")
            .arg(site.directory.path())
            .status();
        assert!(unpacked.unwrap().success());
        site.boot(&Uuid::new_v4().to_string());
        site
    }

    /// Has the host booted.
    pub fn boot(&self, id: &str) {
        let random = self.root.join("proc/sys/kernel/random");
        fs::create_dir_all(&random).unwrap();
        fs::write(random.join("boot_id"), format!("{id}\n")).unwrap();
    }

    /// Makes a host with an SR of its own.
    pub fn new() -> Self {
        let [host, sr] = [(); 2].map(|()| Uuid::new_v4().to_string());
        let (named, contents, formats) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        let expected = Expected { host, sr, mirror: String::new(), named, formats, intents: Vec::new(), contents };
        let site = Self::empty(expected);
        fs::create_dir(&site.path).unwrap();
        let create =
            json!({"uuid": site.expected.sr, "configuration": site.configuration(), "name": "n", "description": ""});
        site.call("SR.create", create);
        site.attach();
        site
    }

    fn empty(expected: Expected) -> Self {
        let directory = tempfile::Builder::new().prefix("fx-").tempdir_in("/tmp").unwrap();
        let (root, path) = (directory.path().join("h"), directory.path().join("sr"));
        fs::create_dir_all(root.join("etc")).unwrap();
        let inventory = format!("INSTALLATION_UUID='{}'\n", expected.host);
        fs::write(root.join("etc/xensource-inventory"), inventory).unwrap();
        fs::write(root.join("etc/xapi-storage-qcow2.json"), r#"{"gc": false}"#).unwrap();
        Self { expected, root, path, directory }
    }

    pub fn configuration(&self) -> Value {
        json!({"uri": format!("file://{}", self.path.display())})
    }

    pub fn attach(&self) {
        assert_eq!(self.call("SR.attach", json!({"configuration": self.configuration()})), json!(self.expected.sr));
    }

    pub fn run(&self) -> PathBuf {
        self.root.join("run/xapi-storage-qcow2")
    }

    pub fn uri(&self, volume: &str) -> String {
        format!("qsd://{}/{volume}", self.expected.sr)
    }

    /// Gives a volume by what became of it.
    pub fn volume(&self, name: &str) -> &str {
        &self.expected.named[name]
    }

    /// Runs one of the executables.
    pub fn output(&self, arguments: &[&str], request: &Value) -> Output {
        let class = arguments[0].split('.').next().unwrap();
        let executable = match class {
            "Datapath" | "Data" | "Task" => "xapi-storage-qcow2-datapath",
            "status" | "check" | "tree" => "xapi-storage-qcow2",
            _ => "xapi-storage-qcow2-volume",
        };
        let mut child = Command::new(Path::new(env!("CARGO_BIN_EXE_fake-xapi")).with_file_name(executable))
            .args(arguments)
            .env("XAPI_STORAGE_QCOW2_ROOT", &self.root)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Who needs no request does not read it.
        let _ = child.stdin.take().unwrap().write_all(request.to_string().as_bytes());
        child.wait_with_output().unwrap()
    }

    /// Runs a command of an administrator's that is to succeed, and gives what it prints.
    pub fn admin(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments, &Value::Null);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Makes a call: its answer, or its error.
    pub fn try_call(&self, method: &str, mut request: Value) -> Result<Value, Value> {
        let fields = request.as_object_mut().unwrap();
        fields.entry("dbg").or_insert_with(|| "records".into());
        fields.entry("sr").or_insert_with(|| self.expected.sr.clone().into());
        let output = self.output(&[method, "--json"], &request);
        let answer = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
        if output.status.success() { Ok(answer) } else { Err(answer) }
    }

    /// Makes a call that is to succeed.
    pub fn call(&self, method: &str, request: Value) -> Value {
        self.try_call(method, request.clone()).unwrap_or_else(|error| panic!("{method} {request}: {error}"))
    }

    pub fn datapath(&self, methods: &[&str], volume: &str, domain: &str) {
        for method in methods {
            self.call(&format!("Datapath.{method}"), json!({"uri": self.uri(volume), "domain": domain}));
        }
    }

    pub fn create(&self) -> String {
        let request = json!({"name": "v", "description": "", "size": 1 << 20, "sharable": false});
        self.call("Volume.create", request)["key"].as_str().unwrap().to_owned()
    }

    pub fn snapshot(&self, volume: &str) -> String {
        self.call("Volume.snapshot", json!({"key": volume}))["key"].as_str().unwrap().to_owned()
    }

    /// Gives the records of all trees, by their directories.
    pub fn trees(&self) -> BTreeMap<PathBuf, Value> {
        let directories = fs::read_dir(self.path.join("trees")).unwrap().map(|entry| entry.unwrap().path());
        let read = |path: PathBuf| {
            Some((path.clone(), serde_json::from_slice(&fs::read(path.join("tree.json")).ok()?).unwrap()))
        };
        directories.filter_map(read).collect()
    }

    /// Gives the directory and record of a volume's tree.
    pub fn tree(&self, volume: &str) -> (PathBuf, Value) {
        self.trees().into_iter().find(|(_, tree)| tree["volumes"].get(volume).is_some()).unwrap()
    }

    /// Gives the SHA-256 of what a volume that nobody uses reads as, by qemu-img.
    pub fn content(&self, volume: &str) -> String {
        let (directory, tree) = self.tree(volume);
        let image = directory.join(format!("{}.qcow2", tree["volumes"][volume]["node"].as_str().unwrap()));
        let raw = self.directory.path().join("raw");
        let converted = Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(&image).arg(&raw).status();
        assert!(converted.unwrap().success(), "{volume}");
        let sum = Command::new("sha256sum").arg(&raw).output().unwrap();
        String::from_utf8(sum.stdout).unwrap()[..64].to_owned()
    }

    /// Has qemu-io do something with a volume that is active.
    pub fn io(&self, volume: &str, command: &str) {
        let socket = self.run().join("volumes").join(volume).join("nbd.sock");
        let uri = format!("nbd+unix:///{volume}?socket={}", socket.display());
        let mut program = Command::new("qemu-io");
        if command.starts_with("read ") {
            program.arg("-r");
        }
        let output = program.args(["-f", "raw", "-c", command, &uri]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && !said.contains("verification failed"), "{command}: {output:?}");
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // Of a test that failed.
        Process::end_all(&self.root);
    }
}
