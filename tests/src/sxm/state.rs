//! What a host remembers of storage migrations in progress (ocaml/xapi/storage_migrate_helper.ml).
//!
//! All of it is the sender's: a SMAPIv3 sender prepares the destination by remote calls and keeps the record itself.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::host::{Host, lock};
use crate::smapiv2::{Dp, Sr, Vdi, Vm};
use crate::wire::Operation;

/// `<sr uuid>/<volume>` of the source.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct MirrorId {
    /// The source SR.
    pub sr: Sr,
    /// The source volume.
    pub vdi: Vdi,
}

impl fmt::Display for MirrorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.sr, self.vdi)
    }
}

/// The sending side of a mirror.
#[derive(Debug, Clone)]
pub struct Sending {
    /// The datapath of the source.
    pub local_dp: Dp,
    /// The destination volume, once the mirror has been started.
    pub remote: Option<Vdi>,
    /// The mirror, once it has been started.
    pub operation: Option<Operation>,
    /// Whether a poll saw it fail.
    pub failed: bool,
}

/// The receiving side of a mirror.
#[derive(Clone)]
pub struct Receiving {
    /// The destination host.
    pub host: Arc<Host>,
    /// The destination SR.
    pub sr: Sr,
    /// The destination volume.
    pub vdi: Vdi,
    /// Its datapath.
    pub dp: Dp,
    /// Its domain.
    pub vm: Vm,
}

impl fmt::Debug for Receiving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Receiving({} on {})", self.vdi, self.host.name())
    }
}

/// All migrations in progress that a host sends.
#[derive(Debug, Default)]
pub struct State {
    /// By mirror.
    pub sends: BTreeMap<MirrorId, Sending>,
    /// By mirror.
    pub receives: BTreeMap<MirrorId, Receiving>,
}

impl Host {
    /// The mirrors that this host remembers sending, and those that it remembers somebody receiving.
    #[must_use]
    pub fn mirrors(&self) -> (Vec<MirrorId>, Vec<MirrorId>) {
        let state = lock(&self.sxm);
        (state.sends.keys().cloned().collect(), state.receives.keys().cloned().collect())
    }
}
