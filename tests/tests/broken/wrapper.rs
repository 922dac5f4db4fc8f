//! One call of a broken plugin: the real executable is run, and a fault changes what goes in or comes out.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::faults;

/// What the wrapper finds at the root of its plugin.
#[derive(Serialize, Deserialize)]
pub struct Settings {
    /// The fault's name, or nothing.
    pub fault: String,
    /// Where the real executables are.
    pub binaries: PathBuf,
    /// A directory for what lasts from one call to the next.
    pub notes: PathBuf,
}

const FILE: &str = "broken.json";

impl Settings {
    /// Writes them at the root of a plugin.
    pub fn write(&self, root: &Path) -> Result<()> {
        Ok(std::fs::write(root.join(FILE), serde_json::to_vec(self)?)?)
    }
}

/// A call that the plugin was made for.
pub struct Call {
    /// The script's name.
    pub method: String,
    /// The request; null if it is no JSON.
    pub request: Value,
    input: Vec<u8>,
    settings: Settings,
    binary: &'static str,
}

/// What is printed, and the exit status.
pub struct Answer {
    /// Whether the exit status is that of a success.
    pub success: bool,
    /// What is printed to stdout.
    pub text: Vec<u8>,
}

/// Answers a call, if this executable was started as a method of a broken plugin.
pub fn called_as(own: &Path) -> Result<Option<ExitCode>> {
    let (Some(directory), Some(method)) = (own.parent(), own.file_name().and_then(|name| name.to_str())) else {
        return Ok(None);
    };
    let Some(root) = directory.parent().and_then(Path::parent) else { return Ok(None) };
    let Ok(settings) = std::fs::read(root.join(FILE)) else { return Ok(None) };
    let datapath = directory.parent().is_some_and(|kind| kind.ends_with("datapath"));
    let mut input = Vec::new();
    if !by_arguments() {
        std::io::stdin().read_to_end(&mut input)?;
    }
    let call = Call {
        method: method.to_owned(),
        request: serde_json::from_slice(&input).unwrap_or_default(),
        input,
        settings: serde_json::from_slice(&settings)?,
        binary: if datapath { "xapi-storage-qcow2-datapath" } else { "xapi-storage-qcow2-volume" },
    };
    let fault = faults::all().into_iter().find(|fault| fault.breaks == call.settings.fault);
    let answer = match fault.and_then(|fault| (fault.act)(&call)) {
        Some(answer) => answer,
        None => call.real()?,
    };
    std::io::stdout().write_all(&answer.text)?;
    Ok(Some(if answer.success { ExitCode::SUCCESS } else { ExitCode::FAILURE }))
}

/// Whether the request is in the arguments, as static-vdis gives it.
pub fn by_arguments() -> bool {
    std::env::args_os().nth(1).is_some_and(|first| first != "--json")
}

impl Call {
    /// Whether it is one of these methods.
    pub fn is(&self, methods: &[&str]) -> bool {
        methods.contains(&self.method.as_str())
    }

    /// A text of the request.
    pub fn text(&self, field: &str) -> &str {
        self.request[field].as_str().unwrap_or_default()
    }

    /// What the plugin itself answers.
    pub fn real(&self) -> Result<Answer> {
        self.run(&self.method, &self.input)
    }

    /// What the plugin itself answers, as far as it can be asked.
    pub fn answer(&self) -> Option<Answer> {
        self.real().ok()
    }

    /// What the plugin itself answers to another request.
    pub fn other(&self, method: &str, fields: &Value) -> Option<Answer> {
        let mut request = self.request.clone();
        for (name, value) in fields.as_object()? {
            request[name.as_str()] = value.clone();
        }
        self.run(method, request.to_string().as_bytes()).ok()
    }

    fn run(&self, method: &str, input: &[u8]) -> Result<Answer> {
        let mut child = Command::new(self.settings.binaries.join(self.binary))
            .arg(method)
            .args(std::env::args_os().skip(1))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("the real executable")?;
        let mut stdin = child.stdin.take().context("there is a pipe")?;
        // Who does not read has decided without it.
        let _ = stdin.write_all(input);
        drop(stdin);
        let output = child.wait_with_output()?;
        Ok(Answer { success: output.status.success(), text: output.stdout })
    }

    /// What was noted under a name by an earlier call of this plugin.
    pub fn noted(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(self.note_path(name)).ok()
    }

    /// Notes something for later calls.
    pub fn note(&self, name: &str, text: &str) {
        let _ = std::fs::write(self.note_path(name), text);
    }

    fn note_path(&self, name: &str) -> PathBuf {
        self.settings.notes.join(name.replace('/', "_"))
    }
}

impl Answer {
    /// A success.
    pub fn of(value: &Value) -> Self {
        Self { success: true, text: value.to_string().into_bytes() }
    }

    /// An error with everything that belongs to one.
    pub fn refusal(code: &str) -> Self {
        let backtrace = json!({"error": "broken", "files": [], "lines": []});
        let error = json!({"code": code, "params": ["", "broken on purpose", ""], "backtrace": backtrace});
        Self { success: false, text: error.to_string().into_bytes() }
    }

    /// What was answered, or the error's document.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.text).unwrap_or_default()
    }

    /// Whether it is an error with a code.
    pub fn failed_with(&self, code: &str) -> bool {
        !self.success && self.json()["code"] == code
    }

    /// Changes what was answered.
    pub fn edit(self, change: impl FnOnce(&mut Value)) -> Option<Self> {
        let mut value = self.json();
        change(&mut value);
        Some(Self { success: self.success, text: value.to_string().into_bytes() })
    }

    /// Changes every volume in an answer: the one of a call about one, or those of SR.ls.
    pub fn edit_volumes(self, mut change: impl FnMut(&mut Value)) -> Option<Self> {
        if !self.success {
            return Some(self);
        }
        self.edit(|value| match value {
            Value::Array(volumes) => volumes.iter_mut().for_each(change),
            volume => change(volume),
        })
    }
}
