//! Data.mirror: starts to mirror a volume.

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::id::{Domain, MirrorKey, VolumeUri};
use plugin::mirror::MirrorRecord;
use plugin::nbd::NbdUri;
use plugin::smapi::Operation;
use plugin::store::{Mode, Sr};
use serde::Deserialize;

use super::caller;
use super::start::{Source, alone, running};

/// The domain that xapi names for a VM that is halted (xen-api `ocaml/xapi/xapi_vm_migrate.ml`).
const HALTED: &str = "-1";

/// The parameters of Data.mirror.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    uri: String,
    domain: String,
    remote: String,
    #[serde(default)]
    dbg: String,
}

/// Starts to copy the volume to the NBD export that `remote` names, and then to mirror what a guest writes; gives the
/// operation for Data.stat.
///
/// What is mirrored is what the volume's datapath has open, whoever activated it: xapi names the guest's domain for
/// the live leaf and its own for a snapshot. A volume that nobody activated is opened for the mirror alone. The same
/// call again, while the mirror goes on, gives the same operation: the caller repeats a call that it lost, and the
/// destination takes one connection. Whether the destination can be reached is told by Data.stat.
///
/// # Errors
///
/// [`Error::VolumeInUse`] when the volume is being mirrored elsewhere, or copied; else the volume cannot be opened, or
/// the supervisor not started.
pub fn execute(host: &Host, parameters: Parameters) -> Result<Operation> {
    let uri: VolumeUri = parameters.uri.parse()?;
    let domain: Domain = parameters.domain.parse()?;
    let remote: NbdUri = parameters.remote.parse()?;
    Sr::attached(host, uri.sr)?.load(uri.volume)?;
    alone(host, uri, || start(host, uri, domain, &remote, &parameters.dbg)).map(Operation::mirror)
}

/// Starts the mirror, with the lock held that keeps a second call from doing the same.
fn start(host: &Host, uri: VolumeUri, domain: Domain, remote: &NbdUri, dbg: &str) -> Result<MirrorKey> {
    if let Some(record) = running(host, uri)? {
        if !record.copy && record.domain == domain && record.remote.parse::<NbdUri>()? == *remote {
            return Ok(record.key);
        }
        let doing = if record.copy { "copied" } else { "mirrored" };
        let reason = format!("it is being {doing} to {}", record.remote);
        return Err(Error::VolumeInUse { volume: uri.volume.to_string(), reason });
    }
    let source = Source::open(host, uri)?;
    let live = source.mode == Mode::ReadWrite && domain.as_str() != HALTED;
    let record = MirrorRecord::new(uri, source.node, domain, remote.to_string());
    let mut record = MirrorRecord { live, offline: source.offline, debug_info: caller(dbg), ..record };
    source.supervise(host, &mut record, None)?;
    Ok(record.key)
}
