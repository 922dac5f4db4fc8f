//! Copying between two neighbouring layers of a chain that nobody writes to, by a storage daemon of its own that ends with
//! the process that started it.
//!
//! Nothing but data is changed: no header, no size but that of a base that was smaller. QEMU would make the image that
//! takes the data name another backing once its job is completed; so the job is told to wait before that, and cancelled
//! there.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, setpriority_process};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout_at};

use super::qmp::Client;
use super::{Image, graph};
use crate::error::{Error, Result};
use crate::host::end_with_this;
use crate::lock::FileLock;
use crate::store::{Direction, Mode};

/// How often it is looked how far the job is, and whether it is to stop.
const LOOK: Duration = Duration::from_millis(20);

/// How long a new daemon may take to answer.
const FIRST_ANSWER: Duration = Duration::from_secs(3);

/// How often a daemon is started that does not answer.
const ATTEMPTS: u32 = 3;

/// How long a daemon may take to close its files when whoever needs them waits for that.
const GRACE: Duration = Duration::from_millis(60);

/// How long it may take when nobody waits.
const PATIENCE: Duration = Duration::from_secs(600);

/// How often it is told to end. QEMU's main loop does not notice a signal that comes right before it begins to wait.
const TOLD: Duration = Duration::from_millis(20);

/// How kind a daemon is to a guest that runs, as `nice` counts it.
const NICE: i32 = 10;

/// The job's id.
const JOB: &str = "merge";

/// How the copying ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// Everything was copied and is durable.
    All,
    /// It was to stop.
    Stopped,
}

/// A storage daemon; killed when it is dropped.
struct Daemon {
    child: Child,
}

/// What is copied from where to where.
#[derive(Clone, Copy, Debug)]
pub struct Task<'a> {
    /// The files down to the root; it is the first two that are merged.
    pub chain: &'a [Image],
    /// Whether the second one takes what the first one has, or the first one what the second has and it has not.
    pub direction: Direction,
    /// Where a guest has the files open, below what it writes to: at most so many bytes a second are copied then.
    pub live: Option<u64>,
}

/// Copies what the one of two images has to the other, by the storage daemon's program. The sockets are made in
/// `directory`. The lock is held by whatever copies, as long as it lives.
///
/// `progress` is told the bytes done and to do, `stop` says whether to stop, and is asked all the time. Stopped or failed,
/// the chain reads as before; done again, it goes on.
///
/// # Errors
///
/// [`Error::NoSpace`]; [`Error::Qmp`] when an image is in use; else what QEMU says.
pub async fn copy(
    program: &Path,
    directory: &Path,
    task: Task<'_>,
    lock: &FileLock,
    progress: impl FnMut(u64, u64),
    stop: impl Fn() -> bool,
) -> Result<Copied> {
    let mut attempt = 1;
    loop {
        let mut daemon = Daemon::start(program, directory, lock, task.live.is_some())?;
        let asked = async {
            while !stop() {
                sleep(LOOK).await;
            }
        };
        let connected = tokio::select! {
            connected = daemon.connect(directory) => connected,
            () = asked => return daemon.stop(GRACE).await.map(|()| Copied::Stopped),
        };
        let client = match connected {
            Err(error @ (Error::Timeout { .. } | Error::Qemu { .. }))
                if attempt < ATTEMPTS && !daemon.has_ended()? =>
            {
                tracing::info!(error = error.chain(), "a new storage daemon does not answer: starting another");
                attempt += 1;
                continue;
            }
            connected => connected?,
        };
        let asked = async {
            while !stop() {
                sleep(LOOK).await;
            }
        };
        // A daemon that hangs is not waited for by whoever needs the images.
        tokio::select! {
            copied = task.carry_out(&client, progress) => copied?,
            () = asked => {
                let deadline = Instant::now() + GRACE;
                drop(timeout_at(deadline - GRACE / 3, Job::give_up(&client)).await);
                drop(client);
                return daemon.stop(deadline.duration_since(Instant::now())).await.map(|()| Copied::Stopped);
            }
        }
        drop(client);
        daemon.stop(PATIENCE).await?;
        let target = &task.target()?.path;
        let synced = File::open(target).and_then(|file| file.sync_all());
        return synced.map_err(Error::on("syncing", target)).map(|()| Copied::All);
    }
}

