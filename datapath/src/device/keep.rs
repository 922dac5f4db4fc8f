//! Looking after a connection that the kernel's nbd driver has: until somebody asks for its end, or the daemon has died.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;

use plugin::device::kernel::{self, Connection};
use plugin::error::{Error, Result};
use plugin::nbd::Export;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// Gives the connection to the driver, and ends the process when the device has ended.
///
/// The driver by itself would leave requests unanswered that a daemon owes when it dies, and of one that hangs it waits
/// for the goodbye to be taken. Who has the connection too can cut it.
///
/// # Errors
///
/// When the driver does not take it.
pub fn keep(directory: &Path, stream: UnixStream, export: Export) -> Result<()> {
    let listener = kernel::listen(directory)?;
    let connection = kernel::connect(directory, &stream, export)?;
    let mut is_ending = false;
    loop {
        // A connection that has ended would be told of for ever.
        let closed = if is_ending { PollFlags::empty() } else { PollFlags::RDHUP };
        let mut polled = [PollFd::new(&listener, PollFlags::IN), PollFd::new(&stream, closed)];
        let polled = if is_ending { &mut polled[..1] } else { &mut polled[..] };
        match poll(polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Error::io("waiting for a device's end", error.into())),
        }
        let is_asked = polled[0].revents().contains(PollFlags::IN);
        let has_died = polled.get(1).is_some_and(|polled| !polled.revents().is_empty());
        if is_asked {
            listener.accept().map_err(|error| Error::io("being asked for a device's end", error))?;
        }
        if is_asked && is_ending {
            cut(&stream)?;
        } else if is_asked || has_died {
            if has_died {
                tracing::error!(number = connection.number, "the device has lost its volume, or was ended by others");
            }
            is_ending = true;
            std::thread::spawn(move || end(connection));
        }
    }
}

/// Has the driver let go, and ends the process.
fn end(connection: Connection) {
    let ended = kernel::disconnect(connection);
    if let Err(error) = &ended {
        tracing::error!(error = error.chain(), "the device does not end");
    }
    std::process::exit(i32::from(ended.is_err()));
}

/// Ends the connection, whoever waits for something on it.
fn cut(stream: &UnixStream) -> Result<()> {
    match stream.shutdown(Shutdown::Both) {
        Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(Error::io("cutting a connection", error)),
        _ => Ok(()),
    }
}
