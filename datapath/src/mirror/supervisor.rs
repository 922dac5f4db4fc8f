//! One mirror from its connection to its end.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use plugin::activation;
use plugin::error::{Error, Result};
use plugin::failures::Failure;
use plugin::host::{Host, Process, Settings};
use plugin::id::{MirrorKey, VolumeUri};
use plugin::lock::FileLock;
use plugin::mirror::job::TARGET_NODE;
use plugin::mirror::{EndReply, EndRequest, How, MirrorRecord, OFFLINE_DOMAIN, Phase, Plan, Speedometer};
use plugin::nbd::NbdUri;
use plugin::qemu::qmp::Client;
use plugin::store::Sr;
use plugin::trace;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::timeout;
use tracing::Instrument;

use super::control::{self, Waiting};
use super::missed::Missed;
use super::prepare::{Begun, Inner};
use super::relay::{Peer, Relay};
use crate::detached;

/// The argument by which this executable is a supervisor; a mirror's key follows.
pub const ENTRY: &str = "mirror-supervisor";

/// Supervises the mirror `key` until it ends. Its outcome is in the record; the exit status is for people.
pub fn main(host: &Host, key: &str) -> ExitCode {
    detached::run(host, "mirror's supervisor", key, async |key| supervise(host, key).await)
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
    if let Some(origin) = &record.trace {
        trace::begin_from(host, origin);
    }
    let what = if record.copy { "copy" } else { "mirror" };
    trace::name(what);
    for (name, value) in [
        ("qcow2.sr", record.sr.to_string()),
        ("qcow2.volume", record.volume.to_string()),
        ("qcow2.mirror", key.to_string()),
        ("qcow2.dbg", record.debug_info.clone()),
    ] {
        trace::tag(name, value);
    }
    let (sr, volume, dbg) = (record.sr, record.volume, record.debug_info.escape_debug().to_string());
    let span = tracing::error_span!("mirror", method = what, %sr, %volume, mirror = %key, dbg);
    let supervised = carry_out(host, settings, lock, record).instrument(span).await;
    trace::end();
    supervised
}

/// Supervises a mirror that has not ended, to its end.
async fn carry_out(host: &Host, settings: Settings, lock: FileLock, record: MirrorRecord) -> Result<()> {
    let begun = Instant::now();
    let ends = control::listen(&EndRequest::socket(host, record.key))?;
    let is_to_verify = settings.verify || Sr::verifies(host, record.sr);
    let mut supervisor = Supervisor {
        settings,
        host: host.clone(),
        record,
        ends,
        waiting: Vec::new(),
        wanted: None,
        layers: Vec::new(),
        begun: None,
        target: TARGET_NODE,
        missed: Missed::Nothing,
        is_to_verify,
        speedometer: Speedometer::default(),
    };
    supervisor.record.supervisor = Some(Process::current(host)?);
    supervisor.enter(Phase::Connecting);
    let outcome = supervisor.run().await;
    let (phase, reason) = match &outcome {
        Ok(Outcome::Finished) => {
            supervisor.remember();
            (Phase::Finished, None)
        }
        Ok(Outcome::Cancelled(reason)) => (Phase::Cancelled, Some(reason.clone())),
        Err(error) => (Phase::Failed, Some(error.chain())),
    };
    supervisor.tell_end(phase, outcome.as_ref().err(), begun.elapsed());
    if supervisor.record.offline {
        // Before the end is told: whoever learns of it may go on to destroy the volume.
        close_source(host, supervisor.record.uri()).await;
    }
    supervisor.record.reason = reason;
    supervisor.record.phase = phase;
    supervisor.record.speed = None;
    let stored = supervisor.record.store(host);
    let _ = fs::remove_file(EndRequest::socket(host, supervisor.record.key));
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
    pub(super) wanted: Option<(How, String)>,
    /// The layers that are sent one after another, oldest first; none when everything is.
    pub(super) layers: Vec<Inner>,
    pub(super) begun: Option<Begun>,
    /// The node that the last job writes to.
    pub(super) target: &'static str,
    /// What was written while that job started.
    pub(super) missed: Missed,
    /// Whether a mirror that did not send everything is compared with its source.
    pub(super) is_to_verify: bool,
    pub(super) speedometer: Speedometer,
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
        self.prepare(&client, &peer.info).await?;
        let socket = self.socket();
        let relay = Relay::start(peer, &socket, self.record.plan == Some(Plan::Blank))?;
        let ended = self.mirror(&client, relay, &uri.export).await;
        let _ = fs::remove_file(&socket);
        ended
    }

    /// Gives the path at which QEMU's NBD client finds the relay.
    pub(super) fn socket(&self) -> PathBuf {
        EndRequest::relay_socket(&self.host, self.record.key)
    }

    /// Goes on to a phase, and tells.
    pub(super) fn enter(&mut self, phase: Phase) {
        tracing::info!(?phase, "goes on");
        trace::note(&format!("{phase:?}").to_lowercase());
        self.record.phase = phase;
        self.store();
    }

    /// Tells everybody how the mirror has ended.
    fn tell_end(&self, phase: Phase, error: Option<&Error>, duration: Duration) {
        let record = &self.record;
        let (outcome, ms) = (format!("{phase:?}").to_lowercase(), format!("{:.1}", duration.as_secs_f64() * 1000.0));
        trace::tag("qcow2.outcome", &outcome);
        trace::tag("qcow2.sent", record.progress.sent);
        if let Some(plan) = &record.plan {
            trace::tag("qcow2.plan", plan);
        }
        let sent = record.progress.sent;
        let Some(error) = error else {
            tracing::info!(ms, outcome, sent, "ended");
            return;
        };
        tracing::error!(ms, outcome, sent, error = error.chain(), "ended");
        trace::fail(error);
        let (sr, volume) = (Some(record.sr.to_string()), Some(record.volume.to_string()));
        let what = if record.copy { "copy" } else { "mirror" };
        Failure { sr, volume, dbg: record.debug_info.clone(), ..Failure::of(what, error) }.keep(&self.host);
    }

    /// Writes the record. A full file system must not end the mirror: the last state then stands a little longer.
    pub(super) fn store(&mut self) {
        let is_sending = matches!(self.record.phase, Phase::Copying | Phase::Ready | Phase::Draining);
        self.record.speed =
            if is_sending { self.speedometer.look(Instant::now(), &self.record.progress) } else { None };
        if let Err(error) = self.record.store(&self.host) {
            tracing::warn!(error = error.chain(), "the mirror's state could not be recorded");
        }
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
