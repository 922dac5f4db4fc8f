//! The relay of an import: a process that writes to the volume's export for a client of another host.

use std::ffi::OsString;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Attachment;
use super::state::{Import, Use};
use crate::error::{Error, Result};
use crate::host::{Launch, this_program};
use crate::id::Domain;
use crate::qemu;

/// The file beside an import's socket that tells how it broke.
const BROKEN: &str = "import.broken";

/// How long a relay that was asked to end may take, before it is killed: it has to write its spans.
const GRACE: Duration = Duration::from_millis(500);

/// Asks a relay to end. It looks whether its socket is still in its place whenever somebody comes, so the socket gets
/// another name, by which somebody comes.
fn ask_to_end(socket: &Path) {
    let ended = socket.with_extension("end");
    // What cannot be asked is killed.
    if fs::rename(socket, &ended).is_ok() {
        drop(UnixStream::connect(&ended));
        let _ = fs::remove_file(ended);
    }
}

/// Notes that an import's client has lost writes, or may have: for the deactivation that ends it.
pub fn note_broken_import(directory: &Path, reason: &str) {
    let path = directory.join(BROKEN);
    // The first reason is the one that caused the others.
    if !path.exists()
        && let Err(error) = fs::write(&path, reason)
    {
        tracing::error!(%error, reason, "nobody will know that an import broke");
    }
}

/// Gives the path of the socket at which connections are passed to an import, in a volume's runtime directory.
pub fn import_socket(directory: &Path) -> PathBuf {
    directory.join("import.sock")
}

impl Attachment {
    /// Starts this executable with `arguments` as the relay of an import, unless one runs, and gives its socket, which
    /// takes connections when this returns.
    ///
    /// It belongs to the domain, or to another that writes where the domain does not: xapi does not name the one that
    /// it activated in every case (docs/xapi.md). It ends with that domain's activation, and never outlives it: a
    /// source that is slow to stop must not write to what a guest has started to use.
    ///
    /// # Errors
    ///
    /// [`Error::NotActive`] when no domain writes; else the relay does not start.
    pub fn import(&mut self, domain: &Domain, arguments: &[OsString]) -> Result<PathBuf> {
        self.ready()?;
        let writes = |domain: &Domain| self.state.domains.get(domain) == Some(&Use::ReadWrite);
        let owner = Some(domain).filter(|domain| writes(domain));
        let owner = owner.or_else(|| self.state.domains.keys().find(|domain| writes(domain)));
        let Some(owner) = owner.filter(|_| self.state.open.is_some()).cloned() else {
            return Err(Error::NotActive { volume: self.export_name() });
        };
        let socket = import_socket(&self.directory);
        if self.state.import.as_ref().is_some_and(|import| import.relay.is_alive(&self.host)) && socket.exists() {
            return Ok(socket);
        }
        self.end_import(|_| true)?;
        // Its client is not one that reads what is said.
        qemu::block_on(self.join_session())?;
        let program = this_program()?;
        let unit = format!("xapi-storage-qcow2-import@{}", self.state.volume);
        let log = self.directory.join("import.log");
        let launch = Launch { unit: &unit, program: &program, arguments, log: &log, observed: true };
        let relay = launch.start(&self.host)?;
        self.state.import = Some(Import { domain: owner, relay });
        self.save()?;
        let deadline = Instant::now() + self.settings.qmp();
        while !socket.exists() {
            if !relay.is_alive(&self.host) || Instant::now() >= deadline {
                self.end_import(|_| true)?;
                let said = fs::read_to_string(&log).unwrap_or_default();
                return Err(Error::Internal(format!("the relay of an import did not start: {}", said.trim())));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(socket)
    }

    /// Gives the domain that has an import.
    pub fn importer(&self) -> Option<&Domain> {
        self.state.import.as_ref().map(|import| &import.domain)
    }

    /// Gives how the import that this call ended was broken, once.
    pub fn take_import_failure(&mut self) -> Option<String> {
        self.import_failure.take()
    }

    /// Reads, once there is no import, how it was broken.
    pub(super) fn settle_import(&mut self) {
        let path = self.directory.join(BROKEN);
        if self.state.import.is_none()
            && let Ok(reason) = fs::read_to_string(&path)
        {
            let _ = fs::remove_file(path);
            self.import_failure = Some(reason);
        }
    }

    /// Ends the import of a domain that `ends` names. Its client is cut off; what it was told is written is.
    ///
    /// # Errors
    ///
    /// When the relay's process does not end.
    pub(super) fn end_import(&mut self, ends: impl FnOnce(&Domain) -> bool) -> Result<()> {
        // A relay that no record tells of, as its call was killed, ends by itself when its socket goes.
        let socket = import_socket(&self.directory);
        let Some(import) = &self.state.import else {
            let _ = fs::remove_file(socket);
            return Ok(());
        };
        if !ends(&import.domain) {
            return Ok(());
        }
        if import.relay.is_alive(&self.host) {
            ask_to_end(&socket);
            import.relay.wait(&self.host, GRACE);
        } else {
            note_broken_import(&self.directory, "its process was killed");
        }
        let _ = fs::remove_file(socket);
        import.relay.kill(&self.host, self.settings.qmp())?;
        self.state.import = None;
        self.save()
    }
}
