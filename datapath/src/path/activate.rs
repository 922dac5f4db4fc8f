//! Datapath.activate: opens a volume for a domain to read and write.

use plugin::error::Result;
use plugin::host::Host;
use plugin::store::Mode;
use plugin::{activation, device, mirror};

pub use super::Parameters;

/// Opens the volume's chain in its daemon and exports it writable: clients are served when this returns. Attaches the
/// domain where that was not done.
///
/// # Errors
///
/// See [`activation::activate`] and [`activation::open_device`].
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let Parameters { uri, domain } = parameters;
    mirror::source_activated(host, uri.volume)?;
    activation::activate(host, uri, &domain, Mode::ReadWrite)?;
    if device::is_for(host, &domain)? { activation::open_device(host, uri, &domain) } else { Ok(()) }
}
