//! One mirror from its connection to its end.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use plugin::activation;
use plugin::error::{Error, Result};
use plugin::host::{Host, Process, Settings};
use plugin::id::{MirrorKey, VolumeUri};
use plugin::lock::FileLock;
use plugin::mirror::job::{self, JOB, JobInfo, SIZED_NODE, TARGET_NODE};
use plugin::mirror::{CopyMode, EndReply, EndRequest, How, MirrorRecord, OFFLINE_DOMAIN, Phase};
use plugin::nbd::NbdUri;
use plugin::qemu::graph;
use plugin::qemu::qmp::{Client, Events};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{sleep, timeout};

use super::control::{self, Waiting};
use super::progress::{Verdict, Watch};
use super::relay::{Peer, Relay};

/// The argument by which this executable is a supervisor; a mirror's key follows.
pub const ENTRY: &str = "mirror-supervisor";

/// How often the job is looked at when nothing calls for it.
const TICK: Duration = Duration::from_millis(200);

/// How long the peer may take to close its side after QEMU has said goodbye.
const GOODBYE: Duration = Duration::from_secs(5);

/// Looks of 10 ms that a job gets to end after its connection was cut; it takes milliseconds.
const CLEAR_LOOKS: u32 = 1000;

/// Supervises the mirror `key` until it ends. Its outcome is in the record; the exit status is for people.
pub fn main(host: &Host, key: &str) -> ExitCode {
    plugin::smapi::start_log("info");
    let outcome = key.parse::<MirrorKey>().and_then(|key| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Error::io("starting the runtime", error))?;
        runtime.block_on(supervise(host, key))
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(mirror = key, error = error.chain(), "the mirror's supervisor failed");
            ExitCode::FAILURE
        }
    }
}

/// How a mirror ended.
pub(super) enum Outcome {
    /// The destination has everything, flushed, and the connection is closed.
    Finished,
    /// A call wanted it ended.
    Cancelled(String),
}

/// Runs the mirror and records how it ended; answers whoever waits for that.
async fn supervise(host: &Host, key: MirrorKey) -> Result<()> {
    let settings = host.settings()?;
    let lock = FileLock::acquire(&MirrorRecord::supervisor_lock(host, key), settings.lock())?;
    let record =
        MirrorRecord::load(host, key)?.ok_or_else(|| Error::Internal(format!("mirror {key} has no record")))?;
    if record.phase.is_terminal() {
        tracing::info!(mirror = %key, "the mirror was ended before it began");
        let _ = fs::remove_file(lock.path());
        return Ok(());
    }
    let ends = control::listen(&EndRequest::socket(host, key))?;
    let mut supervisor = Supervisor {
        settings,
        host: host.clone(),
        record,
        ends,
        waiting: Vec::new(),
        wanted: None,
        target: TARGET_NODE,
    };
    supervisor.record.supervisor = Some(Process::current(host)?);
    supervisor.enter(Phase::Connecting);
    let outcome = supervisor.run().await;
    let (phase, reason) = match outcome {
        Ok(Outcome::Finished) => (Phase::Finished, None),
        Ok(Outcome::Cancelled(reason)) => (Phase::Cancelled, Some(reason)),
        Err(error) => (Phase::Failed, Some(error.chain())),
    };
    if supervisor.record.offline {
        // Before the end is told: whoever learns of it may go on to destroy the volume.
        close_source(host, supervisor.record.uri()).await;
    }
    supervisor.record.reason = reason;
    supervisor.record.phase = phase;
    let stored = supervisor.record.store(host);
    let _ = fs::remove_file(EndRequest::socket(host, key));
    // What the record says of a mirror that has ended needs no guard.
    let _ = fs::remove_file(lock.path());
    // Requests that came in while the mirror was ending are answered too.
    while let Ok(waiting) = supervisor.ends.try_recv() {
        supervisor.waiting.push(waiting);
    }
    for waiting in supervisor.waiting {
        waiting.answer(&EndReply { phase }).await;
    }
    stored
}

/// Closes a source that was opened for the mirror alone. On failure the next call for the volume does it.
async fn close_source(host: &Host, uri: VolumeUri) {
    let host = host.clone();
    // It has a runtime of its own.
    let closing = tokio::task::spawn_blocking(move || {
        OFFLINE_DOMAIN.parse().and_then(|domain| activation::release(&host, uri, &domain))
    });
    match closing.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(error = error.chain(), "the mirror's source could not be closed"),
        Err(error) => tracing::error!(%error, "the mirror's source could not be closed"),
    }
}

