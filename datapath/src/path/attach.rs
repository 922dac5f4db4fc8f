//! Datapath.attach: prepares a volume for a domain.

use std::collections::BTreeMap;

use plugin::activation;
use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::smapi::{Backend, XenDisk};
use serde::Serialize;

pub use super::Parameters;

/// How the volume can be reached.
#[derive(Debug, Serialize)]
pub struct Attached {
    implementations: Vec<Backend>,
}

/// Starts the volume's storage daemon, if it does not run, and tells where the volume's export will be once the
/// volume is activated. The same volume has the same answer, whichever domain asks, how often and when.
///
/// xapi wants a XenDisk for every disk of a guest, whatever it then uses (xen-api `ocaml/xenopsd/xc/
/// xenops_server_xen.ml`, params_of_backend). With no block device of this host in the answer it writes the Nbd URI
/// to xenstore as `params` and XenDisk's as `qemu-params`; both are the same here, so that a qdisk backend
/// finds the export in either. The Nbd URI must come last: of several, xapi takes the last.
///
/// # Errors
///
/// [`Error::SrNotAttached`], [`Error::VolumeDoesNotExist`]; else the daemon does not start.
pub fn execute(host: &Host, parameters: Parameters) -> Result<Attached> {
    let Parameters { uri, domain } = parameters;
    let socket = activation::attach(host, uri, &domain)?;
    let socket = socket.to_str().filter(|path| !path.contains(':'));
    let socket = socket.ok_or_else(|| Error::Internal("xapi cannot name the socket's path in a URI".to_owned()))?;
    let nbd = format!("nbd:unix:{socket}:exportname={}", uri.volume);
    let disk = XenDisk { params: nbd.clone(), extra: BTreeMap::new(), backend_type: "qdisk".to_owned() };
    Ok(Attached { implementations: vec![Backend::XenDisk(disk), Backend::Nbd { uri: nbd }] })
}
