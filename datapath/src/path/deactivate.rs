//! Datapath.deactivate: ends a domain's reading and writing.

use plugin::attachment::Attachment;
use plugin::error::Result;
use plugin::host::Host;
use plugin::id::{Domain, VolumeUri};
use plugin::{activation, mirror};

pub use super::Parameters;

/// Ends the domain's mirror, drained and flushed; then, with no other domain active, flushes what was written and
/// closes the volume. A domain that is not active, or a volume that is gone, is deactivated.
///
/// # Errors
///
/// [`plugin::Error::MirrorBroken`] when the mirror's destination lacks writes; nothing is deactivated then. See
/// [`activation::deactivate`] for the rest.
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let Parameters { uri, domain } = parameters;
    let is_last = look(host, uri, &domain)?;
    mirror::before_deactivate(host, uri.volume, &domain, is_last)?;
    activation::deactivate(host, uri, &domain)
}

/// Sees that a mirror gets all that was written to a block device, and tells whether no other domain is active. No lock is
/// held afterwards: the mirror's end takes its time.
fn look(host: &Host, uri: VolumeUri, domain: &Domain) -> Result<bool> {
    let Some(mut attachment) = Attachment::lock_existing(host, uri.volume)? else { return Ok(true) };
    attachment.write_device_back(domain)?;
    let mut others = attachment.domains().iter().filter(|(other, _)| *other != domain);
    Ok(!others.any(|(_, usage)| usage.is_active()))
}
