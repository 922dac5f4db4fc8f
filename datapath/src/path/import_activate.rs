//! Datapath.import_activate: takes the writes of a migration from SMAPIv1.

use plugin::activation;
use plugin::error::{Error, Result};
use plugin::host::Host;

pub use super::Parameters;
use crate::import::ENTRY;

/// Gives the path of a socket to which xapi passes connections, each with a datapath's name; behind a connection is
/// tapdisk's NBD client, and what it writes goes to the volume. The same call again gives the same socket.
///
/// It lasts until the domain is deactivated. See [`crate::import`] and [`activation::import`].
///
/// # Errors
///
/// [`Error::NotActive`] when the volume is not open for writing: xapi activates it first; else the relay does not
/// start.
pub fn execute(host: &Host, parameters: Parameters) -> Result<String> {
    let Parameters { uri, domain } = parameters;
    let socket = activation::import(host, uri, &domain, &[ENTRY.into(), uri.volume.to_string().into()])?;
    let socket = socket.into_os_string().into_string();
    socket.map_err(|_| Error::Internal("xapi cannot name the socket's path".to_owned()))
}
