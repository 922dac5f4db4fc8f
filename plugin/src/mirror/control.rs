//! How a call ends a running mirror: one line of JSON each way over the supervisor's control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::record::{MirrorRecord, Phase};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::id::MirrorKey;

/// The longest line that is read.
const LINE_BYTES: u64 = 16 << 10;

/// How often a socket that is not there yet is looked for.
const RETRY: Duration = Duration::from_millis(5);

/// How a mirror is to be ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// Send and flush what is left, if it is complete; else cancel it.
    Finish,
    /// Cut the connection at once.
    Cancel,
}

/// A request to end a mirror.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EndRequest {
    /// How.
    pub end: How,
    /// Why, for the record.
    pub reason: String,
}

/// The answer, once the mirror has ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EndReply {
    /// The mirror's last phase.
    pub phase: Phase,
}

impl EndRequest {
    /// Gives the path of a mirror's control socket.
    pub fn socket(host: &Host, key: MirrorKey) -> PathBuf {
        host.mirror_dir(key).join("control.sock")
    }

    /// Gives the path at which QEMU's NBD client finds a mirror's relay.
    pub fn relay_socket(host: &Host, key: MirrorKey) -> PathBuf {
        host.mirror_dir(key).join("relay.sock")
    }

    /// Asks a mirror's supervisor and waits for the end of the mirror, up to `patience`.
    ///
    /// `None` means that the supervisor ended without an answer: its record says what is known.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] when it neither answers nor ends.
    pub(super) fn send(&self, host: &Host, record: &MirrorRecord, patience: Duration) -> Result<Option<EndReply>> {
        let deadline = Instant::now() + patience;
        let doing = format!("ending mirror {}", record.key);
        let timeout = || Error::Timeout { doing: doing.clone(), seconds: patience.as_secs() };
        let Some(mut stream) = self.connect(host, record, deadline)? else { return Ok(None) };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(timeout());
        }
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => timeout(),
            _ => Error::io(doing.clone(), error),
        };
        stream.set_write_timeout(Some(left)).map_err(failed)?;
        stream.set_read_timeout(Some(left)).map_err(failed)?;
        let mut line = serde_json::to_vec(self)
            .map_err(|error| Error::Internal(format!("a request to a supervisor cannot be encoded: {error}")))?;
        line.push(b'\n');
        match stream.write_all(&line) {
            Err(error) if is_end(&error) => return Ok(None),
            result => result.map_err(failed)?,
        }
        let mut reply = String::new();
        match BufReader::new(stream.take(LINE_BYTES)).read_line(&mut reply) {
            Err(error) if is_end(&error) => return Ok(None),
            result => result.map_err(failed)?,
        };
        // An answer cut off means that the supervisor ended in the middle of it.
        Ok(serde_json::from_str(&reply).ok())
    }

    /// Connects to the supervisor, which may not listen yet; `None` when it has ended.
    fn connect(&self, host: &Host, record: &MirrorRecord, deadline: Instant) -> Result<Option<UnixStream>> {
        let socket = Self::socket(host, record.key);
        loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => return Ok(Some(stream)),
                Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                    return Err(Error::on("connecting to", &socket)(error));
                }
                Err(_) => {}
            }
            let current = MirrorRecord::load(host, record.key)?;
            if !current.is_some_and(|current| current.is_running(host)) {
                return Ok(None);
            }
            if Instant::now() >= deadline {
                return Err(Error::Timeout { doing: format!("connecting to {}", socket.display()), seconds: 0 });
            }
            std::thread::sleep(RETRY);
        }
    }
}

/// Tells whether an error means that the peer is gone.
fn is_end(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof)
}
