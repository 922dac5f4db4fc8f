//! What this host has sent in which session of a destination.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::record::now;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::id::{ContentId, MirrorKey, NodeId};
use crate::lock::FileLock;
use crate::record::{self, Durability, Record};

/// How long the record of a session is kept. A migration that takes longer between two snapshots sends all of the
/// second.
const KEPT: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// The file whose lock is that of all records.
const LOCK: &str = "lock";

/// How the name of a record's file ends.
const SUFFIX: &str = ".json";

/// What is known of a session that this host has mirrored into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sent {
    /// A mirror began: the destination has something, nobody knows what.
    Begun,
    /// More than one mirror began. What the destination has then depends on which wrote last.
    Spoiled,
    /// One mirror began and sent everything, flushed: the destination's content was then exactly what this names.
    Complete(ContentId),
}

/// The record of a session, `<run>/sessions/<session>.json`. It is lost when the host boots, and so is then what could
/// have been sent as a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Session {
    format: u64,
    /// What was sent in it.
    pub sent: Sent,
    /// The mirror that began last.
    pub mirror: MirrorKey,
    /// The node that it sent.
    pub node: NodeId,
    /// The node's size in bytes.
    pub size: u64,
    /// When the record was written, in seconds since 1970.
    pub updated: u64,
}

impl Record for Session {
    const FORMAT: u64 = 1;
}

/// The records of this host's sessions, with their lock held: what is read stands until it is dropped.
#[derive(Debug)]
pub struct Sessions {
    directory: PathBuf,
    lock: FileLock,
}

impl Sessions {
    /// Locks the records.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] when another holds the lock for too long; else the directory cannot be made.
    pub fn lock(host: &Host) -> Result<Self> {
        let directory = host.runtime_dir().join("sessions");
        host.make_runtime_dir(&directory)?;
        let lock = FileLock::acquire(&directory.join(LOCK), host.settings()?.lock())?;
        Ok(Self { directory, lock })
    }

    /// Reads the record of a session; `None` when nothing is known of it.
    ///
    /// # Errors
    ///
    /// When it is there and cannot be read.
    pub fn find(&self, session: ContentId) -> Result<Option<Session>> {
        record::read_if_present(&self.path(session))
    }

    /// Records that a mirror of a node is about to write in a session; to be called before it does. Forgets sessions
    /// of long ago.
    ///
    /// # Errors
    ///
    /// When it cannot be recorded: nothing may then be written in that session.
    pub fn begin(&self, session: ContentId, mirror: MirrorKey, node: NodeId, size: u64) -> Result<()> {
        self.forget_old();
        let path = self.path(session);
        // One that cannot be read was written by something that began.
        let sent = if path.exists() { Sent::Spoiled } else { Sent::Begun };
        let record = Session { format: Session::FORMAT, sent, mirror, node, size, updated: now() };
        record::write(&path, &record, Durability::UntilReboot)
    }

    /// Records that a mirror has sent all of `content`, flushed, in a session that it had for itself; where another
    /// mirror began too nothing changes.
    ///
    /// # Errors
    ///
    /// When it cannot be recorded; what was sent is then unknown.
    pub fn complete(&self, session: ContentId, mirror: MirrorKey, content: ContentId) -> Result<()> {
        match self.find(session)? {
            Some(found) if found.sent == Sent::Begun && found.mirror == mirror => {
                let record = Session { sent: Sent::Complete(content), updated: now(), ..found };
                record::write(&self.path(session), &record, Durability::UntilReboot)
            }
            _ => Ok(()),
        }
    }

    fn path(&self, session: ContentId) -> PathBuf {
        self.directory.join(format!("{session}{SUFFIX}"))
    }

