//! One run of a script as a process: its environment, its pipes, its end.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use super::stray;
use crate::processes::Process;
use crate::wire::Failure;

/// After a script has ended, its pipes have to end within this time, or something it left running holds them.
const PIPES_BOUND: Duration = Duration::from_secs(5);

/// How a script ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Exit code 0.
    Success,
    /// Any other exit code.
    Code(i32),
    /// A signal.
    Signal(i32),
}

/// What a script left.
#[derive(Debug, Clone)]
pub struct Output {
    /// All of its stdout.
    pub stdout: Vec<u8>,
    /// All of its stderr.
    pub stderr: Vec<u8>,
    /// How it ended.
    pub exit: Exit,
}

/// What a script is run by.
#[derive(Debug, Clone)]
pub(super) enum How {
    /// Itself.
    Plain,
    /// The observer, which is a Python module, with this trace context.
    Traced(String),
    /// A program that is no script, with these arguments: what a script is measured against.
    Program(Vec<OsString>),
}

/// Runs a script to its end.
pub(super) async fn run(script: &Path, root: &Path, how: &How, input: &str) -> Result<Output, Failure> {
    let child = spawn(script, root, how)?;
    finish(child, script, input).await
}

/// Runs a script and kills it after a while, if it has not ended before.
pub(super) async fn run_and_kill(
    script: &Path,
    root: &Path,
    how: &How,
    input: &str,
    after: Duration,
) -> Result<Output, Failure> {
    let child = spawn(script, root, how)?;
    let pid = child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed()));
    let finish = finish(child, script, input);
    tokio::pin!(finish);
    tokio::select! {
        output = &mut finish => return output,
        () = tokio::time::sleep(after) => {}
    }
    if let Some(pid) = pid {
        // The child has not been waited for yet, so its pid cannot be another process's.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
    finish.await
}

fn spawn(script: &Path, root: &Path, how: &How) -> Result<Child, Failure> {
    stray::keep_open();
    // std gives a child the default SIGPIPE; the daemon's children ignore it. A shell is what can set that
    // before exec without unsafe code here; it leaves the same process with the script's path as argv[0].
    let mut command = Command::new("/bin/sh");
    command.arg("-c");
    match how {
        How::Plain => command.arg("trap '' PIPE; exec \"$0\" --json"),
        How::Traced(traceparent) => command
            .arg("trap '' PIPE; exec /usr/bin/python3 -m observer \"$0\" --json")
            .env("TRACEPARENT", traceparent)
            .env("OBSERVER_CONFIG_DIR", "/etc/xensource/observer/smapi/enabled")
            .env("PYTHONPATH", script.parent().unwrap_or(Path::new("/"))),
        How::Program(_) => command.arg("trap '' PIPE; exec \"$0\" \"$@\""),
    };
    command.arg(script);
    if let How::Program(arguments) = how {
        command.args(arguments);
    }
    command
        .current_dir("/")
        .env("XAPI_STORAGE_QCOW2_ROOT", root)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| Failure::script_failed(&script.to_string_lossy(), "cannot start", &e.to_string()))
}

async fn finish(mut child: Child, script: &Path, input: &str) -> Result<Output, Failure> {
    let name = script.to_string_lossy();
    let lost = |e: std::io::Error| Failure::script_failed(&name, "lost the process", &e.to_string());
    let (Some(mut stdin), Some(mut stdout), Some(mut stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(Failure::script_failed(&name, "lost the process", "no pipes"));
    };
    let holders = [pipe_of(&stdout), pipe_of(&stderr)];

    let (mut out, mut err) = (Vec::new(), Vec::new());
    let exit = {
        let write = async move {
            // A script that does not read gets a broken pipe, which is its own business.
            let _ = stdin.write_all(input.as_bytes()).await;
            drop(stdin);
        };
        let read_out = stdout.read_to_end(&mut out);
        let read_err = stderr.read_to_end(&mut err);
        let pipes = async { tokio::join!(write, read_out, read_err) };
        tokio::pin!(pipes);
        let mut read = None;
        let status = tokio::select! {
            ended = &mut pipes => {
                read = Some(ended);
                child.wait().await
            }
            status = child.wait() => status,
        }
        .map_err(lost)?;
        let ended = match read {
            Some(ended) => ended,
            None => tokio::time::timeout(PIPES_BOUND, &mut pipes).await.map_err(|_| {
                let held = holders_of(&holders).join(", ");
                Failure::script_failed(&name, "ended, but its output is still held open", &held)
            })?,
        };
        ended.1.and(ended.2).map_err(lost)?;
        match (status.code(), status.signal()) {
            (Some(0), _) => Exit::Success,
            (Some(code), _) => Exit::Code(code),
            (None, signal) => Exit::Signal(signal.unwrap_or(0)),
        }
    };
    Ok(Output { stdout: out, stderr: err, exit })
}

fn pipe_of(fd: &impl std::os::fd::AsFd) -> u64 {
    rustix::fs::fstat(fd).map(|s| s.st_ino).unwrap_or(0)
}

/// The processes that hold one of these pipes, as `pid command`.
fn holders_of(pipes: &[u64]) -> Vec<String> {
    let wanted: Vec<String> = pipes.iter().map(|ino| format!("pipe:[{ino}]")).collect();
    let is_wanted = |opened: PathBuf| wanted.iter().any(|pipe| opened.as_os_str() == pipe.as_str());
    let holders = Process::all().filter(|process| process.opened().any(is_wanted));
    holders.map(|process| format!("{} {}", process.pid, process.command())).collect()
}
