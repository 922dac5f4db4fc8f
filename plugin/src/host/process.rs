//! Processes that outlive the call that started them, told apart from others that got the same number.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};
use std::{fs, io};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, getpid, getppid, kill_process, pidfd_open, pidfd_send_signal,
    set_parent_process_death_signal,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Host;
use crate::error::{Error, Result};

/// Has what a command starts killed when this process ends, however it ends.
pub fn end_with_this(command: &mut Command) -> &mut Command {
    let parent = getpid();
    let follow = move || -> io::Result<()> {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // Of a parent that has died by now no signal comes.
        if getppid() == Some(parent) { Ok(()) } else { Err(Errno::SRCH.into()) }
    };
    // SAFETY: the closure runs between fork and exec; it makes plain system calls, and neither allocates nor locks.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(follow)
    }
}

/// One process of one boot: a number alone may name another process by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// The process id.
    pub pid: i32,
    /// When it started, in clock ticks since boot (field 22 of `/proc/<pid>/stat`).
    pub start_time: u64,
    /// The boot it started in.
    pub boot_id: Uuid,
}

impl Process {
    /// Names a running process.
    ///
    /// # Errors
    ///
    /// When there is no such process.
    pub fn of_pid(host: &Host, pid: i32) -> Result<Self> {
        let start_time = start_time(pid).ok_or_else(|| Error::Internal(format!("process {pid} is gone")))?;
        Ok(Self { pid, start_time, boot_id: host.boot_id()? })
    }

    /// Names a child that was not waited for yet, which may have ended already.
    ///
    /// # Errors
    ///
    /// When /proc cannot be read.
    pub(super) fn of_child(host: &Host, pid: i32) -> Result<Self> {
        let (_, start_time) = state(pid).ok_or_else(|| Error::Internal(format!("process {pid} is gone")))?;
        Ok(Self { pid, start_time, boot_id: host.boot_id()? })
    }

    /// Names the process that calls.
    ///
    /// # Errors
    ///
    /// When /proc cannot be read.
    pub fn current(host: &Host) -> Result<Self> {
        Self::of_pid(host, rustix::process::getpid().as_raw_nonzero().get())
    }

    /// Tells whether the process runs. A zombie does not: it holds nothing open any more.
    pub fn is_alive(&self, host: &Host) -> bool {
        host.boot_id().is_ok_and(|boot| boot == self.boot_id) && start_time(self.pid) == Some(self.start_time)
    }

    /// Opens a descriptor of the process, which becomes readable when it ends; `None` when it has ended.
    pub fn open(&self, host: &Host) -> Option<OwnedFd> {
        let descriptor = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        // Checked after the opening: from here on the number cannot be another's.
        self.is_alive(host).then_some(descriptor)
    }

    /// Waits for the end of the process, up to `patience`, and tells whether it came.
    pub fn wait(&self, host: &Host, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let Some(descriptor) = self.open(host) else { return self.wait_by_looking(host, deadline) };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            match poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return !self.is_alive(host),
            }
        }
    }

    /// Waits as [`Self::wait`] does, where the kernel (before 5.3) has no descriptors of processes.
    fn wait_by_looking(&self, host: &Host, deadline: Instant) -> bool {
        while self.is_alive(host) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    /// Sends a signal to the process; one that has ended is no error.
    pub fn signal(&self, host: &Host, signal: Signal) {
        // An error means that it ended meanwhile.
        match self.open(host) {
            Some(descriptor) => drop(pidfd_send_signal(&descriptor, signal)),
            None if self.is_alive(host) => drop(Pid::from_raw(self.pid).map(|pid| kill_process(pid, signal))),
            None => {}
        }
    }

    /// Kills the process and waits for its end, up to `patience`; one that has ended is no error.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] when it does not end, which a process does that hangs in the kernel.
    pub fn kill(&self, host: &Host, patience: Duration) -> Result<()> {
        self.signal(host, Signal::KILL);
        if self.wait(host, patience) {
            return Ok(());
        }
        Err(Error::Timeout { doing: format!("killing process {}", self.pid), seconds: patience.as_secs() })
    }
}

/// Reads when a process started; `None` when there is none, or only its zombie.
fn start_time(pid: i32) -> Option<u64> {
    state(pid).filter(|(is_zombie, _)| !is_zombie).map(|(_, start_time)| start_time)
}

/// Reads whether a process is a zombie, and when it started.
fn state(pid: i32) -> Option<(bool, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, which may itself hold spaces and parentheses.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    let start_time = fields.nth(18)?.parse().ok()?;
    // The first thread of a killed process can be a zombie while another still finishes a write in the kernel.
    let is_zombie = matches!(state, "Z" | "X") && !has_other_threads(pid);
    Some((is_zombie, start_time))
}

/// Tells whether a process has threads beside its first.
fn has_other_threads(pid: i32) -> bool {
    fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|threads| threads.count() > 1)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_is_known_by_more_than_its_number() {
        let host = Host::at("/");
        let me = Process::current(&host).unwrap();
        assert!(me.is_alive(&host));
        assert!(!Process { start_time: me.start_time + 1, ..me }.is_alive(&host));
        assert!(!Process { boot_id: Uuid::nil(), ..me }.is_alive(&host));
    }

    #[test]
    fn a_killed_process_is_gone_and_killing_it_again_is_no_error() {
        let host = Host::at("/");
        let mut child = Command::new("/bin/sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        let process = Process::of_pid(&host, child.id() as i32).unwrap();
        assert!(!process.wait(&host, Duration::from_millis(1)));
        process.kill(&host, Duration::from_secs(30)).unwrap();
        assert!(!process.is_alive(&host));
        process.kill(&host, Duration::from_secs(30)).unwrap();
        child.wait().unwrap();
    }
}
