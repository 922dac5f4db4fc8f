//! The plugins' processes on a host, found and killed one by one.

use fake_xapi::host::Host;
use fake_xapi::smapiv2::Vdi;
use rustix::process::{Pid, Signal, kill_process};

/// Kills the storage daemon of a volume; true if there was one.
pub fn kill_daemon(host: &Host, volume: &Vdi) -> bool {
    kill(host, |command| command.contains("qemu-storage-daemon") && command.contains(&volume.0))
}

/// Kills the supervisors of a host's mirrors; true if there was one.
pub fn kill_supervisors(host: &Host) -> bool {
    kill(host, |command| command.contains("mirror-supervisor"))
}

/// Kills whatever a host's plugins left running.
pub fn kill_all(host: &Host) {
    kill(host, |_| true);
}

fn kill(host: &Host, matches: impl Fn(&str) -> bool) -> bool {
    let mut killed = false;
    for (pid, _) in host.leftovers().processes.iter().filter(|(_, command)| matches(command)) {
        if let Some(pid) = Pid::from_raw(pid.cast_signed()) {
            killed |= kill_process(pid, Signal::KILL).is_ok();
        }
    }
    killed
}
