//! The client's side: an export chosen by its name, and one request after the other.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::handshake::{ExportInfo, Greeting, choose_export};
use super::wire::{
    DISCONNECT, Export, FLUSH, NO_ZEROES, OPT_EXPORT_NAME, OPTION_MAGIC, PADDING, READ, REPLY_MAGIC, REQUEST_BYTES,
    REQUEST_MAGIC, SENDS_FLUSH, SENDS_WRITE_ZEROES, WRITE, WRITE_ZEROES, protocol,
};
use crate::error::{Error, Result};

/// The protocol's errors, whose numbers are Linux's: EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN.
const ERRORS: [i32; 8] = [1, 5, 12, 22, 28, 75, 95, 108];

/// Chooses an export on a fresh connection: the next byte from the server is a reply to a request.
///
/// # Errors
///
/// When the server has no such export, the connection ends, or the server breaks the protocol.
pub async fn choose(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), name: &str) -> Result<Export> {
    let greeting = Greeting::read(stream).await?;
    let Some(info) = choose_export(stream, greeting, name).await? else {
        return choose_by_name(stream, greeting, name).await;
    };
    match info {
        ExportInfo { size: Some(size), flags: Some(flags), .. } => Ok(Export { size, flags }),
        _ => Err(protocol("choosing an NBD export", format!("the server does not say how large {name:?} is"))),
    }
}

/// Chooses an export of a server that has refused the newer option; it hangs up when it has no such export.
async fn choose_by_name(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    greeting: Greeting,
    name: &str,
) -> Result<Export> {
    let doing = format!("choosing the NBD export {name:?}");
    let failed = |error| Error::io(doing.clone(), error);
    let length = u32::try_from(name.len()).map_err(|_| protocol(&doing, "the name is too long"))?;
    let mut request = OPTION_MAGIC.to_be_bytes().to_vec();
    request.extend(OPT_EXPORT_NAME.to_be_bytes());
    request.extend(length.to_be_bytes());
    request.extend(name.as_bytes());
    stream.write_all(&request).await.map_err(failed)?;
    stream.flush().await.map_err(failed)?;
    let export =
        Export { size: stream.read_u64().await.map_err(failed)?, flags: stream.read_u16().await.map_err(failed)? };
    if u32::from_be_bytes(greeting.client_flags().to_bytes()) & u32::from(NO_ZEROES) == 0 {
        stream.read_exact(&mut [0; PADDING]).await.map_err(failed)?;
    }
    Ok(export)
}

/// A connection to an export, used by one caller that waits for each answer.
pub struct Connection<S> {
    stream: S,
    export: Export,
    cookie: u64,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Chooses an export on a fresh connection.
    ///
    /// # Errors
    ///
    /// As [`choose`].
    pub async fn open(mut stream: S, name: &str) -> Result<Self> {
        let export = choose(&mut stream, name).await?;
        Ok(Self { stream, export, cookie: 0 })
    }

    /// Gives the export's size in bytes.
    pub fn size(&self) -> u64 {
        self.export.size
    }

    /// Tells whether the export refuses writes.
    pub fn is_read_only(&self) -> bool {
        self.export.is_read_only()
    }

