//! A storage daemon with one image, one export and two monitors.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// A storage daemon that is killed when dropped.
pub struct Daemon {
    child: Child,
    dir: PathBuf,
    image: PathBuf,
    node: String,
}

impl Daemon {
    /// Starts a daemon with its sockets in `dir`, and `image` as node `node` behind export `e`.
    pub fn start(dir: &Path, image: &Path, node: &str) -> Self {
        fs::create_dir_all(dir).unwrap();
        let child = spawn(dir, image, node);
        let daemon = Self { child, dir: dir.to_owned(), image: image.to_owned(), node: node.to_owned() };
        daemon.wait();
        daemon
    }

    fn wait(&self) {
        super::eventually("storage daemon", || UnixStream::connect(self.nbd()).ok());
    }

    pub fn nbd(&self) -> PathBuf {
        self.dir.join("nbd.sock")
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts the daemon again after it was killed.
    pub fn restart(&mut self) {
        for socket in ["nbd.sock", "qmp.sock", "mirror.sock"] {
            fs::remove_file(self.dir.join(socket)).unwrap();
        }
        self.child = spawn(&self.dir, &self.image, &self.node);
        self.wait();
    }

    /// Ends the daemon cleanly.
    pub fn stop(&mut self) {
        self.execute("quit", json!({}));
        self.child.wait().unwrap();
    }

    /// Executes a command on a connection of its own.
    pub fn execute(&self, command: &str, arguments: Value) -> Value {
        let mut stream = UnixStream::connect(self.dir.join("qmp.sock")).unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        lines.next();
        let mut answer = Value::Null;
        for request in [json!({"execute": "qmp_capabilities"}), json!({"execute": command, "arguments": arguments})] {
            // In one write: a daemon that quits does so at the last brace, and does not read the line's end.
            stream.write_all(format!("{request}\n").as_bytes()).unwrap();
            answer = loop {
                let line: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
                if line.get("event").is_none() {
                    break line;
                }
            };
        }
        assert!(answer.get("error").is_none(), "{command}: {answer}");
        answer["return"].clone()
    }

    pub fn node_names(&self) -> Vec<String> {
        let nodes = self.execute("query-named-block-nodes", json!({"flat": true}));
        nodes.as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap().to_owned()).collect()
    }

    pub fn jobs(&self) -> Vec<Value> {
        self.execute("query-jobs", json!({})).as_array().unwrap().clone()
    }

    /// Gives the bytes and the requests that may be written in a second; zeroes for no limit.
    pub fn write_limits(&self) -> (u64, u64) {
        let limits = self.execute("qom-get", json!({"path": "/objects/pace", "property": "limits"}));
        (limits["bps-write"].as_u64().unwrap(), limits["iops-write"].as_u64().unwrap())
    }

    pub fn remove_export(&self) {
        self.execute("block-export-del", json!({"id": "e", "mode": "hard"}));
        super::eventually("end of the export", || {
            self.execute("query-block-exports", json!({})).as_array().unwrap().is_empty().then_some(())
        });
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///e?socket={}", self.nbd().display())
    }

    /// Writes as a guest does, through the export, and waits until it is done.
    pub fn write(&self, pattern: u8, offset: &str, length: &str) {
        let command = format!("write -P {pattern} {offset} {length}");
        run(Command::new("qemu-io").args(["-f", "raw", "-c", &command, &self.uri()]));
    }

    /// Starts a guest that writes as fast as it can until it is told to finish.
    pub fn writer(&self) -> Writer {
        let mut child = Command::new("qemu-io")
            .args(["-f", "raw", &self.uri()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (stop, stopped) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            for round in 0_u64.. {
                if stopped.try_recv().is_ok() {
                    break;
                }
                writeln!(stdin, "write -P {} {}M 4M", round % 250, round % 28).unwrap();
                assert!(lines.any(|line| line.unwrap().contains("wrote ")), "a write failed");
            }
            drop(stdin);
            lines.for_each(drop);
        });
        Writer { child, stop, thread }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest that writes.
pub struct Writer {
    child: Child,
    stop: std::sync::mpsc::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

impl Writer {
    /// Ends the guest once its last write is done; one that waits for ever hangs the test.
    pub fn finish(mut self) {
        self.stop.send(()).unwrap();
        self.thread.join().unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

fn spawn(dir: &Path, image: &Path, node: &str) -> Child {
    let dir = dir.display();
    Command::new("qemu-storage-daemon")
        .args(["--chardev", &format!("socket,path={dir}/qmp.sock,server=on,wait=off,id=a"), "--monitor", "chardev=a"])
        .args([
            "--chardev",
            &format!("socket,path={dir}/mirror.sock,server=on,wait=off,id=b"),
            "--monitor",
            "chardev=b",
        ])
        .args(["--object", "throttle-group,id=pace"])
        .args(["--blockdev", &json!({"driver": "file", "filename": image, "node-name": "f"}).to_string()])
        .args([
            "--blockdev",
            &json!({"driver": "throttle", "throttle-group": "pace", "file": "f", "node-name": "t"}).to_string(),
        ])
        .args([
            "--blockdev",
            &json!({"driver": "qcow2", "file": "t", "node-name": node, "discard": "unmap"}).to_string(),
        ])
        .args(["--nbd-server", &format!("addr.type=unix,addr.path={dir}/nbd.sock")])
        .args(["--export", &format!("type=nbd,id=e,name=e,node-name={node},writable=on")])
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

pub fn create(image: &Path, size: u64) {
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(image).arg(size.to_string()));
}

/// Runs commands of qemu-io on an image that nobody has open.
pub fn io(image: &Path, commands: &[&str]) {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "qcow2"]);
    for text in commands {
        command.args(["-c", text]);
    }
    run(command.arg(image));
}

/// Checks that two images have the same content; a difference in size must be zeroes.
pub fn compare(one: &Path, other: &Path) {
    run(Command::new("qemu-img").args(["compare", "-f", "qcow2", "-F", "qcow2"]).arg(one).arg(other));
}

pub fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal).unwrap();
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
}
