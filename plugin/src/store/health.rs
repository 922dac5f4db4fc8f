//! An SR's health: whether its directory can be used, and what a person can do when it cannot.

use std::io;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use super::sr::Sr;
use crate::error::{Error, Result};
use crate::gc;
use crate::host::Host;
use crate::id::SrUuid;
use crate::smapi::{Health, SrStat};

/// Describes an attached SR, whatever has become of it. Of one that cannot be used the names are those it was attached
/// with, and there is no space.
///
/// xapi lists only a healthy SR, and asks again for a while when one is unreachable (xen-api
/// `ocaml/xapi-storage-script/main.ml`, SR.scan2).
///
/// # Errors
///
/// [`Error::SrNotAttached`], or what this host itself lacks.
pub fn stat(host: &Host, uuid: SrUuid) -> Result<SrStat> {
    let (name, description) = Sr::attached_names(host, uuid)?;
    let patience = host.settings()?.file_system();
    let asked = host.clone();
    let looked = within(patience, move || {
        let sr = Sr::attached(&asked, uuid)?;
        sr.has_directories()?;
        let mut stat = sr.describe()?;
        if let Health::Healthy(remark) = &mut stat.health
            && let Some(left) = space_left(&asked, &sr)
        {
            *remark = if remark.is_empty() { left } else { format!("{remark}; {left}") };
        }
        Ok(stat)
    });
    let looked = looked.and_then(|stat| {
        let asked = host.clone();
        // A list of volumes would fail for it. Where that takes too long, the list says so itself.
        match within(patience, move || Sr::attached(&asked, uuid)?.has_readable_trees()) {
            Ok(()) | Err(Error::Timeout { .. }) => Ok(stat),
            Err(error) => Err(error),
        }
    });
    match looked {
        Err(error @ Error::SrNotAttached(_)) => Err(error),
        Err(error) => Ok(SrStat {
            sr: uuid.to_string(),
            name,
            uuid: uuid.to_string(),
            description,
            free_space: 0,
            total_space: 0,
            datasources: Vec::new(),
            clustered: false,
            health: health_of(&error),
        }),
        Ok(stat) => Ok(stat),
    }
}

/// Says what space is being brought back, or cannot be, and why.
fn space_left(host: &Host, sr: &Sr) -> Option<String> {
    let state = gc::State::load(host, sr.record.uuid).ok()??;
    if let Some(doing) = state.merging(host) {
        return Some(format!("space of deleted volumes is being brought back: {doing}"));
    }
    let undone = state.still_undone(sr);
    let first = undone.first()?;
    let more = match undone.len() - 1 {
        0 => String::new(),
        more => format!(" (and {more} more)"),
    };
    Some(format!("space of deleted volumes is not brought back: {}{more}", first.reason))
}

/// Does something that the kernel may never come back from, such as asking a file system whose server is gone. What has
/// taken too long is left to itself.
fn within<T: Send + 'static>(patience: Duration, ask: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (answer, answered) = mpsc::channel();
    thread::spawn(move || answer.send(ask()));
    answered.recv_timeout(patience).unwrap_or_else(|_| {
        Err(Error::Timeout { doing: "asking the SR's file system".to_owned(), seconds: patience.as_secs() })
    })
}

/// Says how an SR is on which a look at its files failed.
fn health_of(error: &Error) -> Health {
    let text = error.chain();
    match error {
        Error::Timeout { .. } => Health::Unreachable(format!("{text}: see whether its server or disk answers")),
        Error::Io { source, .. } => match Errno::from_io_error(source) {
            Some(
                Errno::TIMEDOUT
                | Errno::HOSTDOWN
                | Errno::HOSTUNREACH
                | Errno::NETDOWN
                | Errno::NETUNREACH
                | Errno::NOTCONN
                | Errno::CONNREFUSED
                | Errno::CONNRESET,
            ) => Health::Unreachable(format!("{text}: see whether its server can be reached")),
            Some(Errno::AGAIN | Errno::BUSY | Errno::INTR) => {
                Health::Recovering(format!("{text}: the file system is busy with itself, scan again in a moment"))
            }
            Some(Errno::STALE) => Health::Unavailable(format!("{text}: mount the file system again")),
            _ if source.kind() == io::ErrorKind::PermissionDenied => {
                Health::Unavailable(format!("{text}: give root the right to it, or export it without squashing root"))
            }
            _ => Health::Unavailable(format!("{text}: see the kernel's log for the file system's errors")),
        },
        Error::SrUnavailable { .. } => {
            Health::Unavailable(format!("{}; if the SR is gone for good, unplug its PBD", error.told()))
        }
        _ => Health::Unavailable(error.told()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(errno: Errno) -> Health {
        health_of(&Error::io("reading /sr/sr.json", errno.into()))
    }

    #[test]
    fn a_server_that_cannot_be_reached_is_told_from_a_file_system_that_is_broken() {
        for errno in [Errno::TIMEDOUT, Errno::HOSTUNREACH, Errno::NOTCONN] {
            assert!(matches!(after(errno), Health::Unreachable(why) if why.contains("/sr/sr.json")), "{errno}");
        }
        assert!(matches!(after(Errno::BUSY), Health::Recovering(_)));
        assert!(matches!(after(Errno::STALE), Health::Unavailable(why) if why.contains("mount")));
        assert!(matches!(after(Errno::IO), Health::Unavailable(why) if why.contains("kernel's log")));
    }

    #[test]
    fn a_file_system_that_does_not_answer_is_unreachable_after_its_time() {
        let (end, ended) = mpsc::channel::<()>();
        let asked = within(Duration::from_millis(10), move || Ok(ended.recv().is_ok()));
        assert!(matches!(health_of(&asked.unwrap_err()), Health::Unreachable(why) if why.contains("asking")));
        drop(end);
    }
}
