//! A client for QMP, the QEMU Monitor Protocol (QEMU's `docs/interop/qmp-spec`).
//!
//! One connection, one JSON object a line. Every command carries an id of its own, so that several can be under
//! way; what comes in is looked at only as far as it takes to route it:
//!
//! ```text
//!   execute ──► writer task ──► socket ──► reader task ──┬─ "return", "error" ──► the call with that id
//!                                                        └─ "event" ─────────────► every Events
//! ```
//!
//! An answer with another id is none: a monitor gives what it owes to a client that was killed to the next one.
//!
//! When the connection ends, for whatever reason, every pending call fails with that reason and every [`Events`]
//! ends. A call may be dropped at any time; its answer is then thrown away. To see the events that a command
//! causes, take [`Client::events`] before the command:
//!
//! ```no_run
//! # async fn example() -> plugin::Result<()> {
//! use std::time::Duration;
//! let client = plugin::qemu::qmp::Client::connect("/run/x/qmp.sock".as_ref(), Duration::from_secs(20)).await?;
//! let mut events = client.events();
//! client.execute("job-cancel", serde_json::json!({"id": "job0"})).await?;
//! while events.next().await?.name != "JOB_STATUS_CHANGE" {}
//! # Ok(())
//! # }
//! ```

mod connection;
mod message;

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};

use crate::error::{Error, Result};
use crate::trace;
pub use message::Event;

/// How many events a receiver may be behind before it loses the oldest.
const EVENTS_KEPT: usize = 1024;

/// A connection to a daemon's monitor. A monitor serves one client at a time: the next one waits.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    commands: mpsc::UnboundedSender<Vec<u8>>,
    patience: Duration,
    tasks: [JoinHandle<()>; 2],
}

/// What the client and its connection's tasks share.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
}

/// Where incoming messages go, or why none will come any more.
#[derive(Debug)]
enum State {
    Open { pending: HashMap<u64, oneshot::Sender<message::Answer>>, events: broadcast::Sender<Event> },
    Closed { reason: String },
}

impl Client {
    /// Connects to the monitor at `path` and makes it ready for commands. The same `patience` then holds for
    /// each command.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] with the system's reason when nobody listens there; [`Error::Timeout`] when the monitor does
    /// not answer, because the daemon hangs or another client has it; [`Error::Qemu`] when it is no monitor.
    pub async fn connect(path: &Path, patience: Duration) -> Result<Self> {
        let deadline = Instant::now() + patience;
        let doing = || format!("connecting to QMP at {}", path.display());
        let client = async {
            let (client, begun) = Self::open(path, patience).await?;
            match client.answer(begun, patience).await {
                Ok(_) => Ok(client),
                Err(Error::Qemu { reason, .. }) => Err(Error::Qemu { doing: doing(), reason }),
                Err(error) => Err(error),
            }
        };
        timeout_at(deadline, client)
            .await
            .unwrap_or_else(|_| Err(Error::Timeout { doing: doing(), seconds: patience.as_secs() }))
    }

    /// Connects to a monitor that is known to answer, and does not wait until it does: that is for the first command,
    /// which the monitor reads behind the greeting's, to find out. This saves a turn.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] with the system's reason when nobody listens there; [`Error::Timeout`] when the queue of those who
    /// wait for the monitor stays full.
    pub async fn connect_at_once(path: &Path, patience: Duration) -> Result<Self> {
        let opened = timeout_at(Instant::now() + patience, Self::open(path, patience)).await;
        let (client, _begun) = opened.unwrap_or_else(|_| {
            let doing = format!("connecting to QMP at {}", path.display());
            Err(Error::Timeout { doing, seconds: patience.as_secs() })
        })?;
        Ok(client)
    }

