//! Passing a connection to another process, as xapi does (ocaml/xapi/storage_migrate.ml, nbd_handler).

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Connects to a socket, sends a descriptor with a datapath's name as the payload, and closes.
///
/// # Errors
/// If nobody listens, or not everything is taken at once.
pub fn pass(socket: &Path, descriptor: &impl AsFd, datapath: &str) -> Result<()> {
    let at = || format!("passing a connection to {}", socket.display());
    let control = std::os::unix::net::UnixStream::connect(socket).with_context(at)?;
    let descriptors = [descriptor.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ensure!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)), "no room for a descriptor");
    let payload = [IoSlice::new(datapath.as_bytes())];
    let sent = sendmsg(&control, &payload, &mut ancillary, SendFlags::empty()).with_context(at)?;
    ensure!(sent == datapath.len(), "{sent} bytes of the datapath's name were taken");
    Ok(())
}