    /// Reads bytes into the whole of `buffer`.
    ///
    /// # Errors
    ///
    /// When the server refuses, or the connection ends.
    pub async fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.request(READ, offset, buffer.len(), &[]).await?;
        self.stream.read_exact(buffer).await.map(drop).map_err(|error| Error::io("reading by NBD", error))
    }

    /// Writes bytes; zeroes travel as a request where the server knows it, and leave no data there.
    ///
    /// # Errors
    ///
    /// As [`Self::read`].
    pub async fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        if self.export.flags & SENDS_WRITE_ZEROES != 0 && data.iter().all(|byte| *byte == 0) {
            return self.request(WRITE_ZEROES, offset, data.len(), &[]).await;
        }
        self.request(WRITE, offset, data.len(), data).await
    }

    /// Makes what was written durable, where the server knows how; one that does not writes through.
    ///
    /// # Errors
    ///
    /// As [`Self::read`].
    pub async fn flush(&mut self) -> Result<()> {
        if self.export.flags & SENDS_FLUSH == 0 {
            return Ok(());
        }
        self.request(FLUSH, 0, 0, &[]).await
    }

    /// Says goodbye and waits until the server has closed the connection.
    ///
    /// # Errors
    ///
    /// When the connection breaks, or the server sends something instead.
    pub async fn close(mut self) -> Result<()> {
        self.send(DISCONNECT, 0, 0, &[]).await?;
        match self.stream.read(&mut [0]).await {
            Ok(0) => Ok(()),
            Ok(_) => Err(protocol("saying goodbye by NBD", "the server had more to say")),
            Err(error) => Err(Error::io("saying goodbye by NBD", error)),
        }
    }

    /// Sends a request and waits for its reply.
    async fn request(&mut self, command: u16, offset: u64, length: usize, payload: &[u8]) -> Result<()> {
        let doing = match command {
            READ => "reading by NBD",
            FLUSH => "flushing by NBD",
            _ => "writing by NBD",
        };
        self.send(command, offset, length, payload).await?;
        let failed = |error| Error::io(doing, error);
        let magic = self.stream.read_u32().await.map_err(failed)?;
        let number = self.stream.read_u32().await.map_err(failed)?;
        let cookie = self.stream.read_u64().await.map_err(failed)?;
        if magic != REPLY_MAGIC || cookie != self.cookie {
            return Err(protocol(doing, format!("a reply with magic {magic:#x}")));
        }
        match i32::try_from(number) {
            Ok(0) => Ok(()),
            Ok(number) if ERRORS.contains(&number) => Err(failed(std::io::Error::from_raw_os_error(number))),
            // Another one of Linux's would be taken for something that happened here.
            _ => Err(protocol(doing, format!("error {number}"))),
        }
    }

    /// Sends a request.
    async fn send(&mut self, command: u16, offset: u64, length: usize, payload: &[u8]) -> Result<()> {
        let failed = |error| Error::io("sending a request by NBD", error);
        let length =
            u32::try_from(length).map_err(|_| protocol("sending a request by NBD", "it is longer than 4 GiB"))?;
        self.cookie += 1;
        let mut bytes = Vec::with_capacity(REQUEST_BYTES + payload.len());
        bytes.extend(REQUEST_MAGIC.to_be_bytes());
        bytes.extend(0_u16.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(payload);
        self.stream.write_all(&bytes).await.map_err(failed)?;
        self.stream.flush().await.map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(kind: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = crate::nbd::wire::OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(7_u32.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend((payload.len() as u32).to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    /// Chooses an export of a server that greets with `flags`, sends `bytes` and closes; gives what the server was sent.
    async fn chosen(flags: u16, bytes: &[u8]) -> (Result<Export>, Vec<u8>) {
        let (mut near, mut far) = tokio::io::duplex(1 << 16);
        far.write_all(&crate::nbd::wire::INIT_MAGIC.to_be_bytes()).await.unwrap();
        far.write_all(&OPTION_MAGIC.to_be_bytes()).await.unwrap();
        far.write_all(&flags.to_be_bytes()).await.unwrap();
        far.write_all(bytes).await.unwrap();
        far.shutdown().await.unwrap();
        let chosen = choose(&mut near, "e").await;
        drop(near);
        let mut said = Vec::new();
        far.read_to_end(&mut said).await.unwrap();
        (chosen, said)
    }

    #[tokio::test]
    async fn a_server_without_the_newer_option_is_asked_by_the_oldest() {
        let old = [reply(crate::nbd::wire::REP_ERR_UNSUP, b""), vec![0, 0, 0, 0, 0, 0, 16, 0, 0, 3]].concat();
        let (export, said) = chosen(3, &old).await;
        assert_eq!(export.unwrap(), Export { size: 4096, flags: 3 });
        assert!(said.ends_with(&[0, 0, 0, 1, 0, 0, 0, 1, b'e']), "{said:?}");
        // The flags are said once.
        assert_eq!(said.len(), 4 + (16 + 4 + 1 + 2) + (16 + 1));
        let padded = [old, vec![0; PADDING]].concat();
        assert_eq!(chosen(1, &padded).await.0.unwrap(), Export { size: 4096, flags: 3 });
    }

    #[tokio::test]
    async fn an_error_that_the_protocol_does_not_know_is_not_taken_for_one_of_this_host() {
        for (number, code) in
            [(28, "SR_BACKEND_FAILURE_44"), (30, "SR_BACKEND_FAILURE_200"), (u32::MAX, "SR_BACKEND_FAILURE_200")]
        {
            let mut info = vec![0, 0];
            info.extend([0, 0, 0, 0, 0, 0, 16, 0, 0, 1]);
            let mut said =
                [&crate::nbd::wire::INIT_MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &[0, 3]].concat();
            said.extend([reply(3, &info), reply(1, b"")].concat());
            said.extend(REPLY_MAGIC.to_be_bytes());
            said.extend(number.to_be_bytes());
            said.extend(1_u64.to_be_bytes());
            let stream = tokio::io::join(&said[..], tokio::io::sink());
            let mut connection = Connection::open(stream, "e").await.unwrap();
            let error = connection.write(0, &[1]).await.unwrap_err();
            assert_eq!(error.code().0, code, "{error:?}");
        }
    }

    #[tokio::test]
    async fn a_server_that_says_no_size_is_refused() {
        let (export, _) = chosen(3, &reply(1, b"")).await;
        assert!(export.unwrap_err().chain().contains("how large \"e\" is"));
    }
}
