//! A host with an SR in memory, and its scripts run as they are or with a fault at one of their system calls.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fake_xapi::processes::Process;
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

use crate::place::memory;

/// System calls that change what is on disk or start something; and those that may fail for want of space, or with an
/// error of the disk.
const CHANGING: [&str; 21] = [
    "openat",
    "copy_file_range",
    "writev",
    "fsync",
    "fdatasync",
    "rename",
    "renameat",
    "renameat2",
    "unlink",
    "unlinkat",
    "rmdir",
    "symlink",
    "symlinkat",
    "mkdir",
    "mkdirat",
    "link",
    "linkat",
    "ftruncate",
    "fallocate",
    "write",
    "pwrite64",
];
/// System calls at which a call is killed only: locks, starts, and what is said to a daemon.
const OTHERS: [&str; 7] = ["flock", "clone3", "vfork", "connect", "sendto", "sendmsg", "recvfrom"];

/// Those of them, of which nothing is left when the process is killed behind them.
const UNSEEN: [&str; 5] = ["fsync", "fdatasync", "flock", "connect", "recvfrom"];

/// What stands for a call where the worker that brings space back is meant.
pub const GC: &str = "gc";

/// What strikes a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Strike {
    /// Something happens at the n-th of a system call.
    Call {
        /// The system call.
        name: String,
        /// Which of them, from 1.
        nth: usize,
        /// What happens, in strace's words: `signal=KILL`, `error=EIO`, `error=ENOSPC`.
        how: String,
    },
    /// The storage daemon is killed behind a write that was flushed.
    Daemon,
}

impl fmt::Display for Strike {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call { name, nth, how } => write!(f, "{name}:{nth}:{how}"),
            Self::Daemon => f.write_str("daemon"),
        }
    }
}

impl std::str::FromStr for Strike {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "daemon" {
            return Ok(Self::Daemon);
        }
        let [name, nth, how] = <[&str; 3]>::try_from(text.splitn(3, ':').collect::<Vec<_>>())
            .map_err(|_| anyhow::anyhow!("{text} is no strike"))?;
        Ok(Self::Call { name: name.to_owned(), nth: nth.parse()?, how: how.to_owned() })
    }
}

/// What came of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// There was no answer.
    Killed,
    /// It succeeded.
    Done,
    /// It failed, with this code.
    Refused(String),
}

/// A host and its SR. Nothing of it is left when this is dropped.
pub struct Site {
    root: PathBuf,
    /// The SR's directory.
    pub path: PathBuf,
    /// The SR's uuid.
    pub sr: String,
    /// The host's uuid.
    host: String,
    _directory: Option<TempDir>,
}

