//! One copy from its connections to its end: parts of the source's export, read and written by the supervisor itself.
//!
//! ```text
//!   storage daemon ──nbd.sock──► supervisor ── one connection ──► xapi's proxy ──► destination
//! ```
//!
//! No block job is needed, as nothing else writes to the destination: Data.copy starts none beside a mirror, and
//! Data.mirror none beside a copy.

use std::path::Path;
use std::time::{Duration, Instant};

use plugin::error::{Error, Result};
use plugin::mirror::{Blocks, Phase, Range};
use plugin::nbd::{Connection, NbdUri};
use plugin::qemu::daemon::Sockets;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::relay::{Stream, connect};
use super::supervisor::{Outcome, Supervisor, want_end};

/// How much is copied at once, in bytes.
const CHUNK: u64 = 1 << 20;

/// How often the record is written.
const TELL: Duration = Duration::from_millis(200);

/// How long the peer may take to close its side after the goodbye.
const GOODBYE: Duration = Duration::from_secs(5);

/// What is copied from and to.
struct Ends {
    source: Connection<UnixStream>,
    target: Connection<Box<dyn Stream>>,
}

impl Supervisor {
    /// Copies the parts that are written down, and flushes them.
    pub(super) async fn copy(&mut self, uri: &NbdUri) -> Result<Outcome> {
        let blocks = Blocks::load(&self.host, self.record.key)?;
        let blocks = blocks.ok_or_else(|| Error::Internal("a copy without a block list".to_owned()))?;
        let limit = Duration::from_secs(self.settings.handshake_seconds);
        let socket = Sockets::of(&self.host.volume_dir(self.record.volume)).nbd();
        let export = self.record.volume.to_string();
        let opened = tokio::select! {
            opened = timeout(limit, open(uri, &socket, &export)) => opened.map_err(|_| Error::Timeout {
                doing: format!("connecting to {}", self.record.remote),
                seconds: limit.as_secs(),
            })?,
            (_, reason) = want_end(&mut self.ends, &mut self.waiting) => return Ok(Outcome::Cancelled(reason)),
        };
        let mut ends = opened?;
        check(&ends, &blocks)?;
        self.record.progress.length = blocks.bytes();
        self.enter(Phase::Copying);
        let mut told = Instant::now();
        let mut buffer = vec![0; CHUNK as usize];
        for chunk in blocks.ranges().iter().flat_map(|range| chunks(*range)) {
            // No longer than a chunk, which fits.
            let bytes = &mut buffer[..chunk.length as usize];
            if let Some(outcome) = self.bounded_copy(ends.copy(chunk, bytes)).await? {
                return Ok(outcome);
            }
            self.record.progress.offset += chunk.length;
            self.record.progress.sent += chunk.length;
            if told.elapsed() >= TELL {
                told = Instant::now();
                self.store();
            }
        }
        self.enter(Phase::Draining);
        if let Some(outcome) = self.bounded_copy(ends.target.flush()).await? {
            return Ok(outcome);
        }
        match timeout(GOODBYE, async { ends.source.close().await.and(ends.target.close().await) }).await {
            Ok(Ok(())) => {}
            // Everything was flushed and acknowledged; how a peer closes does not change that.
            Ok(Err(error)) => tracing::warn!(error = error.chain(), "a peer broke off after the goodbye"),
            Err(_) => tracing::warn!("a peer did not close after the goodbye"),
        }
        Ok(Outcome::Finished)
    }

    /// Waits for one step of the copy: to its end, which gives nothing, or until a call wants the copy ended.
    async fn bounded_copy(&mut self, step: impl Future<Output = Result<()>>) -> Result<Option<Outcome>> {
        let seconds = self.settings.peer_silence_seconds;
        tokio::select! {
            result = timeout(Duration::from_secs(seconds), step) => match result {
                Ok(result) => result.map(|()| None),
                Err(_) => Err(Error::Timeout { doing: "an answer that the destination owes".to_owned(), seconds }),
            },
            (_, reason) = want_end(&mut self.ends, &mut self.waiting) => Ok(Some(Outcome::Cancelled(reason))),
        }
    }
}

/// Connects to both ends; the destination's is the one connection that xapi's proxy takes.
async fn open(uri: &NbdUri, socket: &Path, export: &str) -> Result<Ends> {
    let target = Connection::open(connect(&uri.address).await?, &uri.export).await?;
    let source = UnixStream::connect(socket).await.map_err(Error::on("connecting to", socket))?;
    Ok(Ends { source: Connection::open(source, export).await?, target })
}

impl Ends {
    /// Copies one part, no longer than `bytes`.
    async fn copy(&mut self, part: Range, bytes: &mut [u8]) -> Result<()> {
        self.source.read(part.offset, bytes).await?;
        self.target.write(part.offset, bytes).await
    }
}

/// Sees that the destination can take the parts.
fn check(ends: &Ends, blocks: &Blocks) -> Result<()> {
    let needed = blocks.ranges().last().map_or(0, |range| range.offset + range.length);
    for (what, size) in [("source", ends.source.size()), ("destination", ends.target.size())] {
        if size < needed {
            return Err(Error::InvalidSize(format!("the {what} has {size} bytes, the copy needs {needed}")));
        }
    }
    if ends.target.is_read_only() {
        let reason = "the destination is read-only".to_owned();
        return Err(Error::Qemu { doing: "copying".to_owned(), reason });
    }
    Ok(())
}

/// Divides a part into chunks that begin where a chunk of the whole does.
fn chunks(range: Range) -> impl Iterator<Item = Range> {
    let end = range.offset + range.length;
    let mut offset = range.offset;
    std::iter::from_fn(move || {
        let length = (CHUNK - offset % CHUNK).min(end - offset);
        let chunk = Range { offset, length };
        offset += length;
        (length > 0).then_some(chunk)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_aligned_and_leave_nothing_out() {
        let range = Range { offset: CHUNK / 2, length: 2 * CHUNK };
        let found: Vec<_> = chunks(range).collect();
        assert_eq!(found.len(), 3);
        assert_eq!(found[0], Range { offset: CHUNK / 2, length: CHUNK / 2 });
        assert_eq!(found[1], Range { offset: CHUNK, length: CHUNK });
        assert_eq!(found.iter().map(|chunk| chunk.length).sum::<u64>(), range.length);
        assert_eq!(chunks(Range { offset: 5, length: 0 }).count(), 0);
    }
}
