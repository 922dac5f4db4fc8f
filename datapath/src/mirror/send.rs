//! What is sent, job after job over one connection: the layers that the destination lacks, and then what a guest writes.

use std::io;
use std::time::{Duration, Instant};

use plugin::error::{Error, Result};
use plugin::mirror::job::{self, JOB, JobInfo, LAYER_NODES, SIZED_NODE, TARGET_NODE};
use plugin::mirror::{How, Phase, Progress, WHOLE};
use plugin::qemu::devices::{self, Device};
use plugin::qemu::graph::{self, Pace};
use plugin::qemu::qmp::{Client, Events};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::missed::Missed;
use super::prepare::Inner;
use super::progress::{Verdict, Watch};
use super::relay::Relay;
use super::supervisor::{Outcome, Supervisor, want_end};

/// How often the job is looked at when nothing calls for it.
const TICK: Duration = Duration::from_millis(200);

/// How long the storage daemon may leave a question unanswered. Something in it then waits for the peer, and the guest may
/// be waiting too.
const DAEMON_SILENCE: Duration = Duration::from_secs(4);

/// How long the peer may take to close its side after QEMU has said goodbye.
const GOODBYE: Duration = Duration::from_secs(5);

/// Looks of 10 ms that a job gets to end after its connection was cut; it takes milliseconds.
pub(super) const CLEAR_LOOKS: u32 = 1000;

/// A job of a mirror.
struct Job {
    /// The node that it reads.
    source: String,
    /// The node that it writes to.
    target: &'static str,
    /// Whether everything that the source reads as is sent, or what it has of its own.
    sync: &'static str,
    /// Whether it is the mirror's last, which goes on while a guest writes.
    is_last: bool,
}

