//! Datapath.attach: prepares a volume for a domain.

use std::collections::BTreeMap;

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::smapi::{Backend, XenDisk};
use plugin::{activation, device};
use serde::Serialize;

pub use super::Parameters;

/// How the volume can be reached.
#[derive(Debug, Serialize)]
pub struct Attached {
    implementations: Vec<Backend>,
}

/// Starts the volume's storage daemon, if it does not run, and tells where the volume's export, and its block device, will
/// be once the volume is activated. The same volume has the same answer, how often and when it is asked for; only the
/// domains of migrations are not told of a block device.
///
/// xapi wants a XenDisk for every disk of a guest, whatever it then uses (xen-api `ocaml/xenopsd/xc/
/// xenops_server_xen.ml`, params_of_backend). A BlockDevice goes before all else there, and kind `vbd` is the kernel's own
/// backend, which takes any block device. With no block device of this host in the answer the Nbd URI is written
/// to xenstore as `params` and XenDisk's as `qemu-params`; both are the same here, so that a qdisk backend
/// finds the export in either. The Nbd URI must come last: of several, xapi takes the last. docs/xen.md has more.
///
/// # Errors
///
/// [`Error::SrNotAttached`], [`Error::VolumeDoesNotExist`]; else the daemon does not start.
pub fn execute(host: &Host, parameters: Parameters) -> Result<Attached> {
    let Parameters { uri, domain } = parameters;
    let device = device::is_for(host, &domain)?.then(|| device::path(host, uri.volume));
    let socket = activation::attach(host, uri, &domain)?;
    let socket = socket.to_str().filter(|path| !path.contains(':'));
    let socket = socket.ok_or_else(|| Error::Internal("xapi cannot name the socket's path in a URI".to_owned()))?;
    let nbd = format!("nbd:unix:{socket}:exportname={}", uri.volume);
    let disk = |kind: &str, params: String| {
        Backend::XenDisk(XenDisk { params, extra: BTreeMap::new(), backend_type: kind.to_owned() })
    };
    let mut implementations = match device.map(|path| path.display().to_string()) {
        Some(path) => vec![disk("vbd", path.clone()), Backend::BlockDevice { path }],
        None => vec![disk("qdisk", nbd.clone())],
    };
    implementations.push(Backend::Nbd { uri: nbd });
    Ok(Attached { implementations })
}
