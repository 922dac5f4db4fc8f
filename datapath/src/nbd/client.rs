//! The client's side of the handshake.

use plugin::error::{Error, Result};
use plugin::nbd::Greeting;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{Export, NO_ZEROES, OPT_EXPORT_NAME, OPTION_MAGIC, PADDING, protocol};

/// Chooses an export on a fresh connection: the next byte from the server is a reply to a request.
///
/// # Errors
///
/// When the connection ends, which is how a server says that it has no such export, or it breaks the protocol.
pub async fn choose(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), name: &str) -> Result<Export> {
    let greeting = Greeting::read(stream).await?;
    let doing = format!("choosing the NBD export {name:?}");
    let failed = |error| Error::io(doing.clone(), error);
    let length = u32::try_from(name.len()).map_err(|_| protocol(&doing, "the name is too long"))?;
    let flags = greeting.client_flags().to_bytes();
    let mut request = flags.to_vec();
    request.extend(OPTION_MAGIC.to_be_bytes());
    request.extend(OPT_EXPORT_NAME.to_be_bytes());
    request.extend(length.to_be_bytes());
    request.extend(name.as_bytes());
    stream.write_all(&request).await.map_err(failed)?;
    stream.flush().await.map_err(failed)?;
    let export =
        Export { size: stream.read_u64().await.map_err(failed)?, flags: stream.read_u16().await.map_err(failed)? };
    if u32::from_be_bytes(flags) & u32::from(NO_ZEROES) == 0 {
        stream.read_exact(&mut [0; PADDING]).await.map_err(failed)?;
    }
    Ok(export)
}
