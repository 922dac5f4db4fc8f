//! SMAPIv2 calls as xapi's storage_mux and xapi-storage-script turn them into script calls.
//!
//! All are methods of [`Host`](crate::host::Host): `sr_…`, `vdi_…`, `dp_…` and `data_…`.

mod data;
mod datapath;
mod sr;
mod vdi;

use std::fmt;

pub use data::nbd_server;
pub use datapath::DpInfo;
pub use sr::DeviceConfig;

use crate::wire::{Failure, Health, Malformed, Volume};

macro_rules! identifier {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub String);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<&str> for $name {
            fn from(s: &str) -> Self {
                Self(s.to_owned())
            }
        }
    )*};
}

identifier! {
    /// An SR's uuid.
    Sr;
    /// A volume's key, which is also its location and its uuid.
    Vdi;
    /// What a datapath is for: a domain's number, `-1`, `0`, `MIR…` or `CP…`.
    Vm;
    /// A datapath's name: `vbd/<domid>/<device>`, `mirror_…`, or a uuid.
    Dp;
}

/// Everything that a storage call can fail with.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// A script failed, or could not be called.
    #[error("{0}")]
    Backend(#[source] Failure),
    /// The volume is active on the host with this uuid.
    #[error("activated on another host: {0}")]
    ActivatedOnAnotherHost(String),
    /// An answer is not of its type; what the daemon calls an unmarshalling error.
    #[error("{method} answered wrongly")]
    Malformed {
        /// The method.
        method: &'static str,
        /// What is wrong.
        #[source]
        source: Malformed,
    },
    /// The SR is not attached.
    #[error("the SR {0} is not attached")]
    SrNotAttached(String),
    /// The SR is not in a state to be scanned.
    #[error("the SR {0} is {1:?}")]
    SrUnhealthy(String, Health),
    /// No volume plugin or no datapath fits.
    #[error("no plugin: {0}")]
    NoPlugin(String),
    /// The plugin lacks a feature that the call needs.
    #[error("not implemented: {0}")]
    Unimplemented(String),
    /// A volume is not where it has to be.
    #[error("the volume {0} does not exist")]
    VdiDoesNotExist(String),
    /// The contents of a snapshot and its copy do not have the same id.
    #[error("content ids of {0} and {1} differ")]
    ContentIdsDoNotMatch(String, String),
    /// The destination could not be prepared.
    #[error("migration preparation failed: {0}")]
    Preparation(String),
    /// The mirror failed.
    #[error("migration mirror failed: {0}")]
    Mirror(String),
    /// The user cancelled.
    #[error("cancelled")]
    Cancelled,
    /// Anything else.
    #[error("internal error: {0}")]
    Internal(String),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure.activated_on_another_host() {
            Some(host) => Self::ActivatedOnAnotherHost(host.to_owned()),
            None => Self::Backend(failure),
        }
    }
}

impl Error {
    /// The code of a script's failure.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Backend(failure) => Some(&failure.code),
            _ => None,
        }
    }
}

/// The result of a storage call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A volume as SMAPIv2 knows it; everything that SMAPIv3 has no field for comes from its keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VdiInfo {
    /// Its key.
    pub vdi: Vdi,
    /// Its uuid, if the plugin tells.
    pub uuid: Option<String>,
    /// Key `content_id`, else empty.
    pub content_id: String,
    /// Its name.
    pub name_label: String,
    /// Its description.
    pub name_description: String,
    /// Key `vdi-type`, else empty.
    pub ty: String,
    /// Key `is_a_snapshot`.
    pub is_a_snapshot: bool,
    /// Key `snapshot_time`.
    pub snapshot_time: String,
    /// Key `snapshot_of`, else empty.
    pub snapshot_of: Vdi,
    /// Whether it must not be written to.
    pub read_only: bool,
    /// Whether changed blocks are tracked.
    pub cbt_enabled: bool,
    /// Bytes that a guest sees.
    pub virtual_size: i64,
    /// Bytes that it takes.
    pub physical_utilisation: i64,
    /// Keys `_sm_config_…`, without the prefix.
    pub sm_config: Vec<(String, String)>,
    /// Whether several VMs may use it at once.
    pub sharable: bool,
}

impl From<&Volume> for VdiInfo {
    fn from(volume: &Volume) -> Self {
        let text = |key: &str, default: &str| volume.key_value(key).unwrap_or(default).to_owned();
        let sm_config = |(k, v): &(String, String)| Some((k.strip_prefix("_sm_config_")?.to_owned(), v.clone()));
        Self {
            vdi: Vdi(volume.key.clone()),
            uuid: volume.uuid.clone(),
            content_id: text("content_id", ""),
            name_label: volume.name.clone(),
            name_description: volume.description.clone(),
            ty: text("vdi-type", ""),
            is_a_snapshot: volume.snapshot(),
            snapshot_time: text("snapshot_time", "19700101T00:00:00Z"),
            snapshot_of: Vdi(text("snapshot_of", "")),
            read_only: !volume.read_write,
            cbt_enabled: volume.cbt_enabled.unwrap_or(false),
            virtual_size: volume.virtual_size,
            physical_utilisation: volume.physical_utilisation,
            sm_config: volume.keys.iter().filter_map(sm_config).collect(),
            sharable: volume.sharable,
        }
    }
}

impl VdiInfo {
    /// What a new disk of this size is created from.
    #[must_use]
    pub fn blank(name: &str, size: i64) -> Self {
        Self {
            vdi: Vdi(String::new()),
            uuid: None,
            content_id: String::new(),
            name_label: name.to_owned(),
            name_description: String::new(),
            ty: "user".to_owned(),
            is_a_snapshot: false,
            snapshot_time: "19700101T00:00:00Z".to_owned(),
            snapshot_of: Vdi(String::new()),
            read_only: false,
            cbt_enabled: false,
            virtual_size: size,
            physical_utilisation: 0,
            sm_config: Vec::new(),
            sharable: false,
        }
    }
}

/// Now, as xapi writes times.
#[must_use]
pub fn now() -> String {
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
    let days = i64::try_from(seconds / 86_400).unwrap_or(0);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    // Howard Hinnant's days-to-civil, for dates after 1970.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}{month:02}{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests;
