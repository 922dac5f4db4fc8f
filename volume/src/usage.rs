//! Who has a volume open: what a method may do with it depends on that.

use plugin::attachment::{Attachment, Use};
use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::id::{Domain, SrUuid, VolumeKey};
use plugin::store::{LockedTree, Mode, Sr};
use plugin::{mirror, qemu};
use uuid::Uuid;

/// Who has a volume open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// Nobody.
    Idle,
    /// This host.
    Here(Mode),
    /// Another host, by its record in the tree.
    Elsewhere(Uuid, Mode),
}

impl Usage {
    /// Finds who has a volume open. Other hosts are known by their records in the tree; this host's own record does
    /// not count, as its daemon may have died or never have opened the volume.
    pub fn of(host: &Host, tree: &LockedTree, key: VolumeKey) -> Result<Self> {
        if let Some(elsewhere) = elsewhere(host, tree, key)? {
            return Ok(elsewhere);
        }
        let attachment = Attachment::lock_existing(host, key)?;
        Ok(attachment.and_then(|found| found.open_mode()).map_or(Self::Idle, Self::Here))
    }

    /// Refuses what must not happen while the volume is open anywhere.
    pub fn refuse_active(self, key: VolumeKey) -> Result<()> {
        match self {
            Self::Idle => Ok(()),
            Self::Here(_) => Err(in_use(key, "it is active on this host")),
            Self::Elsewhere(host, _) => Err(Error::ActivatedOnAnotherHost { volume: key.to_string(), host }),
        }
    }

    /// Refuses what must not happen while the volume is written to.
    pub fn refuse_writer(self, key: VolumeKey) -> Result<()> {
        match self {
            Self::Here(Mode::ReadWrite) => Err(in_use(key, "it is active on this host")),
            _ => self.refuse_writer_elsewhere(key),
        }
    }

    /// Refuses what another host's guest would write through.
    pub fn refuse_writer_elsewhere(self, key: VolumeKey) -> Result<()> {
        match self {
            Self::Elsewhere(host, Mode::ReadWrite) => {
                Err(Error::ActivatedOnAnotherHost { volume: key.to_string(), host })
            }
            _ => Ok(()),
        }
    }
}

/// Makes the refusal of a call that a use of the volume forbids.
pub fn in_use(key: VolumeKey, reason: impl Into<String>) -> Error {
    Error::VolumeInUse { volume: key.to_string(), reason: reason.into() }
}

/// Finds another host that has a volume open, a writing one before others.
fn elsewhere(host: &Host, tree: &LockedTree, key: VolumeKey) -> Result<Option<Usage>> {
    let this = host.uuid()?;
    let others = tree.volume(key)?.active.iter().filter(|record| record.host != this);
    Ok(others.max_by_key(|record| record.mode).map(|record| Usage::Elsewhere(record.host, record.mode)))
}

/// Makes sure that no guest has a volume that is to be destroyed, and that nothing of it is left on this host.
pub fn release(host: &Host, tree: &LockedTree, key: VolumeKey) -> Result<()> {
    if let Some(Usage::Elsewhere(holder, _)) = elsewhere(host, tree, key)? {
        return Err(Error::ActivatedOnAnotherHost { volume: key.to_string(), host: holder });
    }
    let Some(mut attachment) = Attachment::lock_existing(host, key)? else {
        return Ok(());
    };
    match user(host, &attachment)? {
        Some(domain) => Err(in_use(key, format!("it is active for domain {domain}"))),
        None => qemu::block_on(attachment.stop()),
    }
}

/// Sees that what a guest has written to a volume is in its file.
pub fn flush(host: &Host, tree: &LockedTree, key: VolumeKey) -> Result<()> {
    let usage = Usage::of(host, tree, key)?;
    usage.refuse_writer_elsewhere(key)?;
    if usage == Usage::Here(Mode::ReadWrite)
        && let Some(mut attachment) = Attachment::lock_existing(host, key)?
    {
        qemu::block_on(attachment.flush_live())?;
    }
    Ok(())
}

/// Refuses a change of the node that a running mirror reads.
pub fn refuse_mirrored(host: &Host, key: VolumeKey) -> Result<()> {
    if mirror::is_running(host, key)? {
        return Err(in_use(key, "it is being mirrored"));
    }
    Ok(())
}

/// Stops what still runs on this host for an SR's volumes without being used: what a migration that was never told
/// its end left behind (xen-api `ocaml/xapi/storage_mux.ml`: DP.destroy2 has no hook after it).
///
/// # Errors
///
/// [`Error::SrInUse`] for a volume that is used; those before it were stopped.
pub fn stop_unused(host: &Host, uuid: SrUuid) -> Result<()> {
    for key in Attachment::volumes(host)? {
        match Attachment::lock_existing(host, key)? {
            Some(attachment) if attachment.uri().sr == uuid => {
                if let Some(domain) = attached_guest(host, &attachment)? {
                    let reason = format!("volume {key} is attached for domain {domain}");
                    return Err(Error::SrInUse { sr: uuid.to_string(), reason });
                }
            }
            _ => continue,
        }
        // The tree's lock comes before the attachment's. Without the SR there is no record to take back.
        let tree = Sr::attached(host, uuid).and_then(|sr| sr.lock(host, key));
        if let Some(mut attachment) = Attachment::lock_existing(host, key)? {
            qemu::block_on(attachment.stop())?;
        }
        match tree {
            Ok(mut tree) => {
                let this = host.uuid()?;
                tree.update(key, |volume| volume.active.retain(|record| record.host != this))?;
            }
            Err(error) => tracing::warn!(error = error.chain(), volume = %key, "its record was not changed"),
        }
    }
    Ok(())
}

/// Finds who uses a volume: an active domain, but for a migration that nobody is connected for and a mirror that no
/// longer runs.
fn user(host: &Host, attachment: &Attachment) -> Result<Option<Domain>> {
    let active = |(_, usage): &(&Domain, &Use)| usage.is_active();
    first_in_use(host, attachment, active)
}

/// Finds who has a volume attached, active or not, with the same exceptions.
fn attached_guest(host: &Host, attachment: &Attachment) -> Result<Option<Domain>> {
    first_in_use(host, attachment, |_| true)
}

fn first_in_use(
    host: &Host,
    attachment: &Attachment,
    counts: impl Fn(&(&Domain, &Use)) -> bool,
) -> Result<Option<Domain>> {
    let connected = qemu::block_on(attachment.clients())? > 0;
    let mirrored = mirror::is_running(host, attachment.uri().volume)?;
    let is_stale = |domain: &Domain| {
        (domain.is_migration() && !connected) || (domain.as_str() == mirror::OFFLINE_DOMAIN && !mirrored)
    };
    let mut users = attachment.domains().iter().filter(counts).map(|(domain, _)| domain);
    Ok(users.find(|domain| !is_stale(domain)).cloned())
}
