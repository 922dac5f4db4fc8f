//! The block device of a volume that is open, and how it comes and goes.
//!
//! ```text
//!   opened:  marker file ─► server started ─► recorded ─► its file shown ─► loop device ─► symlink
//!                                                      └► nbd device connected ────────────┘
//!   ended:   symlink ─► written back ─► loop device cleared ─► server killed ─► marker file, record
//!                                └────► nbd device disconnected ─┘ by it
//! ```
//!
//! The marker file is there as long as anything else may be, so a killed call is followed by one that knows. The
//! symlink goes first, so that it never names a device that is another's by then; a loop device whose server has died
//! stays bound, and gives errors, until a call clears it.
//!
//! Its server is an NBD client of the daemon, and counts as one.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use super::state::Device;
use super::{Attachment, Use};
use crate::device::{self, Cleared, Driver, Loop, Mark, Shown};
use crate::error::{Error, Result};
use crate::host::{Host, Process, Settings};
use crate::id::{Domain, VolumeKey};
use crate::store::Mode;

impl Attachment {
    /// Gives an active domain the volume's block device, and makes that if it is not there. It is there, under a path
    /// that never changes ([`device::path`]), until the last such domain is deactivated.
    ///
    /// # Errors
    ///
    /// [`Error::NotActive`]; [`Error::VolumeInUse`] when somebody has the device open that may only read it, and the
    /// domain writes; else it cannot be made, and nothing of it is left.
    pub fn open_device(&mut self, domain: &Domain) -> Result<()> {
        let Some(mode) = self.state.domains.get(domain).and_then(|usage| usage.mode()) else {
            return Err(Error::NotActive { volume: self.export_name() });
        };
        let mut domains = self.state.device.as_ref().map_or_else(BTreeSet::new, |device| device.domains.clone());
        if self.device_works() {
            let device = self.state.device.as_mut().filter(|device| device.mode >= mode);
            match device.map(|device| device.domains.insert(domain.clone())) {
                Some(false) => return Ok(()),
                Some(true) => return self.save(),
                None => {}
            }
            if !self.release_device()? {
                let reason = "its block device is open, and can only be read".to_owned();
                return Err(Error::VolumeInUse { volume: self.export_name(), reason });
            }
        }
        self.end_device(false)?;
        domains.retain(|other| self.state.domains.get(other).is_some_and(|usage| usage.is_active()));
        domains.insert(domain.clone());
        let writes = |domain: &Domain| self.state.domains.get(domain) == Some(&Use::ReadWrite);
        let mode = if domains.iter().any(writes) { Mode::ReadWrite } else { Mode::ReadOnly };
        let mut drivers = Driver::choices(&self.settings).iter().copied().peekable();
        loop {
            let Some(driver) = drivers.next() else {
                return Err(Error::Internal("there is nothing to make a block device with".to_owned()));
            };
            let made = self.make_device(driver, mode, domains.clone());
            let Err(error) = made.map_err(|error| error.undone(self.end_device(false))) else { return Ok(()) };
            if drivers.peek().is_none() {
                return Err(error);
            }
            tracing::warn!(?driver, error = error.chain(), "a block device is made in another way");
        }
    }

    fn make_device(&mut self, driver: Driver, mode: Mode, domains: BTreeSet<Domain>) -> Result<()> {
        let (host, directory, patience) = (&self.host, &self.directory, self.settings.qmp());
        let server = device::start(host, directory, self.state.volume, driver)?;
        self.state.device = Some(Device { server, number: None, mode, domains });
        self.save()?;
        let writable = mode == Mode::ReadWrite;
        let shown = match driver {
            Driver::Nbd => Shown::Nbd(device::wait_for_connection(host, directory, &server, patience)?),
            Driver::Loop => {
                let file = device::wait_for_file(host, directory, &server, writable, patience)?;
                Shown::Loop(Loop::bind(&file, &self.mark()?, writable)?)
            }
        };
        if let (Some(device), Shown::Loop(number)) = (&mut self.state.device, shown) {
            device.number = Some(number);
        }
        let path = device::path(&self.host, self.state.volume);
        self.host.make_runtime_dir(path.parent().unwrap_or(&path))?;
        link(&path, &shown.path())?;
        self.save()
    }

    /// Gives the device, once there is one.
    pub(super) fn shown(&self) -> Option<Shown> {
        shown(&self.directory, self.state.device.as_ref()?)
    }

