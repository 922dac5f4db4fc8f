//! Datapath.detach: ends what a domain has to do with a volume.

use plugin::attachment::Attachment;
use plugin::error::Result;
use plugin::host::Host;
use plugin::id::{Domain, VolumeUri};
use plugin::{activation, mirror};

pub use super::Parameters;

/// Forgets the domain and, with the last one, stops the volume's daemon: nothing of the volume is then left on
/// this host. A domain that is still active is deactivated; one that is not attached, or a volume that is gone, is
/// detached.
///
/// # Errors
///
/// Only when a process does not end, or a lock is held by another call for too long.
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let Parameters { uri, domain } = parameters;
    let is_last = is_last_attached(host, uri, &domain)?;
    mirror::before_detach(host, uri.volume, &domain, is_last)?;
    activation::detach(host, uri, &domain)
}

/// Tells whether no other domain is attached. No lock is held afterwards.
fn is_last_attached(host: &Host, uri: VolumeUri, domain: &Domain) -> Result<bool> {
    let attachment = Attachment::lock_existing(host, uri.volume)?;
    Ok(!attachment.iter().flat_map(|attachment| attachment.domains()).any(|(other, _)| other != domain))
}
