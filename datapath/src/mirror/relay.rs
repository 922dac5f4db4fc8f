//! The one connection to a mirror's peer, and the pump between it and QEMU's NBD client.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use plugin::error::{Error, Result};
use plugin::nbd::{Address, Ahead, ExportInfo, Greeting, NbdUri, query_export};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::task::JoinHandle;

/// How often a listener that is not there yet is tried: xapi binds its proxy's socket in a thread that may start after
/// the call (xen-api `ocaml/xapi/storage_smapiv3_migrate.ml`).
const RETRY: Duration = Duration::from_millis(50);

/// The size of each direction's buffer: as large as one of the mirror's usual requests.
const BUFFER: usize = 1 << 20;

/// A byte stream to or from a peer.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A peer that was connected to and told what it exports.
pub struct Peer {
    stream: Box<dyn Stream>,
    greeting: Greeting,
    /// What the peer says of the export.
    pub info: ExportInfo,
}

impl Peer {
    /// Makes the one connection and asks about the export.
    ///
    /// # Errors
    ///
    /// As [`connect`], and when the peer breaks the protocol.
    pub async fn connect(uri: &NbdUri) -> Result<Self> {
        let mut stream = connect(&uri.address).await?;
        let greeting = Greeting::read(&mut stream).await?;
        let info = query_export(&mut stream, greeting, &uri.export).await?;
        Ok(Self { stream, greeting, info })
    }
}

/// Makes a connection.
///
/// A listener that is absent or refuses is tried again, without end: the caller bounds it. Once connected nothing is
/// tried again, because xapi's proxy takes no second connection.
///
/// # Errors
///
/// When the connection cannot be made for another reason.
pub async fn connect(address: &Address) -> Result<Box<dyn Stream>> {
    loop {
        match open(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                tokio::time::sleep(RETRY).await;
            }
            Err(error) => return Err(Error::io(format!("connecting to {address:?}"), error)),
        }
    }
}

/// Opens a connection.
async fn open(address: &Address) -> io::Result<Box<dyn Stream>> {
    Ok(match address {
        Address::Unix(path) => Box::new(UnixStream::connect(path).await?),
        Address::Tcp(host, port) => {
            // Names are not looked up: a statically linked C library cannot do that on every host.
            let address: IpAddr = host.parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
            let stream = TcpStream::connect(SocketAddr::new(address, *port)).await?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
    })
}

/// What went through a relay.
#[derive(Debug, Default)]
pub struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
    answered: AtomicU64,
}

impl Counters {
    /// Gives the bytes sent to the peer and received from it.
    pub fn read(&self) -> (u64, u64) {
        (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed))
    }

    /// Gives the number of requests that were answered in the peer's place.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }
}

/// A relay at work; dropping it cuts both connections.
pub struct Relay {
    task: JoinHandle<io::Result<()>>,
    counters: Arc<Counters>,
}

impl Relay {
    /// Listens at `socket` for QEMU's NBD client, and connects it to the peer.
    ///
    /// The client is greeted as the peer greeted us. It answers with its flags, which the peer has had from us
    /// already; from there on every byte is passed on, but for the zeroes that come first where the peer `is_blank`
    /// (see [`plugin::nbd::Ahead`]).
    ///
    /// # Errors
    ///
    /// When the socket cannot be made.
    pub fn start(peer: Peer, socket: &Path, is_blank: bool) -> Result<Self> {
        let listener = UnixListener::bind(socket).map_err(Error::on("listening at", socket))?;
        let counters = Arc::new(Counters::default());
        let task = tokio::spawn(run(peer, listener, is_blank, Arc::clone(&counters)));
        Ok(Self { task, counters })
    }

    /// Gives the counters.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Waits for the end of the relay: QEMU has said goodbye and the peer has closed too, or one of them broke off.
    /// Says how it ended. After that it must not be called again.
    pub async fn ended(&mut self) -> io::Result<()> {
        match (&mut self.task).await {
            Ok(result) => result,
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Cuts both connections now, and waits until they are closed.
    pub async fn cut(self) {
        self.task.abort();
        let mut relay = self;
        if !relay.task.is_finished() {
            let _ = relay.ended().await;
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Greets the client and pumps.
async fn run(peer: Peer, listener: UnixListener, is_blank: bool, counters: Arc<Counters>) -> io::Result<()> {
    let (mut client, _) = listener.accept().await?;
    drop(listener);
    client.write_all(&peer.greeting.to_bytes()).await?;
    let mut flags = [0; 4];
    client.read_exact(&mut flags).await?;
    if flags != peer.greeting.client_flags().to_bytes() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("QEMU's NBD client sent flags {flags:?}")));
    }
    let (from_client, mut to_client) = client.into_split();
    let (mut from_peer, mut to_peer) = tokio::io::split(peer.stream);
    let mut ahead = Ahead::new(from_client);
    if is_blank {
        let goes_on = tokio::select! {
            // Both have been told everything that the other said when a request comes: the client waits for the answer
            // to its last option. So dropping the pump then loses nothing.
            goes_on = ahead.pass_options(&mut to_peer, &counters.sent) => goes_on?,
            result = pump(&mut from_peer, &mut to_client, &counters.received) => return result,
        };
        if goes_on {
            ahead.answer_zeroes(&mut to_client, &counters.answered).await?;
        }
    }
    let (looked_at, from_client) = ahead.into_parts();
    let sending = async {
        send(&mut to_peer, &looked_at, &counters.sent).await?;
        drop(looked_at);
        pump(from_client, to_peer, &counters.sent).await
    };
    let receiving = pump(from_peer, to_client, &counters.received);
    tokio::pin!(sending, receiving);
    tokio::select! {
        // A peer that closes first leaves nobody to send to.
        result = &mut receiving => result,
        result = &mut sending => {
            result?;
            receiving.await
        }
    }
}

/// Passes bytes on until the reader ends, and then ends the writer.
async fn pump(
    mut reader: impl AsyncRead + Unpin,
    mut writer: impl AsyncWrite + Unpin,
    count: &AtomicU64,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match reader.read(&mut buffer).await? {
            0 => return writer.shutdown().await,
            length => send(&mut writer, &buffer[..length], count).await?,
        }
    }
}

/// Writes bytes, each counted as it goes, so that a slow peer is not taken for one that hangs.
async fn send(writer: &mut (impl AsyncWrite + Unpin), mut bytes: &[u8], count: &AtomicU64) -> io::Result<()> {
    while !bytes.is_empty() {
        let part = writer.write(bytes).await?;
        if part == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        count.fetch_add(part as u64, Ordering::Relaxed);
        bytes = &bytes[part..];
    }
    Ok(())
}
