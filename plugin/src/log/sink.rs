//! The socket to the host's log: datagrams that are taken at once or lost.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use super::layer::Entry;
use super::{journal, syslog};
use crate::host::Host;

/// Where the journal takes entries, from the host's root on.
const JOURNAL: &str = "run/systemd/journal/socket";

/// Where syslog takes lines.
const SYSLOG: &str = "dev/log";

/// The host's log.
pub(super) struct Sink {
    journal: PathBuf,
    syslog: PathBuf,
    /// Made when there is something to say; none where there is no descriptor left.
    socket: OnceLock<Option<UnixDatagram>>,
    /// Entries that were not taken since the last one that was.
    lost: AtomicU64,
}

impl Sink {
    pub fn new(host: &Host) -> Self {
        let (journal, syslog) = (host.root().join(JOURNAL), host.root().join(SYSLOG));
        Self { journal, syslog, socket: OnceLock::new(), lost: AtomicU64::new(0) }
    }

    /// Tells whether somebody listens.
    pub fn is_there(&self) -> bool {
        self.journal.exists() || self.syslog.exists()
    }

    /// Sends an entry to the journal or, where none listens, to syslog. It is lost where it cannot be sent at once.
    pub fn send(&self, mut entry: Entry<'_>) {
        let (has_journal, has_syslog) = (self.journal.exists(), self.syslog.exists());
        if !has_journal && !has_syslog {
            return;
        }
        let Some(socket) = self.socket.get_or_init(|| socket().ok()) else { return };
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            entry.fields.push(("lost", lost.to_string()));
        }
        let to_syslog = || socket.send_to(syslog::line(&entry, SystemTime::now()).as_bytes(), &self.syslog);
        let to_journal = || socket.send_to(&journal::encode(&entry), &self.journal);
        let sent = match if has_journal { to_journal() } else { to_syslog() } {
            // Full, it would be no use to go round it: /dev/log is the journal's too where there is one.
            Err(error) if has_journal && error.kind() != io::ErrorKind::WouldBlock => to_syslog(),
            sent => sent,
        };
        if let Err(error) = sent {
            // Where nobody listens nothing is lost.
            let is_absent = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
            self.lost.fetch_add(lost + u64::from(!is_absent), Ordering::Relaxed);
        }
    }
}

/// Makes a socket that never waits.
fn socket() -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tracing::Level;

    use super::*;

    fn say(sink: &Sink, message: &str) {
        sink.send(Entry { level: Level::INFO, module: "m", message: message.to_owned(), fields: Vec::new() });
    }

    fn heard(socket: &UnixDatagram) -> String {
        let mut bytes = [0; 8192];
        let length = socket.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }

    #[test]
    fn the_journal_is_told_where_it_listens_and_else_syslog() {
        let root = tempfile::tempdir().unwrap();
        let sink = Sink::new(&Host::at(root.path()));
        say(&sink, "to nobody");
        fs::create_dir_all(root.path().join("dev")).unwrap();
        fs::create_dir_all(root.path().join("run/systemd/journal")).unwrap();
        let syslog = UnixDatagram::bind(root.path().join(SYSLOG)).unwrap();
        say(&sink, "one");
        let line = heard(&syslog);
        assert!(line.ends_with("]: one"), "{line}");
        let journal = UnixDatagram::bind(root.path().join(JOURNAL)).unwrap();
        say(&sink, "two");
        assert!(heard(&journal).starts_with("MESSAGE=two\n"));
        drop(journal);
        say(&sink, "three");
        assert!(heard(&syslog).ends_with("]: three"));
    }

    #[test]
    fn a_log_that_takes_nothing_is_not_waited_for_and_is_told_what_it_missed() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("dev")).unwrap();
        let syslog = UnixDatagram::bind(root.path().join(SYSLOG)).unwrap();
        let sink = Sink::new(&Host::at(root.path()));
        // More than any queue of a socket holds.
        for _ in 0..2000 {
            say(&sink, "filling");
        }
        syslog.set_nonblocking(true).unwrap();
        let mut bytes = [0; 8192];
        let mut taken = 0;
        while syslog.recv(&mut bytes).is_ok() {
            taken += 1;
        }
        say(&sink, "again");
        let line = heard(&syslog);
        assert!(line.ends_with(&format!("again lost={}", 2000 - taken)), "{line}");
    }
}
