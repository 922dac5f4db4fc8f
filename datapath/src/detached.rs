//! Processes that go on after the call that started them.

use std::process::ExitCode;
use std::str::FromStr;

use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::log::{self, LevelFilter};

/// Does the work of a process of its own, `what` for the thing whose key is given. How it ends is for the log and the exit
/// status, which are for people.
pub fn run<K: FromStr<Err = Error>>(
    host: &Host,
    what: &str,
    key: &str,
    work: impl AsyncFnOnce(K) -> Result<()>,
) -> ExitCode {
    log::start(host, LevelFilter::INFO);
    let outcome = key.parse().and_then(|parsed| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Error::io("starting the runtime", error))?;
        runtime.block_on(work(parsed))
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(key, error = error.chain(), "the {what} failed");
            ExitCode::FAILURE
        }
    }
}
