//! A host with an SR on which nothing goes on, and its likeness, from which it is made anew.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use fake_xapi::processes::Process;
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

use crate::picture::Picture;

/// No call takes longer, unless it hangs.
const BOUND: Duration = Duration::from_secs(60);

/// What any call may leave: what was found out of QEMU's programs, and the last failures.
const ANYBODYS: &[&str] = &["programs.json", "failures", "failures.old"];

/// What there is to ask about.
pub struct Names {
    pub sr: String,
    /// The URI of a directory for another SR.
    pub place: String,
    /// A volume with a snapshot.
    pub leaf: String,
    pub snapshot: String,
    /// A volume of its own.
    pub other: String,
    /// The leaf's URI.
    pub uri: String,
    /// An NBD server that is not there.
    pub remote: String,
    /// A uuid of nothing.
    pub nothing: String,
}

/// How a call ended.
pub struct Outcome {
    /// Its exit code; none when it was killed, or did not end.
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

pub struct Site {
    pub names: Names,
    /// What calls may touch.
    world: PathBuf,
    /// The same, as it was in the beginning.
    likeness: PathBuf,
    before: Picture,
    _directory: TempDir,
}

impl Site {
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("fx-").tempdir_in("/tmp").unwrap();
        let (world, likeness) = (directory.path().join("w"), directory.path().join("l"));
        for path in ["h/etc", "sr", "place"] {
            fs::create_dir_all(world.join(path)).unwrap();
        }
        let inventory = format!("INSTALLATION_UUID='{}'\n", Uuid::new_v4());
        fs::write(world.join("h/etc/xensource-inventory"), inventory).unwrap();
        let settings = r#"{"gc": false, "handshake_seconds": 1, "drain_seconds": 1, "block_device": "never"}"#;
        fs::write(world.join("h/etc/xapi-storage-qcow2.json"), settings).unwrap();
        if let Some(programs) = std::env::var_os("TESTED_QEMU") {
            fs::create_dir_all(world.join("h/usr/libexec")).unwrap();
            std::os::unix::fs::symlink(programs, world.join("h/usr/libexec/xapi-storage-qcow2")).unwrap();
        }
        let uri = |name: &str| format!("file://{}", world.join(name).display());
        let sr = Uuid::new_v4().to_string();
        let names = Names {
            place: uri("place"),
            remote: format!("nbd+unix:///x?socket={}/nowhere", world.display()),
            nothing: Uuid::new_v4().to_string(),
            sr: sr.clone(),
            leaf: String::new(),
            snapshot: String::new(),
            other: String::new(),
            uri: String::new(),
        };
        let mut site =
            Self { names, world: world.clone(), likeness, before: Picture::default(), _directory: directory };
        let configuration = json!({"uri": uri("sr")});
        let named = json!({"uuid": sr, "configuration": configuration, "name": "n", "description": "d"});
        site.ask("SR.create", &named);
        site.ask("SR.attach", &named);
        let create = json!({"sr": sr, "name": "v", "description": "", "size": 1 << 20, "sharable": false});
        let key = |volume: Value| volume["key"].as_str().unwrap().to_owned();
        let leaf = key(site.ask("Volume.create", &create));
        let about = json!({"sr": sr, "key": leaf});
        site.ask("Volume.enable_cbt", &about);
        site.names.snapshot = key(site.ask("Volume.snapshot", &about));
        site.names.other = key(site.ask("Volume.create", &create));
        site.names.uri = format!("qsd://{sr}/{leaf}");
        site.names.leaf = leaf;
        copy(&site.world, &site.likeness);
        site.before = site.picture();
        site
    }

    fn picture(&self) -> Picture {
        Picture::of(&self.world, ANYBODYS)
    }

    /// The methods that there are.
    pub fn methods(&self) -> BTreeSet<String> {
        let list = |name: &str| {
            let output = Command::new(program(name)).arg("--list-methods").output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        let all = list("xapi-storage-qcow2-volume") + &list("xapi-storage-qcow2-datapath");
        all.lines().map(str::to_owned).collect()
    }

    /// Makes a call that has to succeed.
    fn ask(&self, method: &str, request: &Value) -> Value {
        let mut request = request.clone();
        request["dbg"] = "".into();
        let outcome = self.call(method, request.to_string().as_bytes());
        let said = String::from_utf8_lossy(&outcome.stdout).into_owned();
        assert_eq!(outcome.code, Some(0), "{method}: {said}");
        serde_json::from_str(&said).unwrap()
    }

    /// Makes a call with any bytes.
    pub fn call(&self, method: &str, bytes: &[u8]) -> Outcome {
        let is_datapath = ["Datapath.", "Data.", "Task."].iter().any(|class| method.starts_with(class));
        let name = if is_datapath { "xapi-storage-qcow2-datapath" } else { "xapi-storage-qcow2-volume" };
        let mut command = Command::new(program(name));
        command.args([method, "--json"]).current_dir("/").env("XAPI_STORAGE_QCOW2_ROOT", self.world.join("h"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (mut stdin, mut out, mut err) =
            (child.stdin.take().unwrap(), child.stdout.take().unwrap(), child.stderr.take().unwrap());
        std::thread::scope(|scope| {
            let stdout = scope.spawn(move || read(&mut out));
            let stderr = scope.spawn(move || read(&mut err));
            // Who has seen enough does not read the rest.
            scope.spawn(move || drop(stdin.write_all(bytes)));
            let begun = Instant::now();
            let status = loop {
                match child.try_wait().unwrap() {
                    Some(status) => break Some(status),
                    None if begun.elapsed() > BOUND => {
                        child.kill().unwrap();
                        child.wait().unwrap();
                        break None;
                    }
                    None => std::thread::sleep(Duration::from_micros(500)),
                }
            };
            let code = status.filter(|status| status.signal().is_none()).and_then(|status| status.code());
            Outcome { code, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
        })
    }

    /// Sees that a call that was refused has changed nothing; what another one did is undone.
    pub fn settle(&mut self, is_refused: bool) -> Result<(), String> {
        let differs = self.picture().differs_from(&self.before);
        let runs = Process::of(&self.world);
        if !is_refused {
            if differs.is_some() || !runs.is_empty() {
                self.restore();
            }
            return Ok(());
        }
        match (differs, runs.first()) {
            (Some(differs), _) => Err(format!("it was refused, but {differs}")),
            (None, Some(process)) => Err(format!("it was refused, but {} runs", process.command())),
            (None, None) => Ok(()),
        }
    }

    /// Ends what runs, and makes all files what they were.
    pub fn restore(&mut self) {
        Process::end_all(&self.world);
        fs::remove_dir_all(&self.world).unwrap();
        copy(&self.likeness, &self.world);
        self.before = self.picture();
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        Process::end_all(&self.world);
    }
}

fn read(from: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).unwrap();
    bytes
}

fn program(name: &str) -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_fake-xapi")).with_file_name(name)
}

/// Copies a directory with everything in it.
fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").args(["-a", "--sparse=always"]).args([from, to]).status().unwrap();
    assert!(status.success());
}