impl Task<'_> {
    /// Gives the two images and those below them.
    fn parts(&self) -> Result<(&Image, &Image, &[Image])> {
        match self.chain {
            [upper, lower, below @ ..] => Ok((upper, lower, below)),
            _ => Err(Error::Internal("a merge of less than two images".to_owned())),
        }
    }

    /// Gives the image that takes the data.
    fn target(&self) -> Result<&Image> {
        let (upper, lower, _) = self.parts()?;
        Ok(if self.direction == Direction::Down { lower } else { upper })
    }

    /// Opens the chain, copies, and sees that everything is written.
    async fn carry_out(&self, client: &Client, mut progress: impl FnMut(u64, u64)) -> Result<()> {
        let (upper, lower, below) = self.parts()?;
        let target = self.target()?;
        let base = below.first().map(|image| image.node);
        let mut commands = Vec::new();
        let mut backing = None;
        for image in self.chain.iter().rev() {
            let mode = if image.node == target.node { Mode::ReadWrite } else { Mode::ReadOnly };
            let is_locked = self.live.is_none() || mode == Mode::ReadOnly;
            commands.extend(graph::plain_commands(image, mode, backing, is_locked)?);
            backing = Some(image.node);
        }
        let name = graph::node_name;
        let (command, mut arguments) = match self.direction {
            Direction::Down => ("block-commit", json!({"base-node": name(lower.node)})),
            Direction::Up => ("block-stream", json!({"auto-finalize": false})),
        };
        arguments["job-id"] = JOB.into();
        arguments["device"] = name(upper.node).into();
        arguments["auto-dismiss"] = false.into();
        arguments["on-error"] = "report".into();
        if let Some(speed) = self.live {
            arguments["speed"] = speed.into();
        }
        if let (Direction::Up, Some(base)) = (self.direction, base) {
            arguments["base-node"] = name(base).into();
        }
        commands.push((command, arguments));
        graph::carry_out(client, commands).await?;
        loop {
            let job = Job::of(client).await?;
            progress(job.current, job.total);
            match (job.status.as_str(), self.direction) {
                ("ready", Direction::Down) => {
                    // Without force it ends as it is, everything written.
                    client.execute("block-job-cancel", json!({"device": JOB, "force": false})).await?;
                    if let Some(error) = Job::ended(client).await?.failure() {
                        return Err(error);
                    }
                    break;
                }
                ("pending", Direction::Up) => {
                    client.execute("job-cancel", json!({"id": JOB})).await?;
                    Job::ended(client).await?;
                    break;
                }
                ("concluded", _) => {
                    return Err(job.failure().unwrap_or_else(|| Error::Qemu {
                        doing: "merging".to_owned(),
                        reason: "the job ended by itself".to_owned(),
                    }));
                }
                _ => sleep(LOOK).await,
            }
        }
        let backing = if self.direction == Direction::Down { base } else { Some(lower.node) };
        // The only flush whose failure is told.
        let options = graph::plain_options(target, Mode::ReadOnly, backing);
        client.execute("blockdev-reopen", json!({"options": [options]})).await.map(drop)
    }
}

/// What QEMU says of the job.
struct Job {
    status: String,
    current: u64,
    total: u64,
    error: Option<String>,
}

impl Job {
    /// Asks for the job.
    async fn of(client: &Client) -> Result<Self> {
        let jobs: Value = client.execute("query-jobs", json!({})).await?;
        let job = jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == JOB));
        let job = job.ok_or_else(|| Error::Internal("the job of a merge is gone".to_owned()))?;
        Ok(Self {
            status: job["status"].as_str().unwrap_or_default().to_owned(),
            current: job["current-progress"].as_u64().unwrap_or_default(),
            total: job["total-progress"].as_u64().unwrap_or_default(),
            error: job["error"].as_str().map(str::to_owned),
        })
    }

    /// Waits for the job's end.
    async fn ended(client: &Client) -> Result<Self> {
        loop {
            let job = Self::of(client).await?;
            if job.status == "concluded" {
                return Ok(job);
            }
            sleep(LOOK / 20).await;
        }
    }

    /// Ends the job, whatever it has done. A daemon that is told to end while a job runs has been seen to crash.
    async fn give_up(client: &Client) -> Result<()> {
        client.execute("block-job-cancel", json!({"device": JOB, "force": true})).await?;
        Self::ended(client).await.map(drop)
    }

    /// Gives why it failed, if it did.
    fn failure(&self) -> Option<Error> {
        let reason = self.error.clone()?;
        Some(if reason.contains("No space left on device") || reason.contains("Disk quota exceeded") {
            Error::NoSpace { doing: "merging".to_owned(), source: None }
        } else {
            Error::Qemu { doing: "merging".to_owned(), reason }
        })
    }
}

