//! A connection in between, to hold up or cut what goes through it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::nbd::Uri;

/// Takes any number of connections, one after the other or at once, and passes bytes on to an NBD server.
#[derive(Debug)]
pub struct Relay {
    uri: Uri,
    /// Bytes that may still go towards the server; what is beyond waits.
    allowance: watch::Sender<u64>,
    carried: Arc<AtomicU64>,
    connections: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Relay {
    /// Starts a relay in a directory, which lets so many bytes through towards the server.
    pub fn start(directory: &Path, name: &str, server: &Uri, allowance: u64) -> Result<Self> {
        let socket = directory.join(name);
        let listener = UnixListener::bind(&socket)?;
        let (sender, receiver) = watch::channel(allowance);
        let (carried, connections) = (Arc::<AtomicU64>::default(), Arc::<AtomicUsize>::default());
        let target = server.socket().to_owned();
        let task = tokio::spawn(accept(listener, target, receiver, Arc::clone(&carried), Arc::clone(&connections)));
        Ok(Self { uri: Uri::new(socket, server.export()), allowance: sender, carried, connections, task })
    }

    /// Where to connect instead.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// Lets so many bytes through in all.
    pub fn allow(&self, bytes: u64) {
        self.allowance.send_replace(bytes);
    }

    /// How many bytes went towards the server.
    pub fn carried(&self) -> u64 {
        self.carried.load(Ordering::SeqCst)
    }

    /// How many connections there were.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// Cuts every connection and takes no more.
    pub async fn cut(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
        let _ = std::fs::remove_file(self.uri.socket());
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(
    listener: UnixListener,
    target: PathBuf,
    allowance: watch::Receiver<u64>,
    carried: Arc<AtomicU64>,
    connections: Arc<AtomicUsize>,
) {
    let mut pumps = tokio::task::JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        connections.fetch_add(1, Ordering::SeqCst);
        let (target, allowance, carried) = (target.clone(), allowance.clone(), Arc::clone(&carried));
        pumps.spawn(async move {
            let Ok(server) = UnixStream::connect(target).await else { return };
            let (from_client, to_client) = client.into_split();
            let (from_server, to_server) = server.into_split();
            tokio::select! {
                () = pump(from_client, to_server, Some((allowance, &carried))) => {}
                () = pump(from_server, to_client, None) => {}
            }
        });
    }
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut limit: Option<(watch::Receiver<u64>, &AtomicU64)>,
) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if let Some((allowance, carried)) = &mut limit {
            let after = carried.load(Ordering::SeqCst) + length as u64;
            if allowance.wait_for(|allowed| *allowed >= after).await.is_err() {
                return;
            }
            carried.store(after, Ordering::SeqCst);
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
