//! The import of a volume from SMAPIv1: a process that takes connections over and relays them to the volume's export.
//!
//! ```text
//!   tapdisk ──network──► xapi ──descriptor──► import.sock ──► relay ──► nbd.sock ──► storage daemon
//! ```
//!
//! xapi accepts the source's connection and passes it on as a descriptor (xen-api `ocaml/xapi/storage_migrate.ml`,
//! nbd_handler). At its other end is the NBD client of tapdisk, which cannot be given to the storage daemon as it is
//! (blktap `drivers/block-nbd.c`): it asks for the export `tapdisk_client`, whatever the export is called, and when
//! tapdisk pauses it says goodbye and then wants to be greeted anew on the same connection.
//!
//! The process lives from Datapath.import_activate until its socket goes, which Datapath.deactivate removes; see
//! [`plugin::attachment`].

mod receive;
mod serve;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use plugin::attachment::{import_socket, note_broken_import};
use plugin::error::Result;
use plugin::host::Host;
use plugin::id::VolumeKey;
use plugin::qemu::daemon::Sockets;
use plugin::trace;

use crate::detached;

/// The argument by which this executable is the relay of an import; a volume's key follows.
pub const ENTRY: &str = "import-relay";

/// How often it is looked whether the socket is still there.
const TICK: Duration = Duration::from_millis(500);

/// Relays connections to the export of the volume `key` until the import ends. The exit status is for people.
pub fn main(host: &Host, key: &str) -> ExitCode {
    trace::begin(host);
    trace::name("import");
    let code = detached::run(host, "import", key, async |key| run(host, key).await.inspect_err(trace::fail));
    // By now nobody is served any more.
    trace::end();
    code
}

/// Takes descriptors and serves each in a task of its own.
async fn run(host: &Host, key: VolumeKey) -> Result<()> {
    trace::tag("qcow2.volume", key);
    let directory = host.volume_dir(key);
    let patience = Duration::from_secs(host.settings()?.handshake_seconds);
    let path = import_socket(&directory);
    let listener = receive::Listener::bind(&path)?;
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let control = accepted?;
                tokio::spawn(one(control, patience, directory.clone(), key));
            }
            () = tokio::time::sleep(TICK) => {}
        }
        if !listener.is_at(&path) {
            tracing::info!(volume = %key, "the import has ended");
            return Ok(());
        }
    }
}

/// Receives one connection and serves it to its end.
async fn one(control: receive::Control, patience: Duration, directory: PathBuf, key: VolumeKey) {
    let connection = match tokio::time::timeout(patience, control.connection()).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return tracing::warn!(error = error.chain(), "no connection was passed"),
        Err(_) => return tracing::warn!("nothing was passed in time"),
    };
    let (stream, datapath) = connection;
    tracing::info!(volume = %key, datapath, "importing");
    trace::note("a client has come");
    let _timed = trace::timed("client", "");
    match serve::serve(stream, &Sockets::of(&directory).nbd(), &key.to_string()).await {
        Ok(serve::Left::Idle) => {
            tracing::info!(volume = %key, datapath, "the importing client has gone");
            trace::note("a client has gone");
        }
        Ok(serve::Left::Abruptly) => {
            // A tapdisk says goodbye unless it has given its mirror up (blktap `drivers/block-nbd.c`, tdnbd_close).
            tracing::warn!(volume = %key, datapath, "the importing client has gone without a goodbye");
            trace::note("a client has gone without a goodbye");
            note_broken_import(&directory, "its client has gone without a goodbye");
        }
        Err(error) => {
            tracing::warn!(volume = %key, datapath, error = error.chain(), "an import was cut off");
            trace::fail(&error);
            note_broken_import(&directory, &error.chain());
        }
    }
}
