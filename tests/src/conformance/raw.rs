//! Runs a script with any bytes on its stdin and in any circumstances, and judges what it prints as the daemon would.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use crate::wire::{Failure, Json};

/// No call of a check takes longer than this, unless something hangs.
const BOUND: Duration = Duration::from_secs(60);

/// What a script printed, and how it ended.
#[derive(Debug, Clone)]
pub struct Printed {
    /// Its exit code; a signal is an error instead.
    pub code: i32,
    /// Its stdout.
    pub stdout: Vec<u8>,
    /// Its stderr.
    pub stderr: String,
}

/// Runs a script. `prelude` is shell that runs before it in the same process, `redirect` what stands behind its command.
///
/// # Errors
/// A signal, an output that does not end, or a panic.
pub async fn run(script: &Path, root: &Path, input: &[u8], prelude: &str, redirect: &str) -> Result<Printed> {
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(format!("trap '' PIPE; {prelude} exec \"$0\" --json {redirect}")).arg(script);
    finish(command, script, root, input).await
}

/// Runs a script with arguments instead of `--json`, as static-vdis does.
///
/// # Errors
/// As [`run`].
pub async fn run_line(script: &Path, root: &Path, arguments: &[&str]) -> Result<Printed> {
    let mut command = Command::new(script);
    command.args(arguments);
    finish(command, script, root, b"").await
}

async fn finish(mut command: Command, script: &Path, root: &Path, input: &[u8]) -> Result<Printed> {
    let mut child = command
        .current_dir("/")
        .env("XAPI_STORAGE_QCOW2_ROOT", root)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {}", script.display()))?;
    let (Some(mut stdin), Some(mut stdout), Some(mut stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        bail!("{} has no pipes", script.display());
    };
    let input = input.to_vec();
    let write = async move {
        // A script that does not read gets a broken pipe, which is its own business.
        let _ = stdin.write_all(&input).await;
    };
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let all = async { tokio::join!(write, stdout.read_to_end(&mut out), stderr.read_to_end(&mut err), child.wait()) };
    let ended = tokio::time::timeout(BOUND, all).await;
    let name = script.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let ((), read_out, read_err, status) = ended.with_context(|| format!("{name} and its output did not end"))?;
    read_out.and(read_err).with_context(|| format!("{name}: reading its output"))?;
    let status = status?;
    let stderr = String::from_utf8_lossy(&err).into_owned();
    if let Some(signal) = status.signal() {
        bail!("{name} was ended by signal {signal}: {stderr}");
    }
    let printed = Printed { code: status.code().unwrap_or(-1), stdout: out, stderr };
    for text in [&printed.stderr, &String::from_utf8_lossy(&printed.stdout).into_owned()] {
        ensure!(!text.contains("panicked at"), "{name} panicked: {text}");
    }
    Ok(printed)
}

impl Printed {
    /// The answer, or the script's own failure.
    ///
    /// # Errors
    /// Anything that would reach xapi as `SCRIPT_FAILED`.
    pub fn judge(&self) -> Result<Result<Json, Failure>> {
        let text = String::from_utf8_lossy(&self.stdout);
        let start: String = text.chars().take(300).collect();
        let json = Json::parse(&self.stdout).with_context(|| {
            format!("exit {} with bad JSON on stdout: {start:?}, stderr {:?}", self.code, self.stderr)
        })?;
        if self.code == 0 {
            return Ok(Ok(json));
        }
        let failure = Failure::decode(&json).with_context(|| format!("exit {} with {start:?}", self.code))?;
        Ok(Err(failure))
    }
}