    /// Opens a connection and asks for its use; the answer comes behind the greeting.
    async fn open(path: &Path, patience: Duration) -> Result<(Self, Sent)> {
        let doing = || format!("connecting to QMP at {}", path.display());
        let stream = open(path).await.map_err(|error| Error::io(doing(), error))?;
        let (read, write) = stream.into_split();
        let client = Self::start(connection::Lines::new(read), write, patience);
        let begun = client.send("qmp_capabilities", ())?;
        Ok((client, begun))
    }

    /// Starts the tasks of a connection.
    fn start(lines: connection::Lines, write: tokio::net::unix::OwnedWriteHalf, patience: Duration) -> Self {
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let shared = Arc::new(Shared { state: Mutex::new(State::Open { pending: HashMap::new(), events }) });
        let (commands, queue) = mpsc::unbounded_channel();
        let tasks = [
            tokio::spawn(connection::read(lines, Arc::clone(&shared))),
            tokio::spawn(connection::write(write, queue, Arc::clone(&shared))),
        ];
        Self { shared, commands, patience, tasks }
    }

    /// Executes a command and gives what it returns; `()` stands for no arguments.
    ///
    /// # Errors
    ///
    /// [`Error::Qmp`] when the daemon refuses, with its class and description, or [`Error::NoSpace`] when that is
    /// the reason; [`Error::Timeout`] when it does not answer: it may still execute the command later;
    /// [`Error::Qemu`] when the connection ends.
    pub async fn execute(&self, command: &str, arguments: impl Serialize) -> Result<Value> {
        self.execute_within(self.patience, command, arguments).await
    }

    /// Executes a command as [`Self::execute`] does, with a time-out of its own.
    ///
    /// # Errors
    ///
    /// As [`Self::execute`].
    pub async fn execute_within(
        &self,
        patience: Duration,
        command: &str,
        arguments: impl Serialize,
    ) -> Result<Value> {
        let _timed = trace::timed("QMP", command);
        let sent = self.send(command, arguments)?;
        self.answer(sent, patience).await
    }

