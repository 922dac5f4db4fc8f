//! The processes of this machine, as /proc tells of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

/// A process that was there when it was looked for. By now it may have ended.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// Its arguments, each with a zero byte behind it. The kernel's own processes have none, nor have those that have ended
    /// and were not waited for.
    pub arguments: Vec<u8>,
}

impl Process {
    /// Gives all processes but this one.
    pub fn all() -> impl Iterator<Item = Self> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let others = pids.filter(|pid| pid.cast_unsigned() != std::process::id());
        others.filter_map(|pid| Some(Self { pid, arguments: fs::read(format!("/proc/{pid}/cmdline")).ok()? }))
    }

    /// Finds those that name a directory.
    #[must_use]
    pub fn of(directory: &Path) -> Vec<Self> {
        Self::all().filter(|process| process.is_of(directory)).collect()
    }

    /// Kills all that name a directory, as [`Process::of`] finds them, until there are none.
    pub fn end_all(directory: &Path) {
        loop {
            let all = Self::of(directory);
            if all.is_empty() {
                return;
            }
            all.iter().for_each(Self::kill);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Tells whether it names a directory, or something in it, in its arguments or its environment.
    #[must_use]
    pub fn is_of(&self, directory: &Path) -> bool {
        // Not a directory whose name begins alike.
        let names = ["/", "\0"].map(|end| format!("{}{end}", directory.display()));
        let is_named = |bytes: &[u8]| names.iter().any(|name| contains(bytes, name));
        is_named(&self.arguments) || is_named(&self.environment())
    }

    /// Tells whether its arguments have some text in them, which may go over several, with zero bytes between.
    #[must_use]
    pub fn is_told(&self, text: &str) -> bool {
        contains(&self.arguments, text)
    }

    /// Gives its arguments, one by one.
    pub fn words(&self) -> impl Iterator<Item = &[u8]> {
        self.arguments.split(|byte| *byte == 0)
    }

    /// Gives its command line as it is told to people.
    #[must_use]
    pub fn command(&self) -> String {
        String::from_utf8_lossy(&self.arguments).replace('\0', " ").trim_end().to_owned()
    }

    /// Gives its environment, each variable with a zero byte behind it; nothing when it has ended.
    #[must_use]
    pub fn environment(&self) -> Vec<u8> {
        fs::read(format!("/proc/{}/environ", self.pid)).unwrap_or_default()
    }

    /// Gives what its descriptors are open on, as the kernel names it; nothing when it has ended.
    pub fn opened(&self) -> impl Iterator<Item = PathBuf> {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", self.pid)).into_iter().flatten().flatten();
        descriptors.filter_map(|descriptor| fs::read_link(descriptor.path()).ok())
    }

    /// Gives the number of its parent, unless it has ended.
    #[must_use]
    pub fn parent(&self) -> Option<i32> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        // Its name, in brackets, may hold anything.
        stat.rsplit(") ").next()?.split(' ').nth(1)?.parse().ok()
    }

    /// Kills it, unless it has ended.
    pub fn kill(&self) {
        let _ = Pid::from_raw(self.pid).map(|pid| kill_process(pid, Signal::KILL));
    }
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}