/// A mirror's supervisor.
pub(super) struct Supervisor {
    pub(super) host: Host,
    pub(super) settings: Settings,
    pub(super) record: MirrorRecord,
    pub(super) ends: UnboundedReceiver<Waiting>,
    pub(super) waiting: Vec<Waiting>,
    wanted: Option<(How, String)>,
    target: &'static str,
}

impl Supervisor {
    /// Connects, mirrors, and leaves nothing of the mirror in the storage daemon.
    async fn run(&mut self) -> Result<Outcome> {
        let uri: NbdUri = self.record.remote.parse()?;
        if self.record.copy {
            return self.copy(&uri).await;
        }
        let limit = Duration::from_secs(self.settings.handshake_seconds);
        let peer = tokio::select! {
            peer = timeout(limit, Peer::connect(&uri)) => peer.map_err(|_| Error::Timeout {
                doing: format!("connecting to {}", self.record.remote),
                seconds: limit.as_secs(),
            })??,
            reason = want_end(&mut self.ends, &mut self.waiting) => return Ok(Outcome::Cancelled(reason.1)),
        };
        self.record.description = peer.info.description.clone();
        let client =
            Client::connect(&self.host.volume_dir(self.record.volume).join("mirror.sock"), self.settings.qmp())
                .await?;
        let socket = self.socket();
        let relay = Relay::start(peer, &socket)?;
        let ended = self.mirror(&client, relay, &uri.export).await;
        let _ = fs::remove_file(&socket);
        ended
    }

    /// Gives the path at which QEMU's NBD client finds the relay.
    fn socket(&self) -> PathBuf {
        EndRequest::relay_socket(&self.host, self.record.key)
    }

    /// Runs the job over a relay that was started. On failure the relay is cut first, which frees the daemon from
    /// whatever it waits for, and then the job and the nodes are removed.
    async fn mirror(&mut self, client: &Client, mut relay: Relay, export: &str) -> Result<Outcome> {
        let outcome = match self.start(client, &mut relay, export).await {
            Ok(()) => self.watch(client, &mut relay).await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(Outcome::Finished) => {
                job::clear(client, CLEAR_LOOKS).await?;
                match timeout(GOODBYE, relay.ended()).await {
                    Ok(Ok(())) => {}
                    // Everything was flushed and acknowledged; how the peer closes does not change that.
                    Ok(Err(error)) => tracing::warn!(%error, "the peer broke off after the goodbye"),
                    Err(_) => tracing::warn!("the peer did not close after the goodbye"),
                }
                Ok(Outcome::Finished)
            }
            other => {
                relay.cut().await;
                if let Err(error) = job::clear(client, CLEAR_LOOKS).await {
                    tracing::error!(error = error.chain(), "the mirror's job could not be removed");
                }
                other
            }
        }
    }

    /// Adds the target and starts the job.
    async fn start(&mut self, client: &Client, relay: &mut Relay, export: &str) -> Result<()> {
        job::clear(client, CLEAR_LOOKS).await?;
        // detect-zeroes: an allocated zero travels as a request to write zeroes. No reconnect-delay, ever: a server
        // that was killed and started again lacks what it had not flushed, and the job would not notice.
        let node = json!({
            "driver": "nbd", "node-name": TARGET_NODE, "export": export, "discard": "unmap", "detect-zeroes": "unmap",
            "server": {"type": "unix", "path": self.socket()},
        });
        self.bounded(relay, client.execute("blockdev-add", node)).await?;
        let source = graph::node_name(self.record.node);
        let sizes = client.execute("query-named-block-nodes", json!({"flat": true})).await?;
        let target = match (size_of(&sizes, &source)?, size_of(&sizes, TARGET_NODE)?) {
            (source, target) if target < source => {
                return Err(Error::InvalidSize(format!("the destination has {target} bytes, the source {source}")));
            }
            (source, target) if target == source => TARGET_NODE,
            (source, _) => {
                let node = json!({
                    "driver": "raw", "node-name": SIZED_NODE, "file": TARGET_NODE, "size": source,
                    "discard": "unmap",
                });
                client.execute("blockdev-add", node).await?;
                SIZED_NODE
            }
        };
        self.target = target;
        self.bounded(relay, self.start_job(client, target)).await?;
        self.enter(Phase::Copying);
        Ok(())
    }

