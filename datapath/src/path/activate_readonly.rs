//! Datapath.activate_readonly: opens a volume for a domain to read.

use plugin::error::Result;
use plugin::host::Host;
use plugin::store::Mode;
use plugin::{activation, device};

pub use super::Parameters;

/// Opens the volume's chain in its daemon and exports it read-only; where another domain writes to the volume, its
/// export serves this one too. Otherwise as Datapath.activate.
///
/// # Errors
///
/// See [`activation::activate`] and [`activation::open_device`].
pub fn execute(host: &Host, parameters: Parameters) -> Result<()> {
    let Parameters { uri, domain } = parameters;
    activation::activate(host, uri, &domain, Mode::ReadOnly)?;
    if device::is_for(host, &domain)? { activation::open_device(host, uri, &domain) } else { Ok(()) }
}
