//! A relay between two sockets: what stands for the supervisor's where a mirror is compared with another program.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;

/// As large as a direction's buffer in the supervisor.
const BUFFER: usize = 1 << 20;

/// Passes one connection on, on a thread of its own as the supervisor is a process of its own; ends when dropped.
pub(super) struct Relay {
    socket: PathBuf,
    _stop: oneshot::Sender<()>,
}

impl Relay {
    /// Listens at `socket` for one client, and connects it to `peer`.
    pub(super) fn start(socket: &Path, peer: &Path) -> Result<Self> {
        let listener = std::os::unix::net::UnixListener::bind(socket);
        let listener = listener.with_context(|| format!("cannot listen at {}", socket.display()))?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let peer = peer.to_owned();
        std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    passed = pass(listener, &peer) => {
                        if let Err(error) = passed {
                            tracing::warn!(error = format!("{error:#}"), "a relay ended");
                        }
                    }
                    _ = stopped => {}
                }
            });
        });
        Ok(Self { socket: socket.to_owned(), _stop: stop })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}

async fn pass(listener: std::os::unix::net::UnixListener, peer: &Path) -> Result<()> {
    let (client, _) = UnixListener::from_std(listener)?.accept().await?;
    let server = UnixStream::connect(peer).await.with_context(|| peer.display().to_string())?;
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let (one, other) = tokio::join!(pump(from_client, to_server), pump(from_server, to_client));
    one.and(other).map_err(Into::into)
}

async fn pump(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> std::io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..count]).await?;
    }
}
