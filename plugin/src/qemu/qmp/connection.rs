//! The two tasks of a connection, and its lines.

use std::sync::Arc;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

use super::Shared;
use super::message::Message;

/// The longest line taken, in bytes. The longest that a daemon has reason to send, its whole schema, is a twentieth.
const LINE_LIMIT: usize = 8 << 20;

/// Reads lines of bounded length.
pub(super) struct Lines {
    reader: BufReader<OwnedReadHalf>,
    line: Vec<u8>,
}

impl Lines {
    pub fn new(read: OwnedReadHalf) -> Self {
        Self { reader: BufReader::new(read), line: Vec::new() }
    }

    /// Reads the next line, or says why there is none.
    async fn next(&mut self) -> Result<&[u8], String> {
        self.line.clear();
        let mut limited = (&mut self.reader).take(LINE_LIMIT as u64);
        limited
            .read_until(b'\n', &mut self.line)
            .await
            .map_err(|error| format!("reading from the monitor failed: {error}"))?;
        match self.line.last() {
            Some(b'\n') => Ok(&self.line),
            _ if self.line.len() == LINE_LIMIT => Err(format!("the monitor sent a line of over {LINE_LIMIT} bytes")),
            _ => Err("the monitor closed the connection".to_owned()),
        }
    }
}

/// Reads the greeting, which comes before anything else but what the monitor owes to a client that was killed.
async fn greeting(lines: &mut Lines) -> Result<(), String> {
    loop {
        let greeting: Value =
            serde_json::from_slice(lines.next().await?).map_err(|error| format!("no QMP greeting: {error}"))?;
        if greeting.get("QMP").is_some() {
            return Ok(());
        }
        if !["return", "error", "event"].iter().any(|field| greeting.get(field).is_some()) {
            return Err("no QMP greeting: it has no QMP field".to_owned());
        }
    }
}

/// Routes what comes in behind the greeting until the connection ends.
pub(super) async fn read(mut lines: Lines, shared: Arc<Shared>) {
    if let Err(reason) = greeting(&mut lines).await {
        return shared.close(reason);
    }
    let reason = loop {
        match lines.next().await.and_then(Message::parse) {
            Ok(Message::Answer(id, answer)) => shared.answer(id, answer),
            Ok(Message::Event(event)) => shared.event(event),
            Err(reason) => break reason,
        }
    };
    shared.close(reason);
}

/// Writes commands until the client is dropped or the connection ends.
pub(super) async fn write(
    mut write: OwnedWriteHalf,
    mut queue: mpsc::UnboundedReceiver<Vec<u8>>,
    shared: Arc<Shared>,
) {
    while let Some(mut lines) = queue.recv().await {
        while let Ok(line) = queue.try_recv() {
            lines.extend(line);
        }
        if let Err(error) = write.write_all(&lines).await {
            shared.close(format!("writing to the monitor failed: {error}"));
            return;
        }
    }
}
