//! One importing client: greeted as often as it wants, and its requests passed to the volume's export.

use std::path::Path;

use plugin::error::{Error, Result};
use plugin::nbd::{self, End};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// The size of each direction's buffer.
const BUFFER: usize = 256 << 10;

/// How a client left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// It had asked for nothing yet, or had said goodbye.
    Idle,
    /// In the middle, as one that has given up.
    Abruptly,
}

/// Serves the client until it closes its connection, or that breaks.
///
/// The export is connected to only while the client is past its handshake: a tapdisk that is paused holds nothing open.
///
/// # Errors
///
/// When either connection breaks, or the client breaks the protocol.
pub async fn serve(client: impl AsyncRead + AsyncWrite + Unpin, socket: &Path, export: &str) -> Result<Left> {
    let (from_client, mut to_client) = tokio::io::split(client);
    let mut from_client = BufReader::with_capacity(BUFFER, from_client);
    let mut greeted = false;
    loop {
        let choice = match nbd::negotiate(&mut from_client, &mut to_client).await {
            Ok(Some(choice)) => choice,
            Ok(None) => return Ok(Left::Idle),
            // One that said goodbye need not come back.
            Err(Error::Io { source, .. }) if greeted && source.kind() != std::io::ErrorKind::InvalidData => {
                return Ok(Left::Idle);
            }
            Err(error) => return Err(error),
        };
        greeted = true;
        let name = String::from_utf8_lossy(&choice.name);
        tracing::info!(%name, "the importing client has chosen an export");
        let mut server = UnixStream::connect(socket).await.map_err(Error::on("connecting to", socket))?;
        let chosen = nbd::choose(&mut server, export).await?;
        choice.accept(&mut to_client, chosen).await?;
        match relay(&mut from_client, &mut to_client, server).await.map_err(broken)? {
            End::Goodbye => {}
            End::Closed => return Ok(Left::Abruptly),
        }
    }
}

/// Passes requests and replies on until the client has said goodbye and the export has answered everything.
async fn relay(
    from_client: &mut (impl AsyncRead + Unpin),
    to_client: &mut (impl AsyncWrite + Unpin),
    server: UnixStream,
) -> std::io::Result<End> {
    let (from_server, mut to_server) = server.into_split();
    let mut from_server = BufReader::with_capacity(BUFFER, from_server);
    let replies = async {
        tokio::io::copy_buf(&mut from_server, to_client).await?;
        to_client.flush().await
    };
    let requests = nbd::pass_requests(from_client, &mut to_server);
    tokio::pin!(replies, requests);
    tokio::select! {
        end = &mut requests => {
            // The export closes once it has answered what came before the goodbye.
            let end = end?;
            replies.await?;
            Ok(end)
        }
        result = &mut replies => {
            result?;
            Err(std::io::Error::new(std::io::ErrorKind::ConnectionReset, "the export was closed"))
        }
    }
}

/// Makes the error of a connection that broke.
fn broken(source: std::io::Error) -> Error {
    Error::io("relaying an import", source)
}