    /// Sends commands at once, each with its arguments, and gives what each returns or why it was refused; the daemon
    /// executes them in their order. This saves the time of a turn for every command but one.
    ///
    /// # Errors
    ///
    /// As [`Self::execute`]; after one that is no refusal it is not known which of the commands were executed.
    pub async fn execute_all(&self, commands: &[(&'static str, Value)]) -> Result<Vec<Result<Value>>> {
        let _timed = trace::timed("QMP", commands.first().map_or("", |(command, _)| command));
        let sent: Vec<Sent> =
            commands.iter().map(|(command, arguments)| self.send(command, arguments)).collect::<Result<_>>()?;
        let mut answers = Vec::with_capacity(sent.len());
        for sent in sent {
            match self.answer(sent, self.patience).await {
                Err(error) if !error.is_refusal() => return Err(error),
                answer => answers.push(answer),
            }
        }
        Ok(answers)
    }

    /// Sends a command.
    fn send(&self, command: &str, arguments: impl Serialize) -> Result<Sent> {
        let id = next_id();
        let mut request = json!({"execute": command, "id": id});
        let arguments = serde_json::to_value(arguments)
            .map_err(|error| Error::Internal(format!("the arguments of QMP {command} cannot be encoded: {error}")))?;
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        tracing::debug!(%request, "QMP");
        let (sender, answer) = oneshot::channel();
        let pending = self.shared.register(id, sender, command)?;
        let mut line = request.to_string().into_bytes();
        line.push(b'\n');
        // A writer that is gone has failed the pending call already.
        drop(self.commands.send(line));
        Ok(Sent { command: command.to_owned(), answer, _pending: pending })
    }

    /// Waits for the answer to a command.
    async fn answer(&self, sent: Sent, patience: Duration) -> Result<Value> {
        let Sent { command, answer, _pending } = sent;
        match timeout_at(Instant::now() + patience, answer).await {
            Ok(Ok(answer)) => {
                tracing::debug!(?answer, "QMP");
                answer.map_err(|refusal| refusal.into_error(&command))
            }
            Ok(Err(_)) => Err(self.shared.ended(&command)),
            Err(_) => Err(Error::Timeout { doing: format!("QMP {command}"), seconds: patience.as_secs() }),
        }
    }

    /// Gives the time that each command may take.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Gives the events that come from now on.
    pub fn events(&self) -> Events {
        let receiver = match &*self.shared.lock() {
            State::Open { events, .. } => events.subscribe(),
            State::Closed { .. } => broadcast::channel(1).1,
        };
        Events { receiver, shared: Arc::clone(&self.shared) }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Gives an id that no other command has, of whatever process: what a monitor owes to a client that was killed it gives to
/// the next one.
fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    u64::from(std::process::id()) << 32 | NEXT.fetch_add(1, Ordering::Relaxed) & u64::from(u32::MAX)
}

/// A command that was sent.
struct Sent {
    command: String,
    answer: oneshot::Receiver<message::Answer>,
    _pending: Pending,
}

/// The events of one connection, from the moment it was taken.
#[derive(Debug)]
pub struct Events {
    receiver: broadcast::Receiver<Event>,
    shared: Arc<Shared>,
}

impl Events {
    /// Waits for the next event, of whatever name. May be dropped while it waits: no event is lost.
    ///
    /// Who is more than a thousand events behind loses the oldest, with a warning; what an event says can also be
    /// asked.
    ///
    /// # Errors
    ///
    /// [`Error::Qemu`] when the connection has ended.
    pub async fn next(&mut self) -> Result<Event> {
        loop {
            match self.receiver.recv().await {
                Ok(event) => return Ok(event),
                Err(broadcast::error::RecvError::Lagged(count)) => tracing::warn!(count, "QMP events were lost"),
                Err(broadcast::error::RecvError::Closed) => return Err(self.shared.ended("events")),
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // Nothing panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a call wait for its answer until the guard is dropped.
    fn register(
        self: &Arc<Self>,
        id: u64,
        sender: oneshot::Sender<message::Answer>,
        command: &str,
    ) -> Result<Pending> {
        match &mut *self.lock() {
            State::Open { pending, .. } => {
                pending.insert(id, sender);
                Ok(Pending { shared: Arc::clone(self), id })
            }
            State::Closed { reason } => Err(closed(command, reason)),
        }
    }

    /// Passes an answer to the call that waits for it; one that nobody waits for any more is dropped.
    fn answer(&self, id: u64, answer: message::Answer) {
        if let State::Open { pending, .. } = &mut *self.lock()
            && let Some(sender) = pending.remove(&id)
        {
            drop(sender.send(answer));
        }
    }

    /// Passes an event to whoever listens.
    fn event(&self, event: Event) {
        tracing::debug!(?event, "QMP");
        if let State::Open { events, .. } = &*self.lock() {
            drop(events.send(event));
        }
    }

    /// Ends the connection: fails every pending call and ends every [`Events`]. Only the first reason counts.
    fn close(&self, reason: String) {
        let mut state = self.lock();
        if matches!(&*state, State::Open { .. }) {
            *state = State::Closed { reason };
        }
    }

    /// Says why the connection has ended.
    fn ended(&self, command: &str) -> Error {
        match &*self.lock() {
            State::Closed { reason } => closed(command, reason),
            State::Open { .. } => closed(command, "the connection was given up"),
        }
    }
}

/// A registered call; forgets it when dropped.
struct Pending {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let State::Open { pending, .. } = &mut *self.shared.lock() {
            pending.remove(&self.id);
        }
    }
}

/// The error of a call on a connection that has ended.
fn closed(command: &str, reason: &str) -> Error {
    Error::Qemu { doing: format!("QMP {command}"), reason: reason.to_owned() }
}

/// Opens the socket; where its queue is full, waits for room, as a blocking connect would.
async fn open(path: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(Duration::from_millis(10)).await,
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests;
