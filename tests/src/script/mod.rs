//! Runs one script of a plugin as xapi-storage-script does, records the call, and injects faults on request.
//!
//! `<dir>/<Method> --json`, the whole path as `argv[0]`, `/` as the directory, SIGPIPE ignored, a few stray
//! descriptors inherited, the request on stdin without a newline and then the end of file. Both output
//! pipes are read to their end. There is no time-out: a slow script is waited for. With tracing on it is
//! `python3 -m observer <dir>/<Method> --json` instead.

mod fault;
mod log;
mod process;
mod stray;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use uuid::Uuid;

pub use fault::{Action, CallSite, Fault, FaultHook, Faults};
pub use log::{CallLog, CallRecord};
use process::How;
pub use process::{Exit, Output};
pub use stray::stray_descriptors;

use crate::wire::{Failure, Json, Request};

/// Runs scripts on one host.
#[derive(Debug, Clone)]
pub struct Runner {
    host: Arc<str>,
    root: Arc<Path>,
    log: CallLog,
    faults: Faults,
    traced: Arc<AtomicBool>,
}

impl Runner {
    /// A runner whose scripts find the host below `root`.
    #[must_use]
    pub fn new(host: &str, root: &Path, log: CallLog, faults: Faults) -> Self {
        Self { host: host.into(), root: root.into(), log, faults, traced: Arc::default() }
    }

    /// Where the calls are recorded.
    #[must_use]
    pub fn log(&self) -> &CallLog {
        &self.log
    }

    /// Where faults are ordered.
    #[must_use]
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Runs every script from now on by the observer, with a trace context of its own, as xapi does with tracing on
    /// (ocaml/xapi-storage-script/main.ml, `fork_exec_rpc`); clones share it.
    pub fn trace(&self, on: bool) {
        self.traced.store(on, Ordering::SeqCst);
    }

    /// Calls one script and answers what it printed.
    ///
    /// # Errors
    /// The script's own failure, or `SCRIPT_MISSING`, `SCRIPT_NOT_EXECUTABLE` or `SCRIPT_FAILED`.
    pub async fn call(&self, dir: &Path, request: &Request) -> Result<Json, Failure> {
        let script = script_path(dir, request.method)?;
        let number = self.log.begin(&self.host, request);
        let site = CallSite { number, host: &self.host, request };
        let fault = self.faults.strike(&site);
        let (answer, discarded) = match &fault {
            None => (self.run(&script, request).await, None),
            Some(Fault::FailInstead) => (Err(injected(request, "instead of running")), None),
            Some(Fault::FailAfter) => {
                let lost = self.run(&script, request).await;
                (Err(injected(request, "after running")), Some(lost))
            }
            Some(Fault::TwiceAtOnce) => {
                let (first, second) = tokio::join!(self.run(&script, request), self.run(&script, request));
                both(first, second)
            }
            Some(Fault::TwiceInARow) => {
                let first = self.run(&script, request).await;
                both(first, self.run(&script, request).await)
            }
            Some(Fault::Kill(after)) => {
                let how = self.how();
                let input = input(request, &how);
                let output = process::run_and_kill(&script, &self.root, &how, &input, *after).await;
                (interpret(&script, output), None)
            }
            Some(Fault::Lost { after, told }) => {
                if *after {
                    let answer = self.run(&script, request).await;
                    self.log.end(number, &answer, fault.as_ref(), None);
                }
                told.notify_one();
                std::future::pending().await
            }
            Some(Fault::Before(action)) => {
                action(&site);
                (self.run(&script, request).await, None)
            }
            Some(Fault::After(action)) => {
                let answer = self.run(&script, request).await;
                action(&site);
                (answer, None)
            }
        };
        self.log.end(number, &answer, fault.as_ref(), discarded);
        answer
    }

    async fn run(&self, script: &Path, request: &Request) -> Result<Json, Failure> {
        let how = self.how();
        interpret(script, process::run(script, &self.root, &how, &input(request, &how)).await)
    }