    /// Tells whether the device is there and its server runs.
    fn device_works(&self) -> bool {
        let Some(device) = &self.state.device else { return false };
        let path = device::path(&self.host, self.state.volume);
        self.shown().is_some_and(|shown| {
            fs::read_link(path).is_ok_and(|target| target == shown.path())
                && match shown {
                    Shown::Loop(number) => self.mark().is_ok_and(|mark| number.has(&mark)),
                    // Its server ends with the connection.
                    Shown::Nbd(_) => true,
                }
        }) && device::serves(&self.host, &self.directory, &device.server)
    }

    /// Passes on what the kernel holds back of what was written to the device of a domain, if no other domain has it. What
    /// was written to one whose server has died is lost, which whoever wrote was told.
    ///
    /// # Errors
    ///
    /// When that does not end: the device's server is killed then, once.
    pub fn write_device_back(&mut self, domain: &Domain) -> Result<()> {
        let device = self.state.device.as_ref().filter(|device| device.domains.iter().all(|other| other == domain));
        let Some(server) = device.map(|device| device.server) else { return Ok(()) };
        let Some((shown, process)) = self.shown_by(server) else { return Ok(()) };
        let doing = "writing a block device back";
        let server = Some(server).filter(|server| device::serves(&self.host, &self.directory, server));
        self.bounded(server, doing, move || shown.write_back())?;
        if process.is_alive(&self.host) {
            return Ok(());
        }
        Err(Error::Qemu { doing: doing.to_owned(), reason: "what serves it had to be killed, or died".to_owned() })
    }

    /// Gives the device if it works, and the process without which it would not: its server, or, of an nbd device that has
    /// none any more, the daemon.
    fn shown_by(&self, server: Process) -> Option<(Shown, Process)> {
        let shown = self.shown()?;
        if device::serves(&self.host, &self.directory, &server) {
            return Some((shown, server));
        }
        match shown {
            Shown::Loop(_) => None,
            Shown::Nbd(connection) if !connection.is_held().unwrap_or(false) => None,
            Shown::Nbd(_) => Some((shown, self.state.daemon?)),
        }
    }

    /// Takes the device away from a domain, and ends it with its last one.
    pub(super) fn leave_device(&mut self, domain: &Domain) -> Result<()> {
        let Some(device) = &mut self.state.device else { return Ok(()) };
        if !device.domains.remove(domain) {
            return Ok(());
        }
        if device.domains.is_empty() { self.end_device(true) } else { self.save() }
    }

    /// Ends the device, whoever has it open: they get errors from then on. Nothing is left then.
    ///
    /// # Errors
    ///
    /// When its server does not end, or the kernel does not let go.
    pub(super) fn end_device(&mut self, write_back: bool) -> Result<()> {
        if self.state.device.is_none() && !device::file(&self.directory).exists() {
            return Ok(());
        }
        let server = self.state.device.as_ref().map(|device| device.server);
        let shown = server.filter(|_| write_back).and_then(|server| self.shown_by(server));
        let server = server.filter(|server| device::serves(&self.host, &self.directory, server));
        if let Some((shown, _)) = shown {
            let written = self.bounded(server, "writing a block device back", move || shown.write_back());
            if let Err(error) = written {
                tracing::error!(error = error.chain(), "what was written to a block device may be lost");
            }
        }
        let server = server.filter(|server| device::serves(&self.host, &self.directory, server));
        let processes = Processes { server, daemon: self.state.daemon };
        remove(&self.host, &self.settings, &self.directory, self.state.volume, processes)?;
        if self.state.device.take().is_some() { self.save() } else { Ok(()) }
    }

    /// Ends the device before the chain is opened anew for a domain, which will make another, and tells whether there is
    /// none: others that have it, or somebody who has it open, keep it.
    pub(super) fn make_way(&mut self, domain: &Domain) -> Result<bool> {
        match &self.state.device {
            Some(device) if device.domains.iter().any(|other| other != domain) => Ok(false),
            Some(_) => self.release_device(),
            None => Ok(true),
        }
    }