impl Site {
    /// Makes a host in memory, with a new SR or a copy of another's.
    pub fn new(like: Option<&Self>) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("st-").tempdir_in(memory())?;
        let path = directory.path().join("sr");
        let host = Uuid::new_v4().to_string();
        let Some(like) = like else {
            let mut site = Self::create(directory.path(), path)?;
            site._directory = Some(directory);
            return Ok(site);
        };
        fs::create_dir(&path)?;
        let copied =
            Command::new("cp").args(["-a", "--sparse=always"]).arg(like.path.join(".")).arg(&path).status()?;
        ensure!(copied.success(), "the SR cannot be copied");
        let root = root(directory.path(), &host)?;
        let site = Self { root, path, sr: like.sr.clone(), host, _directory: Some(directory) };
        site.attach()?;
        Ok(site)
    }

    /// Makes a host below a directory that somebody else removes, with a new SR at a path.
    pub fn create(directory: &Path, path: PathBuf) -> Result<Self> {
        fs::create_dir(&path)?;
        let host = Uuid::new_v4().to_string();
        let site =
            Self { root: root(directory, &host)?, path, sr: Uuid::new_v4().to_string(), host, _directory: None };
        let configuration = json!({"uri": format!("file://{}", site.path.display())});
        let request =
            json!({"dbg": "", "uuid": site.sr, "configuration": configuration, "name": "", "description": ""});
        site.call("SR.create", &request)?;
        site.attach()?;
        Ok(site)
    }

    /// Makes the same host again below another directory, booted anew, with what its SR's file system holds by now.
    pub fn booted(&self, directory: &Path, path: PathBuf) -> Result<Self> {
        let root = root(directory, &self.host)?;
        let random = root.join("proc/sys/kernel/random");
        fs::create_dir_all(&random)?;
        fs::write(random.join("boot_id"), format!("{}\n", Uuid::new_v4()))?;
        let site = Self { root, path, sr: self.sr.clone(), host: self.host.clone(), _directory: None };
        site.attach()?;
        Ok(site)
    }

    /// SR.attach, which finishes what killed calls have begun and removes what they have left.
    pub fn attach(&self) -> Result<()> {
        let configuration = json!({"uri": format!("file://{}", self.path.display())});
        self.call("SR.attach", &json!({"dbg": "", "configuration": configuration})).map(drop)
    }

    /// Makes a call that is to succeed.
    pub fn call(&self, method: &str, request: &Value) -> Result<Value> {
        let output = self.run(&[], method, request)?;
        ensure!(output.status.success(), "{method} {request}: {output:?}");
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Makes a call that may be refused.
    pub fn outcome(&self, method: &str, request: &Value) -> Result<Outcome> {
        judged(method, &self.run(&[], method, request)?)
    }

    /// Makes a call with a fault at one of its system calls.
    pub fn struck(&self, method: &str, request: &Value, strike: &Strike) -> Result<Outcome> {
        let Strike::Call { name, nth, how } = strike else { bail!("{strike} is not for a call") };
        // Only the script itself: a qemu-img or daemon that it has started lives on, as it does in earnest.
        let inject = format!("inject={name}:{how}:when={nth}");
        judged(method, &self.run(&["strace", "-qq", "-o", "/dev/null", "-e", &inject], method, request)?)
    }

    /// Makes a call, and gives what could have struck it.
    pub fn traced(&self, method: &str, request: &Value) -> Result<(Outcome, Vec<Strike>)> {
        let log = self.root.join("trace");
        let traced = format!("trace={},{}", CHANGING.join(","), OTHERS.join(","));
        let log_path = log.to_str().context("a path")?;
        let output = self.run(&["strace", "-qq", "-o", log_path, "-e", &traced], method, request)?;
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        let mut strikes = Vec::new();
        let mut is_as_before = false;
        for line in fs::read_to_string(&log)?.lines() {
            let Some((name, rest)) = line.split_once('(') else { continue };
            let nth = counts.entry(name.to_owned()).or_default();
            *nth += 1;
            let may_fail = CHANGING.contains(&name) && (name != "openat" || rest.contains("O_CREAT"));
            if !may_fail && !OTHERS.contains(&name) {
                continue;
            }
            let strike = |how: &str| Strike::Call { name: name.to_owned(), nth: *nth, how: how.to_owned() };
            // Killed there it leaves what it leaves when it is killed at the one before, if that changed nothing.
            if !is_as_before {
                strikes.push(strike("signal=KILL"));
            }
            if may_fail {
                strikes.extend(["error=EIO", "error=ENOSPC"].map(strike));
            }
            is_as_before = UNSEEN.contains(&name);
        }
        ensure!(!strikes.is_empty(), "{method} changes nothing, or cannot be traced: {output:?}");
        Ok((judged(method, &output)?, strikes))
    }

    fn run(&self, tracer: &[&str], method: &str, request: &Value) -> Result<Output> {
        Ok(self.start(tracer, method, request)?.wait_with_output()?)
    }

    /// Waits for a call that is to succeed.
    pub fn answer(method: &str, call: Child) -> Result<Value> {
        let output = call.wait_with_output()?;
        ensure!(output.status.success(), "{method}: {output:?}");
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Starts a call, and lets it run.
    pub fn start(&self, tracer: &[&str], method: &str, request: &Value) -> Result<Child> {
        let kind = if method.starts_with("Data") { "datapath" } else { "volume" };
        let directory = Path::new(env!("CARGO_BIN_EXE_fake-xapi")).parent().context("no directory")?;
        let script = directory.join(format!("xapi-storage-qcow2-{kind}"));
        let script = script.to_str().context("a path")?;
        let arguments = if method == GC { [GC, self.sr.as_str()] } else { [method, "--json"] };
        let words: Vec<&str> = tracer.iter().copied().chain([script]).chain(arguments).collect();
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .env("XAPI_STORAGE_QCOW2_ROOT", &self.root)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| words[0].to_owned())?;
        // One that was killed at once does not read it.
        let _ = child.stdin.take().context("no stdin")?.write_all(request.to_string().as_bytes());
        Ok(child)
    }

    /// Where the host keeps what does not outlive it.
    pub fn runtime(&self) -> PathBuf {
        self.root.join("run/xapi-storage-qcow2")
    }

    /// Where a volume's export is served.
    pub fn socket(&self, volume: &str) -> PathBuf {
        self.runtime().join("volumes").join(volume).join("nbd.sock")
    }

    /// Runs qemu-io on a volume's export: with the cache `writeback` it flushes when it ends and when it is told to, with
    /// `unsafe` never.
    pub fn io(&self, volume: &str, cache: &str, commands: &[String]) -> Result<()> {
        let mut io = Command::new("qemu-io");
        io.args(["-f", "raw", "-t", cache]);
        for command in commands {
            io.args(["-c", command]);
        }
        let uri = format!("nbd+unix:///{volume}?socket={}", self.socket(volume).display());
        let output = io.arg(uri).stdin(Stdio::null()).output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success() && !said.contains("failed"), "{commands:?}: {output:?}");
        Ok(())
    }

    /// Lists the processes of this host.
    pub fn processes(&self) -> Vec<Process> {
        Process::all().filter(|process| process.is_of(&self.root) || process.is_of(&self.path)).collect()
    }

    /// Kills a volume's storage daemons, and waits until they are gone; gives how many there were.
    pub fn kill_daemons(&self, volume: &str) -> usize {
        let ours = || self.processes().into_iter().filter(|process| process.is_told(volume));
        let killed = ours().inspect(Process::kill).count();
        while ours().next().is_some() {
            std::thread::sleep(Duration::from_millis(1));
        }
        killed
    }

    /// Waits until no qemu-img of a call that was killed is at work.
    pub fn wait_for_orphans(&self) {
        while self.processes().iter().any(|process| process.is_told("qemu-img")) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends every process of the host, as no power does.
    pub fn halt(&self) {
        Process::end_all(&self.root);
        Process::end_all(&self.path);
    }

    /// Checks that no process is left, nor anything in the host's runtime directory but what tells of the SR.
    pub fn nothing_is_left(&self) -> Result<()> {
        // A daemon that was told to quit is gone a moment later.
        let until = Instant::now() + Duration::from_secs(20);
        while Instant::now() < until && !self.processes().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        ensure!(self.processes().is_empty(), "left running: {:?}", self.processes());
        for directory in ["volumes", "mirrors"] {
            let path = self.runtime().join(directory);
            let left: Vec<_> =
                fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
            ensure!(left.is_empty(), "left over: {left:?}");
        }
        Ok(())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.halt();
    }
}

