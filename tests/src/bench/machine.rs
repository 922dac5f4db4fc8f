//! The facts of the machine that figures depend on.

use std::path::Path;
use std::process::Command;

use serde::Serialize;

/// What a run was made on.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// The processor, as it calls itself.
    pub cpu: String,
    /// How many of it this process may use.
    pub cpus: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// The kernel's release.
    pub kernel: String,
    /// The distribution.
    pub system: String,
    /// What qemu-img says that it is.
    pub qemu_img: String,
    /// What qemu-storage-daemon says that it is.
    pub qemu_storage_daemon: String,
    /// Where the SRs are.
    pub place: String,
    /// The type of its file system, and what that is mounted from.
    pub file_system: String,
    /// Whether this program, and so most likely the plugins beside it, was built with optimisation.
    pub optimised: bool,
    /// The load averages when the run began.
    pub load: String,
}

impl Machine {
    /// Looks; what cannot be found out is an empty text.
    #[must_use]
    pub fn look(place: &Path) -> Self {
        let cpuinfo = read("/proc/cpuinfo");
        let cpu = value(&cpuinfo, "model name", ':').or_else(|| value(&cpuinfo, "CPU part", ':'));
        let memory = value(&read("/proc/meminfo"), "MemTotal", ':');
        let memory = memory.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
        let system = value(&read("/etc/os-release"), "PRETTY_NAME", '=').unwrap_or_default();
        Self {
            cpu: cpu.unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory: memory.unwrap_or_default() * 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            system: system.trim_matches('"').to_owned(),
            qemu_img: version("qemu-img"),
            qemu_storage_daemon: version("qemu-storage-daemon"),
            place: place.display().to_string(),
            file_system: file_system(place).map_or_else(String::new, |(kind, from)| format!("{kind} on {from}")),
            optimised: !cfg!(debug_assertions),
            load: read("/proc/loadavg").split_whitespace().take(3).collect::<Vec<_>>().join(" "),
        }
    }
}

/// The type of the file system that a path is on, and what it is mounted from.
#[must_use]
pub fn file_system(path: &Path) -> Option<(String, String)> {
    let path = path.canonicalize().ok()?;
    let mounts = read("/proc/self/mounts");
    let mut best: Option<(usize, String, String)> = None;
    for line in mounts.lines() {
        let mut fields = line.split(' ');
        let (Some(from), Some(at), Some(kind)) = (fields.next(), fields.next(), fields.next()) else { continue };
        // Of two on the same directory the later one is seen.
        if path.starts_with(at) && best.as_ref().is_none_or(|(length, ..)| at.len() >= *length) {
            best = Some((at.len(), kind.to_owned(), from.to_owned()));
        }
    }
    best.map(|(_, kind, from)| (kind, from))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn value(text: &str, name: &str, separator: char) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(separator)?.1.trim().to_owned())
}

fn version(program: &str) -> String {
    let output = Command::new(program).arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}
