//! The plugins' processes on a host, found and killed one by one.

use fake_xapi::host::Host;
use fake_xapi::smapiv2::Vdi;

/// Gives the storage daemons of a volume.
pub fn daemons(host: &Host, volume: &Vdi) -> Vec<u32> {
    let is_one = |command: &str| command.contains("qemu-storage-daemon") && command.contains(&volume.0);
    host.leftovers().processes.into_iter().filter(|(_, command)| is_one(command)).map(|(pid, _)| pid).collect()
}

/// Kills the storage daemon of a volume; true if there was one.
pub fn kill_daemon(host: &Host, volume: &Vdi) -> bool {
    host.kill_daemon(&volume.0) > 0
}

/// Kills the supervisors of a host's mirrors; true if there was one.
pub fn kill_supervisors(host: &Host) -> bool {
    host.kill(|command| command.contains("mirror-supervisor")) > 0
}

/// Kills whatever a host's plugins left running.
pub fn kill_all(host: &Host) {
    host.kill(|_| true);
}
