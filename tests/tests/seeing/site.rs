//! A host with an SR, and the executables called by hand.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

/// A host below a directory of its own, with an attached SR.
pub struct Site {
    pub root: PathBuf,
    pub sr: String,
    directory: TempDir,
}

impl Site {
    /// Makes a host without an SR.
    pub fn bare() -> Self {
        let directory = tempfile::Builder::new().prefix("fx-").tempdir_in("/tmp").unwrap();
        let root = directory.path().join("h");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        let inventory = format!("INSTALLATION_UUID='{}'\n", Uuid::new_v4());
        std::fs::write(root.join("etc/xensource-inventory"), inventory).unwrap();
        let settings = r#"{"gc": false, "handshake_seconds": 1, "qmp_seconds": 10}"#;
        std::fs::write(root.join("etc/xapi-storage-qcow2.json"), settings).unwrap();
        std::fs::create_dir(directory.path().join("sr")).unwrap();
        Self { root, sr: Uuid::new_v4().to_string(), directory }
    }

    /// Makes a host with an SR.
    pub fn new() -> Self {
        let site = Self::bare();
        let create = json!({"uuid": site.sr, "configuration": site.configuration(), "name": "n", "description": ""});
        site.call("SR.create", create);
        site.call("SR.attach", json!({"configuration": site.configuration()}));
        site
    }

    /// The SR's device-config.
    pub fn configuration(&self) -> Value {
        json!({"uri": format!("file://{}", self.directory.path().join("sr").display())})
    }

    /// The command of a method, or of the administrator's program.
    pub fn command(&self, name: &str) -> Command {
        let executable = match name.split_once('.').map(|(class, _)| class) {
            Some("Datapath" | "Data" | "Task") => "xapi-storage-qcow2-datapath",
            Some(_) => "xapi-storage-qcow2-volume",
            None => "xapi-storage-qcow2",
        };
        let path = Path::new(env!("CARGO_BIN_EXE_fake-xapi")).with_file_name(executable);
        let mut command = Command::new(path);
        command.arg(name).env("XAPI_STORAGE_QCOW2_ROOT", &self.root);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a command with a request.
    pub fn run(mut command: Command, request: &Value) -> Output {
        let mut child = command.spawn().unwrap();
        // Who needs no request does not read it.
        let _ = child.stdin.take().unwrap().write_all(request.to_string().as_bytes());
        child.wait_with_output().unwrap()
    }

    /// Calls a method: its answer, or its error.
    pub fn try_call(&self, method: &str, mut request: Value) -> Result<Value, Value> {
        let fields = request.as_object_mut().unwrap();
        fields.entry("dbg").or_insert_with(|| "a task".into());
        fields.entry("sr").or_insert_with(|| self.sr.clone().into());
        let mut command = self.command(method);
        command.arg("--json");
        let output = Self::run(command, &request);
        let answer = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
        if output.status.success() { Ok(answer) } else { Err(answer) }
    }

    /// Calls a method that is to succeed.
    pub fn call(&self, method: &str, request: Value) -> Value {
        self.try_call(method, request).unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    /// Makes a volume and gives its key.
    pub fn create(&self) -> String {
        let request = json!({"name": "v", "description": "", "size": 1 << 20, "sharable": false});
        self.call("Volume.create", request)["key"].as_str().unwrap().to_owned()
    }

    /// Gives a volume's URI.
    pub fn uri(&self, volume: &str) -> String {
        format!("qsd://{}/{volume}", self.sr)
    }
}
