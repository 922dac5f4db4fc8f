//! From the first attach to the last detach.

use std::time::{Duration, Instant};

use super::session::Session;
use super::state::Use;
use super::{Attachment, clients};
use crate::error::{Error, Result};
use crate::id::Domain;
use crate::mirror::Base;
use crate::qemu::{Image, daemon};
use crate::store::{Mode, Sr};

/// How long a client that is about to go may take: xapi's proxy closes its connection about when it calls.
const CLIENT_GRACE: Duration = Duration::from_secs(1);

impl Attachment {
    /// Attaches a domain: its volume's daemon runs then. A domain that is attached stays as it is; what the export says
    /// holds for whoever connects for it next.
    ///
    /// # Errors
    ///
    /// When the daemon does not start; [`Error::VolumeInUse`] when the export says what no longer holds, and cannot be
    /// taken away because another domain is connected.
    pub async fn attach(&mut self, domain: &Domain) -> Result<()> {
        self.ensure_daemon().await?;
        self.state.domains.entry(domain.clone()).or_insert(Use::Attached);
        self.save()?;
        self.renew_session(domain, true).await
    }

    /// Activates a domain, attached or not: the chain given, top first, is then open and exported, and writable if
    /// an active domain writes.
    ///
    /// A migration's domain without a client is nobody ([`Domain::is_migration`]); it is deactivated by the way. A
    /// domain that is active already keeps what it may do, or may do more.
    ///
    /// `base` tells what the chain reads as, where it is opened for writing and what is written stays.
    ///
    /// # Errors
    ///
    /// [`Error::VolumeInUse`] when the volume is open read-only and cannot be reopened, because a client is
    /// connected; else the chain cannot be opened.
    pub async fn activate(
        &mut self,
        domain: &Domain,
        mode: Mode,
        images: &[Image],
        base: Option<Base>,
    ) -> Result<()> {
        self.ready()?;
        if self.ensure_daemon().await? {
            self.save()?;
        }
        self.drop_stale(domain).await?;
        let current = self.state.domains.get(domain).copied().unwrap_or(Use::Attached);
        let wanted = current.max(mode.into());
        let needed = self.state.needed().max(wanted.mode()).unwrap_or(mode);
        let session = base.map(|base| Session::begin(base, self.may_tell(domain)));
        match self.open_mode() {
            Some(Mode::ReadWrite) if current == Use::ReadWrite => self.renew_session(domain, false).await?,
            Some(Mode::ReadWrite) if wanted == Use::ReadWrite => self.join_session().await?,
            Some(open) if open >= needed => {}
            Some(_) => {
                if !self.make_way(domain)? || !self.clients_are_gone().await? {
                    return Err(Error::VolumeInUse {
                        volume: self.state.volume.to_string(),
                        reason: "it is open read-only and a client is connected".to_owned(),
                    });
                }
                let client = self.client().await?;
                self.close_graph(&client).await?;
                self.open_graph(&client, images, needed, session).await?;
            }
            None => {
                let client = self.client().await?;
                self.open_graph(&client, images, needed, session).await?;
            }
        }
        self.state.domains.insert(domain.clone(), wanted);
        self.state.unflushed.remove(domain);
        self.save()
    }

    /// Deactivates a domain; one that is not active, or not known, stays as it is. The last one closes the graph,
    /// the last one that writes makes it read-only.
    ///
    /// # Errors
    ///
    /// When what was written could not be flushed. The graph is closed then, and the same error comes again until the
    /// domain is activated anew or detached. After any other error the domain is still active.
    pub async fn deactivate(&mut self, domain: &Domain) -> Result<()> {
        self.end_import(|owner| owner == domain)?;
        self.settle_import();
        self.ready()?;
        if let Some(reason) = self.state.unflushed.get(domain) {
            return Err(Error::Qemu { doing: "flushing the last writes".to_owned(), reason: reason.clone() });
        }
        let usage = self.state.domains.get(domain).copied().filter(|usage| usage.is_active());
        let was_open = self.state.open.is_some();
        let others = self.state.domains.iter().filter(|(other, _)| *other != domain);
        let needed = others.filter_map(|(_, usage)| usage.mode()).max();
        let closed = match (needed, self.open_mode()) {
            (_, None) => Ok(()),
            (None, Some(_)) => {
                let client = self.client().await?;
                self.leave_device(domain)?;
                self.close_graph(&client).await
            }
            (Some(Mode::ReadOnly), Some(Mode::ReadWrite)) if usage == Some(Use::ReadWrite) => {
                let client = self.client().await?;
                self.leave_device(domain)?;
                self.downgrade_graph(&client).await
            }
            (Some(_), Some(_)) => self.leave_device(domain),
        };
        let is_over = usage.is_some() && (closed.is_ok() || self.state.unflushed.contains_key(domain));
        if is_over {
            self.state.domains.insert(domain.clone(), Use::Attached);
        }
        if is_over || was_open != self.state.open.is_some() {
            self.save()?;
        }
        closed
    }

