//! Who is connected to an NBD server, without asking it: it may be hanging.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{Error, Result};

/// Counts the clients connected to a listening unix socket, or waiting for it to accept them.
///
/// The kernel lists a server's end of every connection under the listening socket's path.
///
/// # Errors
///
/// When the kernel's list cannot be read.
pub(super) fn count(socket: &Path) -> Result<usize> {
    let path = Path::new("/proc/net/unix");
    let table = fs::read(path).map_err(Error::on("reading", path))?;
    Ok(table.split(|byte| *byte == b'\n').filter(|line| is_connection(line, socket)).count())
}

/// Tells whether a line of the list is a connection at the server's side:
/// `Num RefCount Protocol Flags Type St Inode Path`, where a listening socket has the flag `__SO_ACCEPTCON`.
fn is_connection(line: &[u8], socket: &Path) -> bool {
    const LISTENING: &[u8] = b"00010000";
    let mut fields = line.splitn(7, |byte| *byte == b' ').skip(3);
    let flags = fields.next();
    let rest = fields.nth(2);
    // The inode's number is padded with spaces on its left; the path may hold spaces itself.
    let name = rest.and_then(|rest| rest.trim_ascii_start().splitn(2, |byte| *byte == b' ').nth(1));
    flags.is_some_and(|flags| flags != LISTENING) && name == Some(socket.as_os_str().as_bytes())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn every_connection_counts_and_the_listener_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("a b.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        assert_eq!(count(&socket).unwrap(), 0);
        let accepted = (UnixStream::connect(&socket).unwrap(), listener.accept().unwrap());
        let waiting = UnixStream::connect(&socket).unwrap();
        assert_eq!(count(&socket).unwrap(), 2);
        drop(accepted);
        drop(waiting);
        drop(listener);
        assert_eq!(count(&socket).unwrap(), 0);
    }
}