    /// Removes the records of sessions in which nothing was sent for long. One that stays is no harm.
    fn forget_old(&self) {
        let Ok(entries) = fs::read_dir(&self.directory) else { return };
        for entry in entries.flatten().filter(|entry| entry.file_name() != LOCK) {
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            let age = modified.ok().and_then(|modified| SystemTime::now().duration_since(modified).ok());
            if age.is_some_and(|age| age > KEPT)
                && let Err(error) = fs::remove_file(entry.path())
                && error.kind() != io::ErrorKind::NotFound
            {
                let error = Error::on("removing", &entry.path())(error);
                tracing::warn!(error = error.chain(), "an old session's record is left");
            }
        }
    }
}

impl Drop for Sessions {
    fn drop(&mut self) {
        // Still under the lock; who waits for it finds out and makes another.
        drop(fs::remove_file(self.lock.path()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 4096;

    fn with_sessions(test: impl FnOnce(&Host, &Sessions)) {
        let root = tempfile::tempdir().unwrap();
        let host = Host::at(root.path());
        test(&host, &Sessions::lock(&host).unwrap());
    }

    #[test]
    fn what_was_sent_is_known_once_its_mirror_is_complete() {
        with_sessions(|_, sessions| {
            let (session, content) = (ContentId::random(), ContentId::random());
            let (mirror, node) = (MirrorKey::random(), NodeId::random());
            assert_eq!(sessions.find(session).unwrap(), None);
            sessions.begin(session, mirror, node, SIZE).unwrap();
            let begun = sessions.find(session).unwrap().unwrap();
            assert_eq!((begun.sent, begun.node, begun.size), (Sent::Begun, node, SIZE));
            sessions.complete(session, mirror, content).unwrap();
            assert_eq!(sessions.find(session).unwrap().unwrap().sent, Sent::Complete(content));
        });
    }

    #[test]
    fn what_two_mirrors_sent_is_never_known() {
        let (session, content) = (ContentId::random(), ContentId::random());
        let (one, other) = (MirrorKey::random(), MirrorKey::random());
        for completed in [&[one][..], &[other], &[one, other]] {
            with_sessions(|_, sessions| {
                for mirror in [one, other] {
                    sessions.begin(session, mirror, NodeId::random(), SIZE).unwrap();
                }
                for mirror in completed {
                    sessions.complete(session, *mirror, content).unwrap();
                }
                assert_eq!(sessions.find(session).unwrap().unwrap().sent, Sent::Spoiled);
            });
        }
        with_sessions(|_, sessions| {
            sessions.begin(session, one, NodeId::random(), SIZE).unwrap();
            sessions.complete(session, one, content).unwrap();
            sessions.begin(session, other, NodeId::random(), SIZE).unwrap();
            assert_eq!(sessions.find(session).unwrap().unwrap().sent, Sent::Spoiled);
        });
    }

    #[test]
    fn a_record_that_cannot_be_read_is_an_error_and_spoils_its_session() {
        with_sessions(|_, sessions| {
            let session = ContentId::random();
            fs::write(sessions.path(session), "{").unwrap();
            assert!(sessions.find(session).is_err());
            sessions.begin(session, MirrorKey::random(), NodeId::random(), SIZE).unwrap();
            assert_eq!(sessions.find(session).unwrap().unwrap().sent, Sent::Spoiled);
        });
    }

    #[test]
    fn a_session_of_long_ago_is_forgotten() {
        with_sessions(|host, sessions| {
            let (old, new) = (ContentId::random(), ContentId::random());
            sessions.begin(old, MirrorKey::random(), NodeId::random(), SIZE).unwrap();
            let file = fs::File::options().write(true).open(sessions.path(old)).unwrap();
            file.set_modified(SystemTime::now() - KEPT - Duration::from_secs(1)).unwrap();
            sessions.begin(new, MirrorKey::random(), NodeId::random(), SIZE).unwrap();
            assert_eq!(sessions.find(old).unwrap(), None);
            assert!(sessions.find(new).unwrap().is_some());
            assert!(host.runtime_dir().join("sessions/lock").exists());
        });
    }
}