/// Makes a host's root.
fn root(directory: &Path, host: &str) -> Result<PathBuf> {
    let root = directory.join("h");
    fs::create_dir_all(root.join("etc"))?;
    fs::write(root.join("etc/xensource-inventory"), format!("INSTALLATION_UUID='{host}'\n"))?;
    // Space is brought back when a history says so; FAKE_XAPI_GC=true has the plugin begin with it by itself.
    let gc = std::env::var("FAKE_XAPI_GC").is_ok_and(|value| value == "true");
    fs::write(root.join("etc/xapi-storage-qcow2.json"), json!({"gc": gc}).to_string())?;
    Ok(root)
}

/// Reads a script's answer as strictly as its caller.
fn judged(method: &str, output: &Output) -> Result<Outcome> {
    if output.status.code().is_none() {
        return Ok(Outcome::Killed);
    }
    if method == GC {
        return Ok(if output.status.success() { Outcome::Done } else { Outcome::Refused(GC.to_owned()) });
    }
    let Ok(answer) = serde_json::from_slice::<Value>(&output.stdout) else {
        // It was the answer that could not be written.
        ensure!(!output.status.success(), "a success without an answer: {output:?}");
        return Ok(Outcome::Killed);
    };
    if output.status.success() {
        return Ok(Outcome::Done);
    }
    let code = answer["code"].as_str().with_context(|| format!("no error: {answer}"))?;
    ensure!(answer["params"].is_array() && answer["backtrace"].is_object(), "no error: {answer}");
    Ok(Outcome::Refused(code.to_owned()))
}
