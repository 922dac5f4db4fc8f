//! The supervisor's side of its control socket.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use plugin::error::{Error, Result};
use plugin::mirror::{EndReply, EndRequest};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

/// The longest request that is read.
const LINE_BYTES: u64 = 16 << 10;

/// A call that wants the mirror ended and waits for it.
pub struct Waiting {
    /// What it asked for.
    pub request: EndRequest,
    stream: UnixStream,
}

impl Waiting {
    /// Tells the caller that the mirror has ended; one that has gone away is no matter.
    pub async fn answer(mut self, reply: &EndReply) {
        let Ok(mut line) = serde_json::to_vec(reply) else { return };
        line.push(b'\n');
        let _ = self.stream.write_all(&line).await;
    }
}

/// Listens at `socket`, and gives the requests as they come.
///
/// # Errors
///
/// When the socket cannot be made.
pub fn listen(socket: &Path) -> Result<mpsc::UnboundedReceiver<Waiting>> {
    let listener = UnixListener::bind(socket).map_err(Error::on("listening at", socket))?;
    std::fs::set_permissions(socket, PermissionsExt::from_mode(0o600)).map_err(Error::on("protecting", socket))?;
    let (sender, receiver) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(read(stream, sender.clone()));
        }
    });
    Ok(receiver)
}

/// Reads one request; nonsense closes the connection, which its sender takes for no answer.
async fn read(stream: UnixStream, sender: mpsc::UnboundedSender<Waiting>) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    match (&mut reader).take(LINE_BYTES).read_line(&mut line).await {
        Ok(_) => match serde_json::from_str(&line) {
            Ok(request) => drop(sender.send(Waiting { request, stream: reader.into_inner() })),
            Err(error) => tracing::warn!(%error, "a request to the supervisor was not understood"),
        },
        Err(error) => tracing::warn!(%error, "a request to the supervisor was cut off"),
    }
}