impl Supervisor {
    /// Sends what is planned over a relay that was started. On failure the relay is cut first, which frees the daemon
    /// from whatever it waits for, and then the job and the nodes are removed.
    pub(super) async fn mirror(&mut self, client: &Client, mut relay: Relay, export: &str) -> Result<Outcome> {
        let sent = self.send_all(client, &mut relay, export).await;
        let outcome = match (sent, &self.wanted) {
            (Err(error), Some((how, reason))) if *how == How::Cancel || !self.record.was_complete => {
                tracing::info!(error = error.chain(), "the mirror broke while it was being ended");
                Ok(Outcome::Cancelled(reason.clone()))
            }
            (outcome, _) => outcome,
        };
        match outcome {
            Ok(Outcome::Finished) => {
                if self.verifies() || self.record.pace.is_some() || self.missed != Missed::Nothing {
                    job::clear(client, CLEAR_LOOKS).await?;
                } else {
                    job::finish(client, CLEAR_LOOKS).await?;
                }
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

    /// Sends everything there is to send, and compares both ends where that is asked for.
    async fn send_all(&mut self, client: &Client, relay: &mut Relay, export: &str) -> Result<Outcome> {
        self.start(client, relay, export).await?;
        match self.send(client, relay).await? {
            Outcome::Finished => {}
            other => return Ok(other),
        }
        match self.send_missed(client, relay).await? {
            Outcome::Finished if self.verifies() => self.verify(client, relay).await,
            other => Ok(other),
        }
    }

    /// Adds the target.
    async fn start(&mut self, client: &Client, relay: &mut Relay, export: &str) -> Result<()> {
        job::clear(client, CLEAR_LOOKS).await?;
        // detect-zeroes: an allocated zero travels as a request to write zeroes. No reconnect-delay, ever: a server
        // that was killed and started again lacks what it had not flushed, and the job would not notice.
        let node = json!({
            "driver": "nbd", "node-name": TARGET_NODE, "export": export, "discard": "unmap", "detect-zeroes": "unmap",
            "server": {"type": "unix", "path": self.socket()},
        });
        self.bounded(relay, client.execute("blockdev-add", node)).await?;
        Ok(())
    }

    /// Sends the layers, oldest first: each job writes over what the one before has written, on the same connection.
    async fn send(&mut self, client: &Client, relay: &mut Relay) -> Result<Outcome> {
        let sizes: Vec<u64> = self.layers.iter().map(Inner::allocated).collect();
        let mut shares = shares(&sizes).into_iter();
        let layers = std::mem::take(&mut self.layers);
        let inner = layers.len().saturating_sub(1);
        for layer in layers.iter().take(inner) {
            self.begin_share(shares.next());
            graph::add_root(client, &layer.image, layer.parent, LAYER_NODES).await?;
            let [source, _] = LAYER_NODES;
            let job = Job { source: source.to_owned(), target: TARGET_NODE, sync: "top", is_last: false };
            match self.run_job(client, relay, job).await? {
                Outcome::Finished => job::clear_layer(client, CLEAR_LOOKS).await?,
                other => return Ok(other),
            }
        }
        self.begin_share(shares.next());
        let source = graph::node_name(self.record.node);
        let sync = if layers.is_empty() { "full" } else { "top" };
        self.run_job(client, relay, Job { source, target: TARGET_NODE, sync, is_last: true }).await
    }

    /// Notes which part of the whole the next job is.
    fn begin_share(&mut self, share: Option<(u32, u32)>) {
        let (earlier, later) = share.unwrap_or_default();
        let before = self.record.progress;
        self.record.progress = Progress { offset: 0, length: 0, earlier, later, ..before };
    }

    /// Runs one job to its end.
    async fn run_job(&mut self, client: &Client, relay: &mut Relay, mut job: Job) -> Result<Outcome> {
        let devices = devices::devices(client).await?;
        match (size_of(&devices, &job.source)?, size_of(&devices, TARGET_NODE)?) {
            (source, target) if target < source => {
                return Err(Error::InvalidSize(format!("the destination has {target} bytes, the source {source}")));
            }
            (source, target) if target == source => {}
            (source, _) => {
                // A job wants both to have one size.
                let node = json!({
                    "driver": "raw", "node-name": SIZED_NODE, "file": TARGET_NODE, "size": source,
                    "discard": "unmap",
                });
                client.execute("blockdev-add", node).await?;
                job.target = SIZED_NODE;
            }
        }
        self.target = job.target;
        if self.record.live && job.is_last {
            self.note_writes(client).await?;
        }
        self.bounded(relay, start_job(client, &job)).await?;
        self.enter(Phase::Copying);
        self.watch(client, relay, &job).await
    }

    /// Waits for a command that needs the peer, and gives it up when the peer takes too long or a call wants the mirror
    /// ended. The guest does not notice such a command, but the daemon's monitors answer nobody else meanwhile.
    pub(super) async fn bounded(
        &mut self,
        relay: &mut Relay,
        command: impl Future<Output = Result<Value>>,
    ) -> Result<Value> {
        let limit = Duration::from_secs(self.settings.peer_silence_seconds);
        tokio::select! {
            result = command => return result,
            ended = relay.ended() => {
                let reason = ended.err().unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into());
                return Err(Error::io("negotiating with the destination", reason));
            }
            wanted = want_end(&mut self.ends, &mut self.waiting) => {
                let given_up = broken(wanted.1.clone());
                self.wanted = Some(wanted);
                return Err(given_up);
            }
            () = sleep(limit) => {}
        }
        Err(Error::Timeout { doing: "the destination's answer to QEMU".to_owned(), seconds: limit.as_secs() })
    }

    /// Follows a job to its end. One that is not the mirror's last ends when everything was sent and flushed.
    async fn watch(&mut self, client: &Client, relay: &mut Relay, running: &Job) -> Result<Outcome> {
        let mut events = client.events();
        let silence = Duration::from_secs(self.settings.peer_silence_seconds);
        let mut watch = Watch::new(Instant::now(), silence);
        let is_live = self.record.live && running.is_last;
        let mut drain_until = None;
        loop {
            let job = timeout(DAEMON_SILENCE, job::query(client))
                .await
                .map_err(|_| silent("the storage daemon", DAEMON_SILENCE))??;
            let Some(job) = job else { return Err(broken("the mirror's job disappeared".to_owned())) };
            self.note(&job, relay);
            self.stop_noting(client, &job).await?;
            match job.status.as_str() {
                "concluded" => match job.error {
                    None if drain_until.is_some() => return Ok(Outcome::Finished),
                    None => return Err(broken("the mirror's job ended by itself".to_owned())),
                    Some(reason) => return Err(broken(reason)),
                },
                "ready" if drain_until.is_none() => {
                    if is_live && !self.record.was_complete {
                        self.record.was_complete = true;
                        self.enter(Phase::Ready);
                    }
                    if !is_live || matches!(self.wanted, Some((How::Finish, _))) {
                        if running.is_last {
                            self.enter(Phase::Draining);
                        }
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
            if drain_until.is_some_and(|until| Instant::now() >= until && is_live) {
                return Err(broken(format!(
                    "the last writes were not sent in {} seconds",
                    self.settings.drain_seconds
                )));
            }
            let answered = relay.counters().answered();
            match watch.look(
                Instant::now(),
                &self.record.progress,
                answered,
                job.status == "ready",
                drain_until.is_some(),
            ) {
                Verdict::Fine => {}
                Verdict::Silent => return Err(self.silent_peer()),
                Verdict::Outrun(_) if !is_live || drain_until.is_some() => {}
                Verdict::Outrun(pace) => self.slow_the_guest(client, pace).await?,
            }
            self.wait(&mut events, relay, drain_until.is_some()).await?;
        }
    }

    /// Limits what the guest writes, until the mirror ends.
    async fn slow_the_guest(&mut self, client: &Client, pace: Pace) -> Result<()> {
        tracing::info!(?pace, "the guest outruns the link");
        self.record.pace = Some(pace);
        graph::pace(client, Some(pace)).await
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
        let before = self.record.progress;
        self.record.progress = Progress { offset: job.current, length: job.total, sent, received, ..before };
        self.store();
    }

    /// Makes the error of a destination that does not answer.
    pub(super) fn silent_peer(&self) -> Error {
        silent("the destination", Duration::from_secs(self.settings.peer_silence_seconds))
    }
}

/// Starts a job. auto-dismiss is off, so that how it ended can be asked after its end; on an error of either side it
/// ends.
async fn start_job(client: &Client, job: &Job) -> Result<Value> {
    let arguments = json!({
        "job-id": JOB, "device": job.source, "target": job.target, "sync": job.sync,
        // Never write-blocking: see docs/qemu.md.
        "copy-mode": "background", "auto-dismiss": false,
        "on-source-error": "report", "on-target-error": "report",
    });
    client.execute("blockdev-mirror", arguments).await
}

/// Makes the error of something that does not answer.
fn silent(what: &str, bound: Duration) -> Error {
    Error::Timeout { doing: format!("an answer that {what} owes"), seconds: bound.as_secs() }
}

/// Gives for each of several jobs, by how much there is to send, how much of the whole the earlier and the later ones
/// are.
fn shares(sizes: &[u64]) -> Vec<(u32, u32)> {
    let whole: u128 = sizes.iter().map(|size| u128::from(*size)).sum::<u128>().max(1);
    // Never more than the whole.
    let share = |bytes: u128| u32::try_from(bytes * u128::from(WHOLE) / whole).unwrap_or(WHOLE);
    let mut earlier = 0;
    let mut shares = Vec::with_capacity(sizes.len());
    for size in sizes {
        let until = earlier + u128::from(*size);
        shares.push((share(earlier), WHOLE - share(until)));
        earlier = until;
    }
    shares
}

/// Finds a node's size, in bytes.
fn size_of(devices: &[Device], name: &str) -> Result<u64> {
    let device = devices.iter().find(|device| device.name.as_deref() == Some(name));
    device.map(Device::size).ok_or_else(|| Error::Qemu {
        doing: format!("asking for the size of node {name}"),
        reason: "the storage daemon has no such node".to_owned(),
    })
}

/// Makes the error of a mirror that broke.
pub(super) fn broken(reason: String) -> Error {
    Error::Qemu { doing: "mirroring".to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_of_jobs_join_and_make_up_the_whole() {
        for sizes in [&[1][..], &[0], &[0, 0], &[1, 2, 3], &[u64::MAX, 0, u64::MAX], &[7; 9]] {
            let shares = shares(sizes);
            assert_eq!(shares.len(), sizes.len());
            assert_eq!(shares[0].0, 0);
            for pair in shares.windows(2) {
                assert_eq!(WHOLE - pair[0].1, pair[1].0, "{sizes:?}");
            }
            assert!(sizes.iter().all(|size| *size == 0) || shares[sizes.len() - 1].1 == 0, "{shares:?}");
        }
    }
}