    /// Detaches a domain, active or not. The last one stops the daemon, and nothing is left of the volume on this
    /// host.
    ///
    /// # Errors
    ///
    /// Only when the daemon's process does not end. What cannot be closed is logged, and ends with the daemon.
    pub async fn detach(&mut self, domain: &Domain) -> Result<()> {
        if let Err(error) = self.deactivate(domain).await {
            tracing::error!(%domain, error = error.chain(), "detaching a domain that cannot be deactivated");
        }
        self.state.domains.remove(domain);
        self.state.unflushed.remove(domain);
        if self.state.domains.is_empty() { self.stop().await } else { self.save() }
    }

    /// Stops the daemon, whoever uses the volume, and leaves nothing of it on this host. What is open is not flushed
    /// but by the daemon itself.
    ///
    /// # Errors
    ///
    /// When the daemon's process does not end.
    pub async fn stop(&mut self) -> Result<()> {
        self.end_import(|_| true)?;
        self.end_device(false)?;
        match &self.state.daemon {
            Some(process) => {
                daemon::stop(&self.host, &self.directory, process).await?;
                // While it was recorded no other was started: none is looked for.
                daemon::remove_log(&self.directory)?;
            }
            None => daemon::remove_files(&self.directory)?,
        }
        self.state.daemon = None;
        self.state.open = None;
        self.state.domains.clear();
        self.state.unflushed.clear();
        self.trouble = None;
        // The directory goes with the lock, and only once: another call may make a new one right after.
        self.forget()
    }

    /// Tells whether anybody but stale migration domains is active; see [`Self::activate`].
    ///
    /// # Errors
    ///
    /// When connected clients cannot be counted.
    pub async fn is_used(&self) -> Result<bool> {
        let connected = self.clients().await? > 0;
        let active = self.state.domains.iter().filter(|(_, usage)| usage.is_active());
        Ok(active.into_iter().any(|(domain, _)| connected || !domain.is_migration()))
    }

    /// Starts the daemon if none runs, and tells whether it did: the caller writes it down.
    async fn ensure_daemon(&mut self) -> Result<bool> {
        if self.state.daemon.is_some() {
            return Ok(false);
        }
        let unit = format!("xapi-storage-qcow2-daemon@{}", self.state.volume);
        let sr = Sr::attached_path(&self.host, self.state.sr).ok();
        self.state.daemon = Some(daemon::spawn(&self.host, &self.directory, &unit, sr.as_deref()).await?);
        Ok(true)
    }

    /// Deactivates migration domains, other than the one given, that nobody is connected for.
    async fn drop_stale(&mut self, domain: &Domain) -> Result<()> {
        let is_stale =
            |(other, usage): (&Domain, &Use)| *other != *domain && other.is_migration() && usage.is_active();
        if !self.state.domains.iter().any(is_stale) || self.clients().await? > 0 {
            return Ok(());
        }
        self.end_import(|owner| owner != domain && owner.is_migration())?;
        for (other, usage) in &mut self.state.domains {
            if is_stale((other, usage)) {
                tracing::info!(stale = %other, "a migration that nobody is connected for no longer counts");
                *usage = Use::Attached;
            }
        }
        self.save()
    }

    /// Waits a little for the clients to go, and tells whether they have.
    pub(super) async fn clients_are_gone(&self) -> Result<bool> {
        let deadline = Instant::now() + CLIENT_GRACE;
        loop {
            if clients::count(&self.sockets().nbd())? == 0 {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
