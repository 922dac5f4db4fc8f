//! A storage daemon of one image in a directory of its own, gone with the value.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fake_xapi::nbd::{Client, Options, Uri};
use tempfile::TempDir;

/// A running qemu-storage-daemon that exports one image as "disk".
pub struct Daemon {
    child: Child,
    directory: TempDir,
    image: PathBuf,
}

impl Daemon {
    /// Starts it over an empty qcow2 image of its own.
    pub fn new(size: u64) -> Self {
        let directory = directory();
        let image = directory.path().join("disk.qcow2");
        create(&image, size, None);
        Self { child: start(directory.path(), &image), directory, image }
    }

    /// Starts it over an image that is there.
    pub fn over(image: &Path) -> Self {
        let directory = directory();
        Self { child: start(directory.path(), image), directory, image: image.to_owned() }
    }

    pub fn uri(&self) -> Uri {
        Uri::new(self.directory.path().join("nbd.sock"), "disk")
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn image(&self) -> PathBuf {
        self.image.clone()
    }

    /// Connects as soon as the daemon listens.
    pub async fn client(&self) -> Client {
        self.client_with(Options::default()).await
    }

    pub async fn client_with(&self, options: Options) -> Client {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match Client::connect_with(&self.uri(), options).await {
                Ok(client) => return client,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends it without warning.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends it in order: it closes its image.
    pub fn quit(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let status = loop {
            // Not once: QEMU's main loop does not notice a signal that comes right before it begins to wait.
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None => std::thread::sleep(std::time::Duration::from_millis(5)),
            }
        };
        assert!(status.success());
    }

    /// Starts it again over the image as it is.
    pub fn restart(&mut self) {
        let _ = std::fs::remove_file(self.directory.path().join("nbd.sock"));
        self.child = start(self.directory.path(), &self.image);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn directory() -> TempDir {
    tempfile::Builder::new().prefix("fx-").tempdir().unwrap()
}

fn start(directory: &Path, image: &Path) -> Child {
    let file = format!("driver=file,node-name=f,discard=unmap,filename={}", image.display());
    let socket = format!("addr.type=unix,addr.path={}", directory.join("nbd.sock").display());
    Command::new("qemu-storage-daemon")
        .args(["--blockdev", &file])
        .args(["--blockdev", "driver=qcow2,node-name=q,file=f,discard=unmap"])
        .args(["--nbd-server", &socket])
        .args(["--export", "type=nbd,id=e,node-name=q,name=disk,writable=on,description=a test's disk"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

/// Makes an image, over another one if asked.
pub fn create(image: &Path, size: u64, backing: Option<&str>) {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]);
    if let Some(backing) = backing {
        command.args(["-F", "qcow2", "-b", backing]);
    }
    let status = command.arg(image).arg(size.to_string()).status().unwrap();
    assert!(status.success());
}

/// Runs qemu-io commands on an image that nobody has open.
pub fn qemu_io(image: &Path, commands: &[&str]) {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "qcow2", "-d", "unmap"]);
    for text in commands {
        command.args(["-c", text]);
    }
    let output = command.arg(image).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}
