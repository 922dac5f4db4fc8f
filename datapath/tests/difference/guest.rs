//! A client that is connected to an export and stays.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use plugin::id::VolumeKey;

use super::site::Site;

/// The client; it is cut off when dropped.
pub struct Guest {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Guest {
    pub fn connect(site: &Site, volume: VolumeKey) -> Self {
        let uri = format!("nbd+unix:///{volume}?socket={}", site.socket(volume).display());
        let mut child = Command::new("qemu-io")
            .args(["-f", "raw", &uri])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        let mut guest = Self { child, said };
        guest.command("read 0 512");
        guest
    }

    /// Runs a command; one that was cut off does nothing.
    pub fn command(&mut self, text: &str) {
        let _ = writeln!(self.child.stdin.as_mut().unwrap(), "{text}");
        let mut line = String::new();
        // The last line of what a command says is its speed, or why it failed.
        while self.said.read_line(&mut line).is_ok_and(|length| length > 0)
            && !line.contains("ops;")
            && !line.contains("failed")
        {
            line.clear();
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
