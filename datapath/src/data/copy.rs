//! Data.copy: starts to copy parts of a volume.

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::id::{Domain, VolumeUri};
use plugin::mirror::{Blocks, MirrorRecord};
use plugin::nbd::NbdUri;
use plugin::smapi::Operation;
use plugin::store::{Mode, Sr};
use serde::Deserialize;

use super::caller;
use super::start::{Source, alone, running};

/// The parameters of Data.copy.
#[derive(Debug, Deserialize)]
pub struct Parameters {
    uri: String,
    domain: String,
    remote: String,
    blocklist: BlockList,
    #[serde(default)]
    dbg: String,
}

/// A list of blocks (xen-api `ocaml/xapi-storage/generator/lib/common.ml`).
#[derive(Debug, Deserialize)]
struct BlockList {
    blocksize: i64,
    ranges: Vec<(i64, i64)>,
}

/// Starts to copy the blocks, and no others, to the NBD export that `remote` names; gives the operation for Data.stat.
///
/// While the volume is mirrored to the same export nothing is sent twice: through the mirror the destination gets every
/// block that it lacks, in an order in which old data never replaces what a guest has written since. The operation is
/// then complete when the mirror has sent everything once. Without a mirror, what a guest writes meanwhile is copied or
/// not. The same call again, while the copy goes on, gives the same operation.
///
/// # Errors
///
/// [`Error::VolumeInUse`] when the volume is being mirrored or copied otherwise; [`Error::BadRequest`] when a block is
/// not one of the volume's; else the volume cannot be opened, or the supervisor not started.
pub fn execute(host: &Host, parameters: Parameters) -> Result<Operation> {
    let uri: VolumeUri = parameters.uri.parse()?;
    let domain: Domain = parameters.domain.parse()?;
    let remote: NbdUri = parameters.remote.parse()?;
    let tree = Sr::attached(host, uri.sr)?.load(uri.volume)?;
    let size = tree.tree.node(tree.volume(uri.volume)?.node)?.virtual_size;
    let blocks = Blocks::new(parameters.blocklist.blocksize, &parameters.blocklist.ranges, size)?;
    alone(host, uri, || start(host, uri, domain, &remote, &blocks, &parameters.dbg))
}

/// Starts the copy, with the lock held that keeps a second call from doing the same.
fn start(
    host: &Host,
    uri: VolumeUri,
    domain: Domain,
    remote: &NbdUri,
    blocks: &Blocks,
    dbg: &str,
) -> Result<Operation> {
    if let Some(record) = running(host, uri)? {
        let theirs: NbdUri = record.remote.parse()?;
        let same = if record.copy {
            record.domain == domain
                && theirs == *remote
                && Blocks::load(host, record.key)?.is_some_and(|theirs| theirs == *blocks)
        } else {
            is_same_export(&theirs, remote)
        };
        if same {
            return Ok(Operation::copy(record.key));
        }
        let doing = if record.copy { "copied" } else { "mirrored" };
        let reason = format!("it is being {doing} to {}", record.remote);
        return Err(Error::VolumeInUse { volume: uri.volume.to_string(), reason });
    }
    let source = Source::open(host, uri)?;
    let live = source.mode == Mode::ReadWrite;
    let record = MirrorRecord::new(uri, source.node, domain, remote.to_string());
    let mut record = MirrorRecord { live, offline: source.offline, copy: true, debug_info: caller(dbg), ..record };
    source.supervise(host, &mut record, Some(blocks))?;
    Ok(Operation::copy(record.key))
}

/// Tells whether two URIs lead to one volume: xapi's proxies have a socket for each connection, and the name of an export
/// is its volume's.
fn is_same_export(one: &NbdUri, other: &NbdUri) -> bool {
    one == other || (one.export == other.export && !one.export.is_empty())
}
