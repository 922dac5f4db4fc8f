//! The descriptors that leak into every script, as the daemon's inotify and sockets do.

use std::collections::HashSet;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::OnceLock;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::inotify;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pipe::{PipeFlags, pipe_with};

/// Open for as long as the program runs; none is closed by exec.
static STRAY: OnceLock<Vec<OwnedFd>> = OnceLock::new();

/// Opens the stray descriptors, once.
pub(super) fn keep_open() {
    STRAY.get_or_init(|| {
        let mut fds = Vec::new();
        fds.extend(inotify::init(inotify::CreateFlags::empty()));
        fds.extend(eventfd(0, EventfdFlags::empty()));
        if let Ok((a, b)) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::empty(), None) {
            fds.extend([a, b]);
        }
        if let Ok((a, b)) = pipe_with(PipeFlags::empty()) {
            fds.extend([a, b]);
        }
        fds
    });
}

/// The stray descriptors that a process still holds: those of the sockets and the pipe, which can be told
/// from the process's own.
#[must_use]
pub fn stray_descriptors(pid: u32) -> Vec<RawFd> {
    let own = Path::new("/proc/self/fd");
    let stray: HashSet<_> = STRAY
        .get()
        .into_iter()
        .flatten()
        .filter_map(|fd| std::fs::read_link(own.join(fd.as_raw_fd().to_string())).ok())
        // Every eventfd and inotify has the same name, whosever it is.
        .filter(|to| ["socket:[", "pipe:["].iter().any(|kind| to.to_string_lossy().starts_with(kind)))
        .collect();
    let Ok(fds) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        return Vec::new();
    };
    fds.flatten()
        .filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| stray.contains(&to)))
        .filter_map(|fd| fd.file_name().to_string_lossy().parse().ok())
        .collect()
}