    /// Runs a program that is no script, in all else as a script is run; neither recorded nor made to fail.
    ///
    /// # Errors
    /// `SCRIPT_FAILED`, when it cannot be started or holds its output open.
    pub async fn run_program(&self, program: &Path, arguments: &[&OsStr]) -> Result<Output, Failure> {
        let how = How::Program(arguments.iter().map(|argument| (*argument).to_owned()).collect());
        process::run(program, &self.root, &how, "").await
    }

    fn how(&self) -> How {
        if !self.traced.load(Ordering::SeqCst) {
            return How::Plain;
        }
        let (trace, span) = (Uuid::new_v4().simple(), Uuid::new_v4().simple().to_string());
        How::Traced(format!("00-{trace}-{}-01", &span[..16]))
    }
}

/// What is written to a script's stdin.
fn input(request: &Request, how: &How) -> String {
    match how {
        How::Plain | How::Program(_) => request.encode(),
        How::Traced(traceparent) => request.traced(traceparent).encode(),
    }
}

/// Finds the script of a method, whatever the case of its name.
///
/// # Errors
/// `SCRIPT_MISSING` or `SCRIPT_NOT_EXECUTABLE`.
pub fn script_path(dir: &Path, method: &str) -> Result<PathBuf, Failure> {
    let exact = dir.join(method);
    let path = if exact.exists() { Some(exact) } else { other_spelling(dir, method) };
    let Some(path) = path else {
        let missing = dir.join(method);
        let missing = missing.to_string_lossy();
        return Err(Failure::own(
            "SCRIPT_MISSING",
            &[&missing, "Check whether the file exists and has correct permissions"],
        ));
    };
    match rustix::fs::access(&path, rustix::fs::Access::EXEC_OK) {
        Ok(()) => Ok(path),
        Err(e) => Err(Failure::own("SCRIPT_NOT_EXECUTABLE", &[&path.to_string_lossy(), &e.to_string()])),
    }
}

fn other_spelling(dir: &Path, method: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(dir).ok()?;
    let mut matching: Vec<PathBuf> = entries
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().eq_ignore_ascii_case(method))
        .map(|e| e.path())
        .collect();
    matching.sort();
    matching.into_iter().next()
}

fn interpret(script: &Path, output: Result<Output, Failure>) -> Result<Json, Failure> {
    let name = script.to_string_lossy();
    let output = output?;
    let printed = String::from_utf8_lossy(&output.stdout);
    let parsed = Json::parse(&output.stdout);
    match output.exit {
        Exit::Success => {
            parsed.map_err(|e| Failure::script_failed(&name, "bad json on stdout", &format!("{e}: {printed:?}")))
        }
        Exit::Code(code) => {
            let because = |e: &dyn std::fmt::Display| {
                let stderr = String::from_utf8_lossy(&output.stderr);
                let cause = format!("exit code {code}, {e}, stdout {printed:?}, stderr {stderr:?}");
                Failure::script_failed(&name, "non-zero exit and bad json on stdout", &cause)
            };
            match parsed {
                Err(e) => Err(because(&e)),
                Ok(value) => Err(Failure::decode(&value).unwrap_or_else(|e| because(&e))),
            }
        }
        Exit::Signal(signal) => Err(Failure::script_failed(&name, "signalled", &signal.to_string())),
    }
}

fn injected(request: &Request, when: &str) -> Failure {
    Failure::own("INJECTED", &[request.method, when])
}

type Answer = Result<Json, Failure>;

/// The caller that was restarted sees the second answer only; a first one that failed is the plugin's fault.
fn both(first: Answer, second: Answer) -> (Answer, Option<Answer>) {
    match (first, second) {
        (Err(first), second) => (Err(first), Some(second)),
        (first, second) => (second, Some(first)),
    }
}

#[cfg(test)]
mod tests;