impl Daemon {
    /// Starts a daemon that nothing but this process uses.
    fn start(program: &Path, directory: &Path, lock: &FileLock, is_live: bool) -> Result<Self> {
        let log = log(directory);
        for path in [&socket(directory), &pid_file(directory)] {
            crate::record::remove(path)?;
        }
        let output = File::create(&log).map_err(Error::on("creating", &log))?;
        let mut command = Command::new(program);
        command.arg("--chardev").arg(super::daemon::chardev("qmp", &socket(directory))?);
        command.args(["--monitor", "chardev=qmp,mode=control", "--pidfile"]).arg(pid_file(directory));
        command.current_dir("/").env_clear().env("LC_ALL", "C").env("PATH", "/usr/bin:/bin");
        command.stdin(Stdio::from(lock.share()?)).stdout(Stdio::null()).stderr(output);
        let child =
            end_with_this(&mut command).spawn().map_err(|error| Error::io("starting the storage daemon", error))?;
        let daemon = Self { child };
        if is_live && let Some(pid) = daemon.pid() {
            // A guest comes first.
            let _ = setpriority_process(Some(pid), NICE);
        }
        Ok(daemon)
    }

    /// Connects to it, once it answers.
    async fn connect(&mut self, directory: &Path) -> Result<Client> {
        let deadline = Instant::now() + FIRST_ANSWER;
        // As with every daemon: nobody connects before it has set itself up.
        while !pid_file(directory).exists() {
            if self.has_ended()? {
                let said = fs::read_to_string(log(directory)).unwrap_or_default();
                let doing = "starting the storage daemon".to_owned();
                return Err(Error::Qemu { doing, reason: said.trim().to_owned() });
            }
            if Instant::now() >= deadline {
                let doing = "starting the storage daemon".to_owned();
                return Err(Error::Timeout { doing, seconds: FIRST_ANSWER.as_secs() });
            }
            sleep(Duration::from_millis(1)).await;
        }
        // The first one to see that it answers, the second one to be patient with what takes long.
        drop(Client::connect(&socket(directory), FIRST_ANSWER).await?);
        Client::connect_at_once(&socket(directory), PATIENCE).await
    }

    fn pid(&self) -> Option<Pid> {
        i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
    }

    fn has_ended(&mut self) -> Result<bool> {
        let status = self.child.try_wait().map_err(|error| Error::io("waiting for the storage daemon", error))?;
        Ok(status.is_some())
    }

    /// Ends the daemon, which closes its files if it can in the time given.
    async fn stop(&mut self, grace: Duration) -> Result<()> {
        let deadline = Instant::now() + grace;
        let mut again = Instant::now();
        while Instant::now() < deadline {
            if self.has_ended()? {
                return Ok(());
            }
            // A child that was not waited for keeps its number.
            if let Some(pid) = self.pid().filter(|_| Instant::now() >= again) {
                let _ = kill_process(pid, Signal::TERM);
                again = Instant::now() + TOLD;
            }
            sleep(Duration::from_millis(1)).await;
        }
        self.kill()
    }

    fn kill(&mut self) -> Result<()> {
        drop(self.child.kill());
        self.child.wait().map(drop).map_err(|error| Error::io("waiting for the storage daemon", error))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.kill());
    }
}

fn socket(directory: &Path) -> PathBuf {
    directory.join("qmp.sock")
}

fn pid_file(directory: &Path) -> PathBuf {
    directory.join("daemon.pid")
}

fn log(directory: &Path) -> PathBuf {
    directory.join("daemon.log")
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;
    use crate::qemu::block_on;

    #[test]
    fn a_daemon_that_misses_a_signal_is_told_again() {
        // As QEMU's, which sets a flag and then waits for something else.
        let deaf = "trap 'trap - TERM' TERM; echo; while :; do sleep 0.01; done";
        let mut child = Command::new("sh").args(["-c", deaf]).stdout(Stdio::piped()).spawn().unwrap();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
        let mut daemon = Daemon { child };
        let stopped = async { tokio::time::timeout(Duration::from_secs(20), daemon.stop(PATIENCE)).await };
        block_on(async { Ok(stopped.await) }).unwrap().unwrap().unwrap();
        assert!(daemon.has_ended().unwrap());
    }
}
