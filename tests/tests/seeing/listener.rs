//! A host's log: a real datagram socket, and all that came to it.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Listens until it is dropped.
pub struct Listener {
    heard: Arc<Mutex<Vec<Vec<u8>>>>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Takes the place of the host's syslog.
    pub fn syslog(root: &Path) -> Self {
        Self::at(&root.join("dev/log"))
    }

    /// Takes the place of the host's journal.
    pub fn journal(root: &Path) -> Self {
        Self::at(&root.join("run/systemd/journal/socket"))
    }

    fn at(path: &Path) -> Self {
        let socket = bind(path);
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let (heard, ended) = (Arc::<Mutex<Vec<Vec<u8>>>>::default(), Arc::<AtomicBool>::default());
        let (all, is_over) = (Arc::clone(&heard), Arc::clone(&ended));
        let thread = std::thread::spawn(move || {
            let mut bytes = vec![0; 1 << 16];
            while !is_over.load(Ordering::SeqCst) {
                if let Ok(length) = socket.recv(&mut bytes) {
                    all.lock().unwrap().push(bytes[..length].to_vec());
                }
            }
        });
        Self { heard, ended, thread: Some(thread) }
    }

    /// All that was heard so far, each as text.
    pub fn lines(&self) -> Vec<String> {
        self.heard.lock().unwrap().iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect()
    }

    /// Waits for a line, and gives it: what was sent is heard a moment later.
    pub fn wait_for(&self, what: &str, is_wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(line) = self.lines().into_iter().find(|line| is_wanted(line)) {
                return line;
            }
            assert!(Instant::now() < deadline, "{what} is not logged, but {:#?}", self.lines());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// Binds a socket where a log listens.
pub fn bind(path: &Path) -> UnixDatagram {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    UnixDatagram::bind(path).unwrap()
}
