//! What plugins left behind on a host.

use std::path::{Path, PathBuf};

use crate::processes::Process;

/// Processes, sockets and files of a host's plugins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// Process ids with their command lines.
    pub processes: Vec<(u32, String)>,
    /// Sockets that are bound below the host's runtime directory.
    pub sockets: Vec<String>,
    /// Files in the runtime directory. Not counted are the records of attached SRs, those of what was sent in which session
    /// of a destination, by which later mirrors are planned, what was found out of QEMU's programs, and the last failures,
    /// which people may ask for.
    pub files: Vec<PathBuf>,
}

impl Leftovers {
    /// The same without the records of mirrors that have ended: Data.stat answers from them until the volume is destroyed.
    #[must_use]
    pub fn without_ended_mirrors(mut self) -> Self {
        let is_record = |path: &PathBuf| {
            let of_mirror = path.parent().and_then(Path::parent).is_some_and(|mirrors| mirrors.ends_with("mirrors"));
            of_mirror && (path.ends_with("state.json") || path.ends_with("supervisor.log"))
        };
        self.files.retain(|path| !is_record(path));
        self
    }

    /// Whether there is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.processes.is_empty() && self.sockets.is_empty() && self.files.is_empty()
    }
}

/// Whether a file is one that any call may leave: what was found out of QEMU's programs, and the last failures.
pub(crate) fn outlasts_calls(runtime: &Path, file: &Path) -> bool {
    ["programs.json", "failures", "failures.old"].iter().any(|name| file == runtime.join(name))
}

pub(super) fn look(root: &Path, runtime: &Path) -> Leftovers {
    let mut files = Vec::new();
    collect_files(runtime, &runtime.join("srs"), &mut files);
    files
        .retain(|path| path.parent() != Some(&runtime.join("sessions")) || path.extension() != Some("json".as_ref()));
    files.retain(|path| !outlasts_calls(runtime, path));
    files.sort();
    let processes =
        Process::of(root).iter().map(|process| (process.pid.cast_unsigned(), process.command())).collect();
    Leftovers { processes, sockets: sockets(runtime), files }
}

fn sockets(runtime: &Path) -> Vec<String> {
    let prefix = format!("{}/", runtime.to_string_lossy());
    let Ok(table) = std::fs::read_to_string("/proc/net/unix") else { return Vec::new() };
    let mut bound: Vec<String> = table
        .lines()
        .filter_map(|line| line.split_whitespace().nth(7))
        .filter(|path| path.starts_with(&prefix))
        .map(str::to_owned)
        .collect();
    bound.sort();
    bound.dedup();
    bound
}

fn collect_files(dir: &Path, except: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if path == except {
            continue;
        }
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            collect_files(&path, except, files);
        } else {
            files.push(path);
        }
    }
}
