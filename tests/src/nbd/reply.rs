//! Replies, simple and structured, given to the commands that wait for them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, BufReader};
use tokio::sync::oneshot;

use super::Error;
use super::wire::{self, Command};

/// The longest error chunk that is read, in bytes.
const LONGEST_ERROR: u32 = 8 << 10;

/// A command that the server has not answered yet.
pub(super) struct Waiting {
    command: Command,
    offset: u64,
    length: u32,
    /// What a read has brought so far, and how many of its bytes the server has told.
    data: BytesMut,
    told: u64,
    errno: Option<u32>,
    answer: oneshot::Sender<Result<Bytes, Error>>,
}

impl Waiting {
    pub(super) fn new(
        command: Command,
        offset: u64,
        length: u32,
        answer: oneshot::Sender<Result<Bytes, Error>>,
    ) -> Self {
        let bytes = if command == Command::Read { length as usize } else { 0 };
        Self { command, offset, length, data: BytesMut::zeroed(bytes), told: 0, errno: None, answer }
    }

    fn finish(self) -> Result<(), Error> {
        let result = match self.errno {
            Some(errno) => Err(Error::Command {
                command: self.command.name(),
                offset: self.offset,
                length: u64::from(self.length),
                errno,
            }),
            None if self.told != self.data.len() as u64 => {
                let text = format!("{} of {} bytes of a read told", self.told, self.data.len());
                return Err(Error::Protocol(text));
            }
            None => Ok(self.data.freeze()),
        };
        // A caller that does not wait any more is no error.
        let _ = self.answer.send(result);
        Ok(())
    }

    /// Where a chunk of a read belongs in its data.
    fn place(&mut self, offset: u64, length: u64) -> Result<&mut [u8], Error> {
        let wrong = || Error::Protocol(format!("a chunk of {length} bytes at {offset} that was not asked for"));
        if self.command != Command::Read {
            return Err(wrong());
        }
        let start = offset.checked_sub(self.offset).ok_or_else(wrong)?;
        let end = start.checked_add(length).filter(|end| *end <= u64::from(self.length)).ok_or_else(wrong)?;
        self.told += length;
        // In range of a u32, so of a usize.
        Ok(&mut self.data[start as usize..end as usize])
    }
}

#[derive(Default)]
struct Pending {
    waiting: HashMap<u64, Waiting>,
    /// Set once, by whoever sees first that the connection is over.
    lost: Option<Error>,
}

/// The commands in flight, shared by the one that sends and the one that receives.
#[derive(Clone, Default)]
pub(super) struct Shared(Arc<Mutex<Pending>>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a command as waiting; false, and the command failed, if the connection is over.
    pub(super) fn add(&self, cookie: u64, waiting: Waiting) -> bool {
        let mut pending = self.lock();
        match &pending.lost {
            Some(error) => {
                let _ = waiting.answer.send(Err(error.clone()));
                false
            }
            None => {
                pending.waiting.insert(cookie, waiting);
                true
            }
        }
    }

    /// Fails every command in flight and every later one.
    pub(super) fn fail_all(&self, error: Error) {
        let mut pending = self.lock();
        let error = pending.lost.get_or_insert(error).clone();
        for (_, waiting) in pending.waiting.drain() {
            let _ = waiting.answer.send(Err(error.clone()));
        }
    }

    fn take(&self, cookie: u64) -> Result<Waiting, Error> {
        let waiting = self.lock().waiting.remove(&cookie);
        waiting.ok_or_else(|| Error::Protocol(format!("a reply to command {cookie}, which is not in flight")))
    }

    fn put_back(&self, cookie: u64, waiting: Waiting) -> Result<(), Error> {
        if self.add(cookie, waiting) { Ok(()) } else { Err(Error::Lost("the connection was closed".to_owned())) }
    }
}

/// Reads replies until the connection ends; says why it ended.
pub(super) async fn receive<R: AsyncRead + Unpin>(read: R, pending: &Shared, structured: bool) -> Error {
    let mut socket = BufReader::with_capacity(64 << 10, read);
    loop {
        match one(&mut socket, pending, structured).await {
            Ok(()) => {}
            Err(Failure::Socket(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Error::Lost("the server closed it".to_owned());
            }
            Err(Failure::Socket(error)) => return Error::Lost(error.to_string()),
            Err(Failure::Server(error)) => return error,
        }
    }
}

enum Failure {
    Socket(std::io::Error),
    Server(Error),
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::Socket(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Server(error)
    }
}

async fn one<R: AsyncRead + Unpin>(socket: &mut R, pending: &Shared, structured: bool) -> Result<(), Failure> {
    match socket.read_u32().await? {
        wire::SIMPLE_REPLY_MAGIC => simple(socket, pending, structured).await,
        wire::STRUCTURED_REPLY_MAGIC if structured => chunk(socket, pending).await,
        magic => Err(Error::Protocol(format!("a reply that begins with {magic:#010x}")).into()),
    }
}

async fn simple<R: AsyncRead + Unpin>(socket: &mut R, pending: &Shared, structured: bool) -> Result<(), Failure> {
    let errno = socket.read_u32().await?;
    let cookie = socket.read_u64().await?;
    let mut waiting = pending.take(cookie)?;
    if errno != 0 {
        waiting.errno = Some(errno);
    } else if waiting.command == Command::Read {
        if structured {
            return Err(
                Error::Protocol("a simple reply to a read after structured replies were agreed".to_owned()).into()
            );
        }
        let (offset, length) = (waiting.offset, u64::from(waiting.length));
        socket.read_exact(waiting.place(offset, length)?).await?;
    }
    Ok(waiting.finish()?)
}

async fn chunk<R: AsyncRead + Unpin>(socket: &mut R, pending: &Shared) -> Result<(), Failure> {
    let flags = socket.read_u16().await?;
    let kind = socket.read_u16().await?;
    let cookie = socket.read_u64().await?;
    let length = socket.read_u32().await?;
    let mut waiting = pending.take(cookie)?;
    let wrong = || Error::Protocol(format!("a chunk of type {kind} with {length} bytes"));
    match kind {
        wire::CHUNK_NONE if length == 0 && flags & wire::CHUNK_DONE != 0 => {}
        wire::CHUNK_OFFSET_DATA if length > 8 => {
            let offset = socket.read_u64().await?;
            socket.read_exact(waiting.place(offset, u64::from(length) - 8)?).await?;
        }
        wire::CHUNK_OFFSET_HOLE if length == 12 => {
            let offset = socket.read_u64().await?;
            let bytes = socket.read_u32().await?;
            waiting.place(offset, u64::from(bytes))?.fill(0);
        }
        kind if kind & wire::CHUNK_ERROR_BIT != 0 && (6..=LONGEST_ERROR).contains(&length) => {
            let errno = socket.read_u32().await?;
            let mut rest = vec![0; length as usize - 4];
            socket.read_exact(&mut rest).await?;
            // The first error of a reply is its cause; an error without a number is still one.
            waiting.errno.get_or_insert(errno.max(1));
        }
        _ => return Err(wrong().into()),
    }
    if flags & wire::CHUNK_DONE != 0 { Ok(waiting.finish()?) } else { Ok(pending.put_back(cookie, waiting)?) }
}