    /// Ends the device if nobody has it open, and tells whether it did.
    fn release_device(&mut self) -> Result<bool> {
        let server = self.state.device.as_ref().map(|device| device.server);
        let number = match self.shown() {
            Some(Shown::Loop(number)) => number,
            // It cannot be taken back once it is disconnected.
            Some(Shown::Nbd(connection)) if connection.is_open() => return Ok(false),
            Some(Shown::Nbd(_)) => return self.end_device(true).map(|()| true),
            None => return self.end_device(false).map(|()| true),
        };
        let mark = self.mark()?;
        let clear = move || {
            Shown::Loop(number).write_back()?;
            number.clear(&mark).map(|cleared| (cleared, mark))
        };
        let (cleared, mark) = self.bounded(server, "clearing a block device", clear)?;
        if cleared == Cleared::Now {
            return self.end_device(false).map(|()| true);
        }
        number.keep(&mark).map(|()| false)
    }

    fn mark(&self) -> Result<Mark> {
        Mark::of(self.state.volume, &self.directory)
    }

    fn bounded<T: Send + 'static>(
        &self,
        server: Option<Process>,
        doing: &str,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let processes = Processes { server, daemon: self.state.daemon };
        bounded(&self.host, &self.settings, &self.directory, processes, doing, work)
    }
}

/// What is behind a device: its server, if it runs, and the volume's daemon.
#[derive(Clone, Copy)]
pub(super) struct Processes {
    pub server: Option<Process>,
    pub daemon: Option<Process>,
}

/// Gives a device that is recorded, once there is one.
pub(super) fn shown(directory: &Path, device: &Device) -> Option<Shown> {
    let connected = || device::kernel::connection(directory).ok().flatten().filter(|connection| connection.ready);
    device.number.map(Shown::Loop).or_else(|| connected().map(Shown::Nbd))
}

/// Removes what there is of a volume's device, by who holds the volume's lock: the one that is recorded, or what no
/// record tells of.
pub(super) fn remove(
    host: &Host,
    settings: &Settings,
    directory: &Path,
    volume: VolumeKey,
    processes: Processes,
) -> Result<()> {
    let file = device::file(directory);
    if !file.exists() {
        return Ok(());
    }
    unlink(&device::path(host, volume))?;
    let (mark, server) = (Mark::of(volume, directory)?, processes.server);
    let clear = {
        let file = file.clone();
        move || {
            for device in Loop::marked(&mark, &file)? {
                if device.clear(&mark)? == Cleared::Later {
                    tracing::warn!(device = %device.path().display(), "a block device is taken from under who has it open");
                }
            }
            Ok(())
        }
    };
    let doing = "clearing a block device";
    // One that no record tells of, as its call was killed, is not asked for anything.
    match server {
        Some(_) => bounded(host, settings, directory, processes, doing, clear)?,
        None => {
            device::kill_strays(host, directory, settings.qmp())?;
            clear()?;
        }
    }
    let (on, at, patience) = (host.clone(), directory.to_owned(), settings.qmp() / 4);
    let rest = move || device::remove_rest(&on, &at, server.as_ref(), patience);
    bounded(host, settings, directory, processes, doing, rest)
}

/// Does something that waits for the kernel, and the kernel perhaps for the server or the daemon: then one is killed, which
/// gives the kernel an answer.
fn bounded<T: Send + 'static>(
    host: &Host,
    settings: &Settings,
    directory: &Path,
    processes: Processes,
    doing: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || drop(sender.send(work())));
    let timed_out = |patience: Duration| Error::Timeout { doing: doing.to_owned(), seconds: patience.as_secs() };
    receiver.recv_timeout(settings.qmp()).unwrap_or_else(|_| {
        tracing::error!(doing, "ending the server of a block device that does not answer");
        let Processes { server, daemon } = processes;
        device::release(host, directory, server.as_ref(), daemon.as_ref(), settings.qmp())?;
        receiver.recv_timeout(settings.qmp()).unwrap_or_else(|_| Err(timed_out(settings.qmp())))
    })
}

/// Makes a symlink, in place of what is there.
fn link(path: &Path, target: &Path) -> Result<()> {
    let new = new_name(path);
    unlink(&new)?;
    std::os::unix::fs::symlink(target, &new).map_err(Error::on("making", &new))?;
    fs::rename(&new, path).map_err(Error::on("making", path))
}

/// Removes a symlink, and a half-made one.
fn unlink(path: &Path) -> Result<()> {
    for path in [new_name(path), path.to_owned()] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::on("removing", &path)(error)),
            _ => {}
        }
    }
    Ok(())
}

/// Gives the name under which a symlink is made.
fn new_name(path: &Path) -> PathBuf {
    path.with_extension("new")
}
