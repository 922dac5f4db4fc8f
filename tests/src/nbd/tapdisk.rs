//! The NBD client of a tapdisk (blktap, drivers/block-nbd.c), on a connection that somebody else has opened.
//!
//! It knows two options, an export by its name and nothing else, and three commands; it never flushes. While it is
//! paused it keeps the connection, and expects to be greeted anew on it.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::Error;
use super::wire::{self, Command};

/// The name that every tapdisk asks for, with the zero that its C string ends with.
const EXPORT: &[u8] = b"tapdisk_client\0";

/// A tapdisk's mirror.
#[derive(Debug)]
pub struct Tapdisk {
    stream: UnixStream,
    cookie: u64,
}

impl Tapdisk {
    /// Takes a connection, on which a server is to greet.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, cookie: 0 }
    }

    /// Waits to be greeted and chooses the export; its size in bytes.
    ///
    /// # Errors
    /// `Error::Lost` if the server does not want this client any more.
    pub async fn negotiate(&mut self) -> Result<u64, Error> {
        let magic = self.stream.read_u64().await.map_err(lost)?;
        let again = self.stream.read_u64().await.map_err(lost)?;
        let offered = self.stream.read_u16().await.map_err(lost)?;
        if magic != wire::GREETING_MAGIC || again != wire::OPTION_MAGIC || offered & wire::FIXED_NEWSTYLE == 0 {
            return Err(Error::Protocol(format!("a greeting of {magic:#x} {again:#x} {offered:#x}")));
        }
        let mut said = u32::from(wire::FIXED_NEWSTYLE | wire::NO_ZEROES).to_be_bytes().to_vec();
        said.extend(wire::OPTION_MAGIC.to_be_bytes());
        said.extend(wire::OPT_EXPORT_NAME.to_be_bytes());
        said.extend(15u32.to_be_bytes());
        said.extend(EXPORT);
        self.stream.write_all(&said).await.map_err(lost)?;
        let size = self.stream.read_u64().await.map_err(lost)?;
        self.stream.read_u16().await.map_err(lost)?;
        if offered & wire::NO_ZEROES == 0 {
            self.stream.read_exact(&mut [0; 124]).await.map_err(lost)?;
        }
        Ok(size)
    }

    /// Writes bytes, and waits until the server has them.
    ///
    /// # Errors
    /// Any of [`Error`]'s later kinds.
    pub async fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.send(Command::Write, offset, data.len(), data).await?;
        self.answered(Command::Write, offset, data.len()).await
    }

    /// Reads bytes.
    ///
    /// # Errors
    /// Any of [`Error`]'s later kinds.
    pub async fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>, Error> {
        self.send(Command::Read, offset, length, &[]).await?;
        self.answered(Command::Read, offset, length).await?;
        let mut data = vec![0; length];
        self.stream.read_exact(&mut data).await.map_err(lost)?;
        Ok(data)
    }

    /// Says goodbye and keeps the connection, as before a snapshot of the disk at the source.
    ///
    /// # Errors
    /// `Error::Lost`
    pub async fn pause(&mut self) -> Result<(), Error> {
        self.send(Command::Disconnect, 0, 0, &[]).await
    }

    /// Says goodbye and closes.
    pub async fn close(mut self) {
        // The server may have gone first.
        let _ = self.pause().await;
    }

    async fn send(&mut self, command: Command, offset: u64, length: usize, data: &[u8]) -> Result<(), Error> {
        let too_long = |_| Error::Request(format!("{} of {length} bytes", command.name()));
        let length = u32::try_from(length).map_err(too_long)?;
        self.cookie += 1;
        let header = wire::request_header(command, self.cookie, offset, length);
        self.stream.write_all(&header).await.map_err(lost)?;
        self.stream.write_all(data).await.map_err(lost)
    }

    async fn answered(&mut self, command: Command, offset: u64, length: usize) -> Result<(), Error> {
        let magic = self.stream.read_u32().await.map_err(lost)?;
        let errno = self.stream.read_u32().await.map_err(lost)?;
        let cookie = self.stream.read_u64().await.map_err(lost)?;
        if magic != wire::SIMPLE_REPLY_MAGIC || cookie != self.cookie {
            return Err(Error::Protocol(format!("a reply of {magic:#x} to command {cookie}, not {}", self.cookie)));
        }
        match errno {
            0 => Ok(()),
            errno => Err(Error::Command { command: command.name(), offset, length: length as u64, errno }),
        }
    }
}

fn lost(error: std::io::Error) -> Error {
    Error::Lost(error.to_string())
}
