//! Passing requests on: what the kernel asks of the file is asked of the export, and answered when that answers.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use plugin::error::{Error, Result};
use rustix::io::Errno;

use super::protocol::{self, ANSWER, Asked, BUFFER, DATA, MOST, Request};
use plugin::nbd::{Command, Export, REPLY_BYTES, REQUEST_BYTES, reply, request};

/// Requests that the daemon owes an answer to, by their numbers.
type Owed = Mutex<HashMap<u64, Owing>>;

/// What an answer of the daemon means to the kernel.
#[derive(Clone, Copy)]
enum Owing {
    /// So many bytes follow it.
    Bytes(u32),
    /// So many bytes were written.
    Written(u32),
    /// It was done.
    Done,
}

/// Answers the kernel until the file is not used any more.
///
/// # Errors
///
/// When the connection to the daemon ends, or one of the two breaks its protocol.
pub fn serve(fuse: File, stream: UnixStream, export: Export) -> Result<()> {
    let failed = |error| Error::io("taking the connection", error);
    let answers = (fuse.try_clone().map_err(failed)?, stream.try_clone().map_err(failed)?);
    let owed = Arc::new(Owed::default());
    let owing = Arc::clone(&owed);
    std::thread::spawn(move || {
        let (fuse, stream) = answers;
        if let Err(error) = pass_answers(&fuse, stream, &owing) {
            tracing::error!(error = error.chain(), "the device has lost its volume");
        }
        // The other thread waits for the kernel, and nothing but the end of the process wakes it.
        std::process::exit(1);
    });
    pass_requests(&fuse, stream, export, &owed)
}

/// Passes the kernel's requests to the daemon, and answers those that it need not be asked.
fn pass_requests(mut fuse: &File, mut stream: UnixStream, export: Export, owed: &Owed) -> Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = match fuse.read(&mut buffer) {
            Ok(length) => length,
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::INTR | Errno::NOENT | Errno::AGAIN) => continue,
                // Nobody uses the file any more.
                Some(Errno::NODEV) => return Ok(()),
                _ => return Err(Error::io("reading from the kernel", error)),
            },
        };
        let Some(Request { number, asked }) = protocol::parse(&buffer[..length]) else {
            return Err(protocol_error("reading from the kernel", "a request that is cut off"));
        };
        let forbidden = export.is_read_only() && matches!(asked, Asked::Write { .. } | Asked::Zero { .. });
        let (command, offset, length, owing) = match asked {
            _ if forbidden => {
                answer(fuse, number, Err(Errno::ROFS))?;
                continue;
            }
            Asked::Read { offset, length } => (Command::Read, offset, length, Owing::Bytes(length)),
            Asked::Write { offset, length } => (Command::Write, offset, length, Owing::Written(length)),
            Asked::Flush => (Command::Flush, 0, 0, Owing::Done),
            Asked::Zero { offset, length } => match u32::try_from(length) {
                Ok(length) => (Command::WriteZeroes, offset, length, Owing::Done),
                // A loop device does not ask for more than 4 GiB.
                Err(_) => {
                    answer(fuse, number, Err(Errno::OPNOTSUPP))?;
                    continue;
                }
            },
            other => {
                answer_at_once(fuse, number, other, export)?;
                continue;
            }
        };
        if matches!(owing, Owing::Bytes(length) if length as usize > MOST) {
            answer(fuse, number, Err(Errno::INVAL))?;
            continue;
        }
        lock(owed).insert(number, owing);
        let header = request(command, number, offset, length);
        let payload = if command == Command::Write { length as usize } else { 0 };
        // The request's header has just the room before the data.
        let begin = DATA - REQUEST_BYTES;
        buffer[begin..DATA].copy_from_slice(&header);
        stream.write_all(&buffer[begin..DATA + payload]).map_err(|error| Error::io("asking the daemon", error))?;
    }
}

/// Answers what needs no daemon.
fn answer_at_once(fuse: &File, number: u64, asked: Asked, export: Export) -> Result<()> {
    match asked {
        Asked::Init { flags } => answer(fuse, number, Ok(&protocol::init(flags))),
        Asked::Attributes => answer(fuse, number, Ok(&protocol::attributes(export.size))),
        Asked::Open => answer(fuse, number, Ok(&protocol::opened())),
        Asked::Space => answer(fuse, number, Ok(&protocol::space())),
        Asked::Granted => answer(fuse, number, Ok(&[])),
        Asked::Nothing => Ok(()),
        _ => answer(fuse, number, Err(Errno::NOSYS)),
    }
}

/// Passes the daemon's answers to the kernel, until the connection ends.
fn pass_answers(fuse: &File, mut stream: UnixStream, owed: &Owed) -> Result<()> {
    let doing = "reading the daemon's answers";
    let failed = |error| Error::io(doing, error);
    let mut buffer = vec![0; ANSWER + MOST];
    loop {
        let mut header = [0; REPLY_BYTES];
        stream.read_exact(&mut header).map_err(failed)?;
        let (cookie, error) = reply(header)?;
        let Some(owing) = lock(owed).remove(&cookie) else {
            return Err(protocol_error(doing, "an answer that nobody waits for"));
        };
        if let Some(error) = error {
            let error = i32::try_from(error).map_or(Errno::IO, Errno::from_raw_os_error);
            answer(fuse, cookie, Err(error))?;
            continue;
        }
        match owing {
            Owing::Done => answer(fuse, cookie, Ok(&[]))?,
            Owing::Written(length) => answer(fuse, cookie, Ok(&protocol::written(length)))?,
            Owing::Bytes(length) => {
                let end = ANSWER + length as usize;
                stream.read_exact(&mut buffer[ANSWER..end]).map_err(failed)?;
                buffer[..ANSWER].copy_from_slice(&protocol::header(cookie, length as usize, 0));
                send(fuse, &buffer[..end])?;
            }
        }
    }
}

/// Answers a request with data or an error.
fn answer(fuse: &File, number: u64, outcome: Result<&[u8], Errno>) -> Result<()> {
    let (data, error) = match outcome {
        Ok(data) => (data, 0),
        Err(error) => (&[][..], error.raw_os_error()),
    };
    let mut bytes = protocol::header(number, data.len(), error).to_vec();
    bytes.extend(data);
    send(fuse, &bytes)
}

/// Gives the kernel an answer. One that it does not wait for any more is no error.
fn send(mut fuse: &File, bytes: &[u8]) -> Result<()> {
    match fuse.write(bytes) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io("answering the kernel", error)),
    }
}

/// Locks what is owed; each holder leaves it whole.
fn lock(owed: &Owed) -> MutexGuard<'_, HashMap<u64, Owing>> {
    owed.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the error of a peer that breaks the protocol.
fn protocol_error(doing: &str, reason: &str) -> Error {
    Error::io(doing, std::io::Error::new(ErrorKind::InvalidData, reason))
}
