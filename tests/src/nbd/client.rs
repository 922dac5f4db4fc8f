//! A connection to an export, with any number of commands in flight.

use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncWriteExt, BufWriter};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{mpsc, oneshot, watch};

use super::handshake::negotiate;
use super::reply::{Shared, Waiting, receive};
use super::wire::{self, Command};
use super::{Error, Export, Options, Uri};

/// How many commands wait for the socket before a caller does.
const QUEUE: usize = 64;

/// A connection to an export; clones share it.
///
/// Dropping the last clone closes the connection without a goodbye, as a client that dies does; see [`Client::disconnect`].
#[derive(Debug, Clone)]
pub struct Client {
    requests: mpsc::Sender<Request>,
    export: Arc<Export>,
    finished: watch::Receiver<bool>,
}

#[derive(Debug)]
struct Request {
    command: Command,
    offset: u64,
    length: u32,
    payload: Bytes,
    answer: oneshot::Sender<Result<Bytes, Error>>,
}

impl Client {
    /// Connects, with structured replies where the server knows them.
    ///
    /// # Errors
    /// `Error::Connect` if nobody answers, `Error::Refused` if there is no such export.
    pub async fn connect(uri: &Uri) -> Result<Self, Error> {
        Self::connect_with(uri, Options::default()).await
    }

    /// Connects, saying what to negotiate.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub async fn connect_with(uri: &Uri, options: Options) -> Result<Self, Error> {
        let mut stream = UnixStream::connect(uri.socket()).await.map_err(|error| Error::Connect {
            socket: uri.socket().display().to_string(),
            reason: error.to_string(),
        })?;
        let export = negotiate(&mut stream, uri.export(), options).await?;
        let (requests, queue) = mpsc::channel(QUEUE);
        let (finish, finished) = watch::channel(false);
        let (read, write) = stream.into_split();
        let shared = Shared::default();
        tokio::spawn(send(write, queue, shared.clone()));
        let structured = export.structured;
        tokio::spawn(async move {
            let error = receive(read, &shared, structured).await;
            shared.fail_all(error);
            finish.send_replace(true);
        });
        Ok(Self { requests, export: Arc::new(export), finished })
    }

    /// What the server said of the export.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Reads bytes.
    ///
    /// # Errors
    /// Any of [`Error`]'s later kinds; the read had no effect in any case.
    pub async fn read(&self, offset: u64, length: u32) -> Result<Bytes, Error> {
        self.call(Command::Read, offset, length, Bytes::new()).await
    }

    /// Writes bytes; they are acknowledged, not durable, when it returns.
    ///
    /// # Errors
    /// After an error with [`Error::is_uncertain`] the bytes may or may not be there.
    pub async fn write(&self, offset: u64, data: Bytes) -> Result<(), Error> {
        let length =
            u32::try_from(data.len()).map_err(|_| Error::Request("more than 4 GiB in one write".to_owned()))?;
        self.call(Command::Write, offset, length, data).await.map(drop)
    }

    /// Makes bytes read as zeroes.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub async fn write_zeroes(&self, offset: u64, length: u32) -> Result<(), Error> {
        self.call(Command::WriteZeroes, offset, length, Bytes::new()).await.map(drop)
    }

    /// Says that bytes are not needed any more; each may read as before or as zero afterwards.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub async fn trim(&self, offset: u64, length: u32) -> Result<(), Error> {
        self.call(Command::Trim, offset, length, Bytes::new()).await.map(drop)
    }

    /// Makes everything that was acknowledged before this call durable.
    ///
    /// # Errors
    /// Nothing is promised of what was written since the flush before.
    pub async fn flush(&self) -> Result<(), Error> {
        self.call(Command::Flush, 0, 0, Bytes::new()).await.map(drop)
    }

    /// Says goodbye and waits until the server has closed the connection.
    ///
    /// No command may be in flight, on this or another clone: the protocol lets the server forget it.
    pub async fn disconnect(mut self) {
        let (answer, _) = oneshot::channel();
        let goodbye = Request { command: Command::Disconnect, offset: 0, length: 0, payload: Bytes::new(), answer };
        if self.requests.send(goodbye).await.is_ok() {
            // An error means that the reader is gone already, which is what is waited for.
            let _ = self.finished.wait_for(|finished| *finished).await;
        }
    }

    async fn call(&self, command: Command, offset: u64, length: u32, payload: Bytes) -> Result<Bytes, Error> {
        self.check(command, offset, length)?;
        let (answer, answered) = oneshot::channel();
        let closed = || Error::Lost("the connection was closed".to_owned());
        self.requests.send(Request { command, offset, length, payload, answer }).await.map_err(|_| closed())?;
        answered.await.map_err(|_| closed())?
    }

    fn check(&self, command: Command, offset: u64, length: u32) -> Result<(), Error> {
        let name = command.name();
        if !self.export.knows(command) {
            return Err(Error::Request(format!("the server does not offer {name}")));
        }
        if command == Command::Flush {
            return Ok(());
        }
        if command != Command::Read && self.export.read_only() {
            return Err(Error::Request(format!("{name} to a read-only export")));
        }
        if length == 0 {
            return Err(Error::Request(format!("{name} of no bytes")));
        }
        if offset.checked_add(u64::from(length)).is_none_or(|end| end > self.export.size) {
            let size = self.export.size;
            return Err(Error::Request(format!("{name} of {length} bytes at {offset} of an export of {size} bytes")));
        }
        let has_payload = matches!(command, Command::Read | Command::Write);
        if has_payload && length > self.export.maximum_block {
            return Err(Error::Request(format!(
                "{name} of {length} bytes, the server takes {}",
                self.export.maximum_block
            )));
        }
        Ok(())
    }
}

/// Puts commands on the socket until there is a goodbye, an error, or nobody who could send one.
async fn send(write: OwnedWriteHalf, mut queue: mpsc::Receiver<Request>, pending: Shared) {
    let mut socket = BufWriter::with_capacity(256 << 10, write);
    let mut cookie = 0u64;
    while let Some(request) = queue.recv().await {
        cookie += 1;
        let Request { command, offset, length, payload, answer } = request;
        let header = wire::request_header(command, cookie, offset, length);
        let goodbye = command == Command::Disconnect;
        if !goodbye && !pending.add(cookie, Waiting::new(command, offset, length, answer)) {
            return;
        }
        let mut sent = socket.write_all(&header).await;
        if sent.is_ok() && !payload.is_empty() {
            sent = socket.write_all(&payload).await;
        }
        // Only when nothing else waits: commands that come together leave together.
        if sent.is_ok() && (queue.is_empty() || goodbye) {
            sent = socket.flush().await;
        }
        if let Err(error) = sent {
            pending.fail_all(Error::Lost(error.to_string()));
            return;
        }
        if goodbye {
            return;
        }
    }
}
