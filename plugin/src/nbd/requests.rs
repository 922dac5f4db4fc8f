//! A client's requests, passed on to a server.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::wire::{DISCONNECT, REQUEST_BYTES, REQUEST_MAGIC, WRITE};

/// The longest payload that is passed on: what NBD's `doc/proto.md` lets a client send unasked.
const PAYLOAD_BYTES: u32 = 32 << 20;

/// How a client's requests ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It said goodbye, and may come back on the same connection.
    Goodbye,
    /// It closed the connection.
    Closed,
}

/// Passes requests on until the client says goodbye or closes; the server is then told goodbye, or shut down to.
///
/// # Errors
///
/// When either end breaks, or the client sends what is no request.
pub async fn pass_requests(
    from_client: &mut (impl AsyncRead + Unpin),
    to_server: &mut (impl AsyncWrite + Unpin),
) -> io::Result<End> {
    loop {
        let mut header = [0; REQUEST_BYTES];
        if from_client.read(&mut header[..1]).await? == 0 {
            to_server.shutdown().await?;
            return Ok(End::Closed);
        }
        from_client.read_exact(&mut header[1..]).await?;
        let [a, b, c, d, _, _, e, f, ..] = header;
        let (magic, command) = (u32::from_be_bytes([a, b, c, d]), u16::from_be_bytes([e, f]));
        let [.., g, h, i, j] = header;
        let length = u32::from_be_bytes([g, h, i, j]);
        if magic != REQUEST_MAGIC || (command == WRITE && length > PAYLOAD_BYTES) {
            let reason = format!("a request with magic {magic:#x} and length {length}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        to_server.write_all(&header).await?;
        if command == WRITE {
            let payload = tokio::io::copy(&mut from_client.take(u64::from(length)), to_server).await?;
            if payload < u64::from(length) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        to_server.flush().await?;
        if command == DISCONNECT {
            return Ok(End::Goodbye);
        }
    }
}
