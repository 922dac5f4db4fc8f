//! Waiting for the plugin's garbage collection: a judge reads images without the plugin's locks, and one may go meanwhile.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::Deserialize;

use crate::processes::Process;

/// How long a collection may take; it is waited for no longer than it lasts.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often it is looked for.
const LOOK: Duration = Duration::from_millis(5);

#[derive(Deserialize)]
struct Record {
    uuid: String,
}

/// Waits until nobody collects garbage in an SR on this machine. Calls start collections before they answer, so that
/// none begins later while no call is made.
pub(super) fn wait(sr: &Path) -> Result<()> {
    let record = std::fs::read(sr.join("sr.json")).ok().and_then(|json| serde_json::from_slice::<Record>(&json).ok());
    let Some(Record { uuid }) = record else { return Ok(()) };
    let until = Instant::now() + PATIENCE;
    while is_at_work(&uuid) {
        ensure!(Instant::now() < until, "the garbage collection in {} does not end", sr.display());
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// Tells whether a process is told to collect garbage in an SR.
fn is_at_work(uuid: &str) -> bool {
    Process::all().any(|process| {
        let words: Vec<&[u8]> = process.words().collect();
        words.windows(2).any(|pair| pair == [b"gc".as_slice(), uuid.as_bytes()])
    })
}
