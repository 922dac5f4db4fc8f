//! What is logged, and where: standard error, and the host's log.
//!
//! ```text
//!   tracing ──► standard error        of a script shown by xapi-storage-script with a failure alone, of a daemon its log
//!          └──► the host's log        /run/systemd/journal/socket with a field for each value, else /dev/log as a line
//! ```
//!
//! The host's log gets one line for each call, and what went wrong meanwhile. Nothing waits for it: a line that it does not
//! take at once, as it is full, hangs or is not there, is lost, and the next line that it takes says how many were.

mod journal;
mod layer;
mod sink;
mod syslog;

pub use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::host::Host;
use layer::HostLog;

/// The variable that chooses what is logged to standard error: levels, for all or for a module, between commas
/// (`info,plugin::qemu=trace`).
pub const LOG_VARIABLE: &str = "XAPI_STORAGE_QCOW2_LOG";

/// What the lines in the host's log are said to come from.
pub const IDENTIFIER: &str = "xapi-storage-qcow2";

/// Starts logging: to the host's log what the host's settings choose, to standard error what [`LOG_VARIABLE`] does, else
/// `default`. To be called once in a process.
pub fn start(host: &Host, default: LevelFilter) {
    let log = HostLog::new(host);
    // Settings that cannot be read are an error of the call, which is to be seen. Where there is no log now, they are not
    // read for it.
    let settings = if log.is_there() { host.settings().ok() } else { None };
    let chosen = settings.and_then(|settings| settings.log.parse::<Targets>().ok());
    let filter = chosen.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    tracing_subscriber::registry().with(standard_error(default)).with(log.with_filter(filter)).init();
}

/// Starts logging to standard error alone: for a program that a person runs. To be called once in a process.
pub fn start_for_people(default: LevelFilter) {
    tracing_subscriber::registry().with(standard_error(default)).init();
}

fn standard_error<S>(default: LevelFilter) -> impl Layer<S>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    let chosen = std::env::var(LOG_VARIABLE).ok().and_then(|text| text.parse::<Targets>().ok());
    let filter = chosen.unwrap_or_else(|| Targets::new().with_default(default));
    tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false).with_filter(filter)
}