    /// Starts the job. auto-dismiss is off, so that how it ended can be asked after its end; on an error of either
    /// side it ends.
    async fn start_job(&self, client: &Client, target: &str) -> Result<Value> {
        let arguments = json!({
            "job-id": JOB, "device": graph::node_name(self.record.node), "target": target, "sync": "full",
            "copy-mode": self.record.copy_mode, "auto-dismiss": false,
            "on-source-error": "report", "on-target-error": "report",
        });
        client.execute("blockdev-mirror", arguments).await
    }

    /// Waits for a command that needs the peer, and gives it up when the peer takes too long. The guest does not
    /// notice such a command, but the daemon's monitors answer nobody else meanwhile.
    async fn bounded(&self, relay: &mut Relay, command: impl Future<Output = Result<Value>>) -> Result<Value> {
        let limit = Duration::from_secs(self.settings.peer_silence_seconds);
        tokio::pin!(command);
        tokio::select! {
            result = &mut command => return result,
            ended = relay.ended() => {
                let reason = ended.err().unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into());
                return Err(Error::io("negotiating with the destination", reason));
            }
            () = sleep(limit) => {}
        }
        Err(Error::Timeout { doing: "the destination's answer to QEMU".to_owned(), seconds: limit.as_secs() })
    }

    /// Follows the job to its end.
    async fn watch(&mut self, client: &Client, relay: &mut Relay) -> Result<Outcome> {
        let mut events = client.events();
        let silence = Duration::from_secs(self.settings.peer_silence_seconds);
        let blocking = Duration::from_secs(self.settings.blocking_silence_seconds);
        let mut watch = Watch::new(Instant::now(), silence, blocking);
        let mut drain_until = None;
        loop {
            let job =
                timeout(blocking, job::query(client)).await.map_err(|_| self.silent("the storage daemon"))??;
            let Some(job) = job else { return Err(broken("the mirror's job disappeared".to_owned())) };
            self.note(&job, relay);
            match job.status.as_str() {
                "concluded" => match job.error {
                    None if drain_until.is_some() => return Ok(Outcome::Finished),
                    None => return Err(broken("the mirror's job ended by itself".to_owned())),
                    Some(reason) => return Err(broken(reason)),
                },
                "ready" if drain_until.is_none() => {
                    if self.record.live && !self.record.was_complete {
                        self.record.was_complete = true;
                        self.enter(Phase::Ready);
                    }
                    if !self.record.live || matches!(self.wanted, Some((How::Finish, _))) {
                        self.enter(Phase::Draining);
                        // Not job-cancel, which leaves a target without the last writes.
                        client.execute("block-job-cancel", json!({"device": JOB, "force": false})).await?;
                        drain_until = Some(Instant::now() + Duration::from_secs(self.settings.drain_seconds));
                        continue;
                    }
                }
                _ => {}
            }
            if let Some((how, reason)) = &self.wanted
                && (*how == How::Cancel || !self.record.was_complete)
            {
                return Ok(Outcome::Cancelled(reason.clone()));
            }
            if drain_until.is_some_and(|until| Instant::now() >= until && self.record.live) {
                return Err(broken(format!(
                    "the last writes were not sent in {} seconds",
                    self.settings.drain_seconds
                )));
            }
            self.judge(client, &job, &mut watch, drain_until.is_some()).await?;
            self.wait(&mut events, relay, drain_until.is_some()).await?;
        }
    }

    /// Acts on what the progress says.
    async fn judge(&mut self, client: &Client, job: &JobInfo, watch: &mut Watch, draining: bool) -> Result<()> {
        let (progress, mode) = (self.record.progress, self.record.copy_mode);
        match watch.look(Instant::now(), &progress, mode, job.status == "ready", draining) {
            Verdict::Fine => Ok(()),
            Verdict::Silent => Err(self.silent("the destination")),
            Verdict::Outrun if !self.record.live || draining => Ok(()),
            Verdict::Outrun => self.slow_the_guest(client).await,
        }
    }

    /// Makes the guest's writes wait for the peer from now on.
    ///
    /// QEMU before 8.2 cannot change a job that runs: there it starts over in the other mode, as long as the mirror was
    /// not complete. One that was goes on; should its rest be too much for the drain, Datapath.deactivate fails.
    async fn slow_the_guest(&mut self, client: &Client) -> Result<()> {
        tracing::info!(mirror = %self.record.key, "the guest outruns the link: its writes wait from now on");
        let arguments = json!({"id": JOB, "type": "mirror", "copy-mode": CopyMode::WriteBlocking});
        match client.execute("block-job-change", arguments).await {
            Ok(_) => {}
            Err(Error::Qmp { class, .. }) if class == "CommandNotFound" => {
                if self.record.was_complete {
                    return Ok(());
                }
                self.record.copy_mode = CopyMode::WriteBlocking;
                job::end(client, CLEAR_LOOKS).await?;
                let target = self.target;
                self.start_job(client, target).await?;
            }
            Err(error) => return Err(error),
        }
        self.record.copy_mode = CopyMode::WriteBlocking;
        Ok(())
    }

    /// Waits for something to look at: an event, a request, the relay's end, or the next tick.
    async fn wait(&mut self, events: &mut Events, relay: &mut Relay, draining: bool) -> Result<()> {
        tokio::select! {
            event = events.next() => event.map(drop),
            wanted = want_end(&mut self.ends, &mut self.waiting) => {
                // A cancellation overrules a drain that goes on, and not the other way round.
                if !matches!(self.wanted, Some((How::Cancel, _))) {
                    self.wanted = Some(wanted);
                }
                Ok(())
            }
            ended = relay.ended(), if !draining => {
                Err(broken(match ended {
                    Ok(()) => "the destination closed the connection".to_owned(),
                    Err(error) => format!("the connection to the destination broke: {error}"),
                }))
            }
            () = sleep(TICK) => Ok(()),
        }
    }

    /// Notes how far the job is, for Data.stat.
    fn note(&mut self, job: &JobInfo, relay: &Relay) {
        let (sent, received) = relay.counters().read();
        self.record.progress = plugin::mirror::Progress { offset: job.current, length: job.total, sent, received };
        self.store();
    }

    /// Goes on to a phase, and tells.
    pub(super) fn enter(&mut self, phase: Phase) {
        tracing::info!(mirror = %self.record.key, ?phase, "mirror");
        self.record.phase = phase;
        self.store();
    }

    /// Writes the record. A full file system must not end the mirror: the last state then stands a little longer.
    pub(super) fn store(&mut self) {
        if let Err(error) = self.record.store(&self.host) {
            tracing::warn!(error = error.chain(), "the mirror's state could not be recorded");
        }
    }

    /// Makes the error of something that does not answer.
    fn silent(&self, what: &str) -> Error {
        let seconds = match self.record.copy_mode {
            CopyMode::Background => self.settings.peer_silence_seconds,
            CopyMode::WriteBlocking => self.settings.blocking_silence_seconds,
        };
        Error::Timeout { doing: format!("an answer that {what} owes"), seconds }
    }
}

/// Waits for a call that wants the mirror ended.
pub(super) async fn want_end(ends: &mut UnboundedReceiver<Waiting>, waiting: &mut Vec<Waiting>) -> (How, String) {
    match ends.recv().await {
        Some(request) => {
            let wanted = (request.request.end, request.request.reason.clone());
            waiting.push(request);
            wanted
        }
        // The control socket is broken; the mirror goes on, and a call that cannot reach it kills this process.
        None => std::future::pending().await,
    }
}

/// Finds a node's size in what `query-named-block-nodes` returned.
fn size_of(nodes: &Value, name: &str) -> Result<u64> {
    let node = nodes.as_array().and_then(|nodes| nodes.iter().find(|node| node["node-name"] == name));
    node.and_then(|node| node["image"]["virtual-size"].as_u64()).ok_or_else(|| Error::Qemu {
        doing: format!("asking for the size of node {name}"),
        reason: "the storage daemon does not tell it".to_owned(),
    })
}

/// Makes the error of a mirror that broke.
fn broken(reason: String) -> Error {
    Error::Qemu { doing: "mirroring".to_owned(), reason }
}
