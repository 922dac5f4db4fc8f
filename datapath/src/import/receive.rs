//! Taking connections over: a socket on which descriptors come, each with the name of its datapath.

use std::fs;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use plugin::error::{Error, Result};
use rustix::net::{AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg, sockopt};
use tokio::io::{AsyncRead, AsyncWrite, Interest};
use tokio::net::{TcpStream, UnixListener, UnixStream};

/// The longest name that is read; xapi sends a uuid's 36 bytes (xen-api `ocaml/xapi/storage_migrate.ml`, nbd_handler).
const NAME_BYTES: usize = 256;

/// A connection that was passed.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// The socket of an import.
pub struct Listener {
    listener: UnixListener,
    identity: (u64, u64),
}

impl Listener {
    /// Listens at `path`. Once the socket is there it takes connections: it is made under another name.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn bind(path: &Path) -> Result<Self> {
        let new = path.with_extension("new");
        let _ = fs::remove_file(&new);
        let listener = UnixListener::bind(&new).map_err(Error::on("listening at", &new))?;
        fs::set_permissions(&new, PermissionsExt::from_mode(0o600)).map_err(Error::on("protecting", &new))?;
        let identity = identity(&new).map_err(Error::on("looking at", &new))?;
        fs::rename(&new, path).map_err(Error::on("making", path))?;
        Ok(Self { listener, identity })
    }

    /// Tells whether `path` is still this socket.
    pub fn is_at(&self, path: &Path) -> bool {
        identity(path).is_ok_and(|identity| identity == self.identity)
    }

    /// Waits for somebody who has a connection to pass.
    ///
    /// # Errors
    ///
    /// When the socket fails.
    pub async fn accept(&self) -> Result<Control> {
        let (stream, _) = self.listener.accept().await.map_err(|error| Error::io("accepting", error))?;
        Ok(Control(stream))
    }
}

/// Gives what tells a file from another that has its name later.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Somebody who is to pass one connection.
pub struct Control(UnixStream);

impl Control {
    /// Waits for the one message: the connection, and the name of the datapath that it is for.
    ///
    /// # Errors
    ///
    /// When the message has no descriptor, or that is no connected socket.
    pub async fn connection(self) -> Result<(Box<dyn Stream>, String)> {
        let failed = |error| Error::io("receiving a descriptor", error);
        let (descriptor, name) = self.0.async_io(Interest::READABLE, || receive(&self.0)).await.map_err(failed)?;
        let descriptor = descriptor.ok_or_else(|| failed(io::ErrorKind::UnexpectedEof.into()))?;
        Ok((stream(descriptor).map_err(failed)?, String::from_utf8_lossy(&name).into_owned()))
    }
}

/// Receives one message. Of several descriptors the first counts; the others are closed.
fn receive(socket: &UnixStream) -> io::Result<(Option<OwnedFd>, Vec<u8>)> {
    let mut name = [0; NAME_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut name)], &mut ancillary, flags)?;
    let descriptors = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let mut descriptors: Vec<OwnedFd> = descriptors.flatten().collect();
    let first = (!descriptors.is_empty()).then(|| descriptors.swap_remove(0));
    Ok((first, name[..received.bytes].to_vec()))
}

/// Makes a stream of a connected socket: xapi's plain connection, or its end of a pair with stunnel behind it.
fn stream(descriptor: OwnedFd) -> io::Result<Box<dyn Stream>> {
    let family = sockopt::socket_domain(&descriptor)?;
    rustix::io::ioctl_fionbio(&descriptor, true)?;
    if family == AddressFamily::UNIX {
        return Ok(Box::new(UnixStream::from_std(descriptor.into())?));
    }
    let stream = TcpStream::from_std(descriptor.into())?;
    stream.set_nodelay(true)?;
    Ok(Box::new(stream))
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::fd::AsFd;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_connection_comes_with_the_name_of_its_datapath() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("import.sock");
        let listener = Listener::bind(&path).unwrap();
        let control = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        let descriptors = [far.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let payload = [IoSlice::new(b"a datapath")];
        assert_eq!(sendmsg(&control, &payload, &mut ancillary, SendFlags::empty()).unwrap(), 10);
        drop((control, far));
        let (mut stream, name) = listener.accept().await.unwrap().connection().await.unwrap();
        assert_eq!(name, "a datapath");
        near.set_nonblocking(true).unwrap();
        let mut near = UnixStream::from_std(near).unwrap();
        near.write_all(b"x").await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'x');
        drop(stream);
        assert_eq!(near.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_message_without_a_connection_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("import.sock");
        let listener = Listener::bind(&path).unwrap();
        for said in [&b"name"[..], b""] {
            let mut control = UnixStream::connect(&path).await.unwrap();
            control.write_all(said).await.unwrap();
            drop(control);
            assert!(listener.accept().await.unwrap().connection().await.is_err(), "{said:?}");
        }
    }

    #[tokio::test]
    async fn a_socket_that_was_removed_or_replaced_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("import.sock");
        let first = Listener::bind(&path).unwrap();
        assert!(first.is_at(&path));
        let second = Listener::bind(&path).unwrap();
        assert!(!first.is_at(&path) && second.is_at(&path));
        fs::remove_file(&path).unwrap();
        assert!(!second.is_at(&path));
    }
}
