//! Plugin.diagnostics: the datapaths of this host, for people.

use std::fmt::Write;

use plugin::attachment::Attachment;
use plugin::error::Result;
use plugin::host::Host;
use plugin::mirror::MirrorRecord;
use plugin::qemu::{find_program, storage_daemon};
use serde::Deserialize;

/// Nothing is asked.
#[derive(Debug, Deserialize)]
pub struct Parameters {}

/// Describes what there is, and what is wrong with it: this call does not fail for what it finds, and waits for
/// nobody.
///
/// # Errors
///
/// None.
pub fn execute(host: &Host, _: Parameters) -> Result<String> {
    let mut text = format!("xapi-storage-qcow2 {}\n", env!("CARGO_PKG_VERSION"));
    let daemon = storage_daemon(host).map(|daemon| format!("{} {}", daemon.path.display(), daemon.version));
    line(&mut text, "qemu-storage-daemon", daemon);
    line(&mut text, "qemu-img", find_program("qemu-img").map(|path| path.display().to_string()));
    match Attachment::volumes(host) {
        Ok(volumes) => {
            for volume in volumes {
                line(&mut text, &format!("volume {volume}"), Attachment::describe(host, volume));
            }
        }
        Err(error) => line(&mut text, "volumes", Err(error)),
    }
    match MirrorRecord::all(host) {
        Ok(mirrors) => {
            for mirror in mirrors {
                let mut state = format!("of volume {} to {}: {:?}", mirror.volume, mirror.remote, mirror.phase);
                if let Some(reason) = &mirror.reason {
                    let _ = write!(state, ", {reason}");
                }
                if let Some(plan) = &mirror.plan {
                    let _ = write!(state, "; {plan}; sent {} bytes", mirror.progress.sent);
                }
                line(&mut text, &format!("mirror {}", mirror.key), Ok(state));
            }
        }
        Err(error) => line(&mut text, "mirrors", Err(error)),
    }
    Ok(text)
}

/// Writes one line: a value, or why there is none.
fn line(text: &mut String, what: &str, value: Result<String>) {
    let value = value.unwrap_or_else(|error| format!("({})", error.chain()));
    // Writing to a string does not fail.
    let _ = writeln!(text, "{what}: {value}");
}
