//! A link to a Unix socket that can be cut, stalled and slowed at a given byte.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// What is to become of the bytes.
#[derive(Default)]
struct Rules {
    cut_after: Option<u64>,
    stall_after: Option<u64>,
    bytes_per_second: Option<u64>,
    /// The byte on its way back that arrives wrong, and how many have passed.
    wrong: Option<u64>,
    back: u64,
    passed: u64,
    closed: bool,
    streams: Vec<UnixStream>,
}

/// A link, which passes on the connections to its socket to another.
pub struct Link {
    socket: PathBuf,
    rules: Arc<(Mutex<Rules>, Condvar)>,
}

impl Link {
    /// Listens at `socket`.
    pub fn start(socket: &Path, target: PathBuf) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let rules = Arc::new((Mutex::new(Rules::default()), Condvar::new()));
        let link = Self { socket: socket.to_owned(), rules: Arc::clone(&rules) };
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let near = near.unwrap();
                if rules.0.lock().unwrap().closed {
                    return;
                }
                let Ok(far) = UnixStream::connect(&target) else { continue };
                for (from, to, is_back) in [(&near, &far, false), (&far, &near, true)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    rules.0.lock().unwrap().streams.push(from.try_clone().unwrap());
                    let rules = Arc::clone(&rules);
                    std::thread::spawn(move || {
                        let _ = pass(&from, &to, &rules, is_back);
                        let _ = to.shutdown(Shutdown::Write);
                    });
                }
            }
        });
        link
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Cuts both directions once this many bytes have passed in either.
    pub fn cut_after(&self, bytes: u64) {
        self.rules.0.lock().unwrap().cut_after = Some(bytes);
    }

    /// Passes nothing on any more once this many bytes have passed in either direction, and stays connected.
    pub fn stall_after(&self, bytes: u64) {
        self.rules.0.lock().unwrap().stall_after = Some(bytes);
    }

    /// Turns over the bits of one byte of what the server says, counted from 0.
    #[allow(dead_code, reason = "not every test that has a link does this")]
    pub fn spoil(&self, byte: u64) {
        self.rules.0.lock().unwrap().wrong = Some(byte);
    }

    #[allow(dead_code, reason = "not every test that has a link does this")]
    pub fn stall(&self) {
        self.stall_after(0);
    }

    pub fn slow(&self, bytes_per_second: u64) {
        self.rules.0.lock().unwrap().bytes_per_second = Some(bytes_per_second);
    }

    /// Gives how many bytes have passed, both directions together.
    #[allow(dead_code, reason = "not every test that has a link counts")]
    pub fn passed(&self) -> u64 {
        self.rules.0.lock().unwrap().passed
    }

    pub fn cut(&self) {
        for stream in self.rules.0.lock().unwrap().streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.rules.0.lock().unwrap().closed = true;
        self.rules.1.notify_all();
        self.cut();
        let _ = UnixStream::connect(&self.socket);
    }
}

/// Passes one direction's bytes on as the rules say.
fn pass(
    mut from: &UnixStream,
    mut to: &UnixStream,
    rules: &(Mutex<Rules>, Condvar),
    is_back: bool,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let mut length = from.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        let mut held = rules.0.lock().unwrap();
        if let Some(limit) = held.cut_after {
            length = length.min(usize::try_from(limit.saturating_sub(held.passed)).unwrap());
        }
        if let Some(limit) = held.stall_after {
            length = length.min(usize::try_from(limit.saturating_sub(held.passed)).unwrap());
        }
        if is_back {
            let place = held.wrong.and_then(|byte| usize::try_from(byte.checked_sub(held.back)?).ok());
            if let Some(byte) = place.and_then(|place| buffer[..length].get_mut(place)) {
                *byte ^= 0xff;
            }
            held.back += length as u64;
        }
        held.passed += length as u64;
        let (cut, stall, speed) = (
            held.cut_after.is_some_and(|limit| held.passed >= limit),
            held.stall_after.is_some_and(|limit| held.passed >= limit),
            held.bytes_per_second,
        );
        drop(held);
        to.write_all(&buffer[..length])?;
        if cut {
            from.shutdown(Shutdown::Both)?;
            to.shutdown(Shutdown::Both)?;
            return Ok(());
        }
        if stall {
            let mut held = rules.0.lock().unwrap();
            while !held.closed {
                held = rules.1.wait(held).unwrap();
            }
            return Ok(());
        }
        if let Some(speed) = speed {
            std::thread::sleep(Duration::from_secs_f64(length as f64 / speed as f64));
        }
    }
}
