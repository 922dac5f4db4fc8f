//! The one error of this crate, and what xapi is told of it.

use std::io;
use std::path::{Path, PathBuf};

use uuid::Uuid;

/// A result with this crate's [`Error`], unless another is given.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call failed.
///
/// A message names the thing it is about and leaves the cause to [`std::error::Error::source`]; the chain is
/// printed once, where the answer to xapi is made ([`crate::smapi`]).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request cannot be understood or asks for something that cannot be.
    #[error("bad request: {0}")]
    BadRequest(String),
    /// The device-config has no `uri`.
    #[error("the device-config has no {0}")]
    MissingDeviceConfig(&'static str),
    /// The device-config has a value that cannot be used.
    #[error("the device-config's {key} is wrong: {reason}")]
    InvalidDeviceConfig {
        /// The key in the device-config.
        key: &'static str,
        /// What is wrong with its value.
        reason: String,
    },
    /// The SR is not attached on this host.
    #[error("SR {0} is not attached on this host")]
    SrNotAttached(String),
    /// The SR's directory, file system or record cannot be used.
    #[error("SR at {path} is not available: {reason}")]
    SrUnavailable {
        /// The file or directory that is missing or wrong.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// There is an SR already.
    #[error("there is an SR already at {0}")]
    SrExists(PathBuf),
    /// There are volumes of an SR whose record is gone.
    #[error("there are volumes at {0}, and no record of their SR")]
    RecordLost(PathBuf),
    /// The SR holds volumes.
    #[error("SR {0} still holds volumes")]
    SrNotEmpty(String),
    /// The SR has datapaths in use.
    #[error("SR {sr} is in use: {reason}")]
    SrInUse {
        /// The SR.
        sr: String,
        /// By what.
        reason: String,
    },
    /// No volume has this key.
    #[error("volume {0} does not exist")]
    VolumeDoesNotExist(String),
    /// The volume's data was destroyed; only what changed in it is known.
    #[error("volume {0} has no data: it was destroyed")]
    DataDestroyed(String),
    /// Changed blocks cannot be told, or data not be destroyed, where changes are not tracked.
    #[error("changed blocks of volume {0} are not tracked")]
    ChangesNotTracked(String),
    /// Two volumes have no common origin that changes could be counted from.
    #[error("volumes {from} and {to} are not of one disk")]
    UnrelatedVolumes {
        /// The one.
        from: String,
        /// The other.
        to: String,
    },
    /// The volume is in use in a way that forbids the call.
    #[error("volume {volume} is in use: {reason}")]
    VolumeInUse {
        /// The volume's key.
        volume: String,
        /// By what.
        reason: String,
    },
    /// The call needs the volume open for writing on this host.
    #[error("volume {volume} is not active for writing on this host")]
    NotActive {
        /// The volume's key.
        volume: String,
    },
    /// A migration from SMAPIv1 wrote to the volume, and the rest of its data is in another one.
    #[error(
        "volume {0} lacks data: a migration from SMAPIv1 wrote to it and has not composed it with the volume that has \
         the rest"
    )]
    NotComposed(String),
    /// Writes of a migration from SMAPIv1 are missing from the volume.
    #[error("the import to volume {volume} broke: {reason}")]
    ImportBroken {
        /// The volume's key.
        volume: String,
        /// How.
        reason: String,
    },
    /// Another host holds the volume.
    #[error("volume {volume} is activated on host {host}")]
    ActivatedOnAnotherHost {
        /// The volume's key.
        volume: String,
        /// The uuid of the host that holds it.
        host: Uuid,
    },
    /// The chain of nodes that a guest would read through is too long.
    #[error("volume {volume} would have a chain of {length} nodes; {limit} are the most")]
    ChainTooLong {
        /// The volume's key.
        volume: String,
        /// How long the chain would be.
        length: usize,
        /// How long it may be.
        limit: usize,
    },
    /// A size that no volume can have.
    #[error("invalid size: {0}")]
    InvalidSize(String),
    /// The file system or quota is full.
    #[error("no space left while {doing}")]
    NoSpace {
        /// What was being done.
        doing: String,
        /// The system's error, where there is one.
        source: Option<io::Error>,
    },
    /// The file system is read-only.
    #[error("the file system is read-only: {doing}")]
    ReadOnlyFileSystem {
        /// What was being done.
        doing: String,
        /// The system's error.
        source: io::Error,
    },
    /// A record of ours cannot be read as one.
    #[error("record {path} is damaged: {reason}{}", advice(.path))]
    DamagedRecord {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A record was written by a newer version of this program.
    #[error("record {path} has format {found}; this program knows formats up to {known}: install a newer version")]
    NewerFormat {
        /// The file.
        path: PathBuf,
        /// The format it has.
        found: u64,
        /// The newest format this program reads.
        known: u64,
    },
    /// A qcow2 file is not what the records say, or cannot be trusted.
    #[error("image {path} is refused: {reason}{}", advice(.path))]
    Image {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A system call failed.
    #[error("{doing} failed")]
    Io {
        /// What was being done, with the file's name.
        doing: String,
        /// The system's error.
        source: io::Error,
    },
    /// QEMU's tools or daemon refused or failed.
    #[error("{doing} failed: {reason}")]
    Qemu {
        /// What was being done.
        doing: String,
        /// What QEMU said.
        reason: String,
    },
    /// The storage daemon refused a command.
    #[error("QMP {command} failed: {desc}")]
    Qmp {
        /// The command.
        command: String,
        /// The error's class, as QMP names it.
        class: String,
        /// What the daemon said.
        desc: String,
    },
    /// Something did not answer in its time.
    #[error("{doing} took more than {seconds} seconds")]
    Timeout {
        /// What was being waited for.
        doing: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// The mirror of a volume is broken: its destination does not have every write.
    #[error("the mirror of volume {volume} is broken: {reason}")]
    MirrorBroken {
        /// The source volume's key.
        volume: String,
        /// How it broke.
        reason: String,
    },
    /// The operation cannot be done on this kind of SR.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// An operation failed, and so did its undoing.
    #[error("{first} (and undoing it failed: {undo})")]
    Undo {
        /// Why the operation failed.
        first: Box<Error>,
        /// Why it could not be undone.
        undo: Box<Error>,
    },
    /// A promise inside this program is broken.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    /// Makes an error of a failed system call, told apart by what xapi must know of it.
    pub fn io(doing: impl Into<String>, source: io::Error) -> Self {
        let doing = doing.into();
        // The kind, and not the system's number, survives where tempfile puts a path around an error.
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { doing, source: Some(source) }
            }
            io::ErrorKind::ReadOnlyFilesystem => Self::ReadOnlyFileSystem { doing, source },
            _ => Self::Io { doing, source },
        }
    }

    /// Makes the closure for `map_err` after a system call on a file: `fs::read(p).map_err(Error::on("reading", p))`.
    pub fn on<E: Into<io::Error>>(verb: &'static str, path: impl AsRef<Path>) -> impl FnOnce(E) -> Self {
        move |source| Self::io(format!("{verb} {}", path.as_ref().display()), source.into())
    }

    /// Gives the error of an operation that failed with this one and was undone, or could not be.
    pub fn undone(self, undone: Result<()>) -> Self {
        match undone {
            Ok(()) => self,
            Err(undo) => Self::Undo { first: Box::new(self), undo: Box::new(undo) },
        }
    }

    /// Tells whether this is the storage daemon's answer to a command that it did not execute.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Qmp { .. } | Self::NoSpace { .. })
    }

    /// Gives the error code and parameters that xapi passes on to its user.
    ///
    /// Codes are XenServer's `SR_BACKEND_FAILURE_<n>`, numbered as in sm's `XE_SR_ERRORCODES.xml`, with the
    /// parameters in sm's form (empty, message, empty), or SMAPIv3's own names. Only the parameters of
    /// `Activated_on_another_host` are interpreted by xapi-storage-script (xen-api
    /// `ocaml/xapi-storage-script/main.ml`); `SR_BACKEND_FAILURE_44` means no space to xapi.
    pub fn code(&self) -> (String, Vec<String>) {
        let number = match self {
            Self::ActivatedOnAnotherHost { host, .. } => {
                let name = "Activated_on_another_host".to_owned();
                return (name.clone(), vec![name, host.to_string()]);
            }
            Self::VolumeDoesNotExist(key) => return ("Volume_does_not_exist".to_owned(), vec![key.clone()]),
            Self::SrNotAttached(sr) => return ("Sr_not_attached".to_owned(), vec![sr.clone()]),
            Self::Unsupported(what) => return ("SR_OPERATION_NOT_SUPPORTED".to_owned(), vec![what.clone()]),
            Self::Undo { first, .. } => return first.code(),
            Self::MissingDeviceConfig(_) => {
                // The exact text of sm's code 90, which outside tests look for.
                let text = "The request is missing the device parameter".to_owned();
                return ("SR_BACKEND_FAILURE_90".to_owned(), vec![String::new(), text, String::new()]);
            }
            Self::SrInUse { .. } => 16,
            Self::VolumeInUse { .. } => 24,
            Self::SrNotEmpty(_) => 39,
            Self::SrExists(_) | Self::RecordLost(_) => 42,
            Self::NoSpace { .. } => 44,
            Self::DamagedRecord { .. }
            | Self::NewerFormat { .. }
            | Self::Image { .. }
            | Self::NotActive { .. }
            | Self::NotComposed(_)
            | Self::DataDestroyed(_) => 46,
            Self::SrUnavailable { .. } => 47,
            Self::InvalidSize(_) => 79,
            Self::InvalidDeviceConfig { .. } => 91,
            Self::ChainTooLong { .. } => 109,
            Self::BadRequest(_) => 115,
            Self::Io { .. } => 200,
            Self::Timeout { .. } => 201,
            Self::MirrorBroken { .. } | Self::ImportBroken { .. } => 202,
            Self::Qemu { .. } | Self::Qmp { .. } => 453,
            Self::ChangesNotTracked(_) | Self::UnrelatedVolumes { .. } => 460,
            Self::ReadOnlyFileSystem { .. } => 461,
            Self::Internal(_) => 1200,
        };
        (format!("SR_BACKEND_FAILURE_{number}"), vec![String::new(), self.told(), String::new()])
    }

    /// Gives [`Self::chain`], and what a person can do.
    pub fn told(&self) -> String {
        let remedy = self.remedy().map(|remedy| format!("; {remedy}"));
        self.chain() + &remedy.unwrap_or_default()
    }

    /// Says what a person can do, where the message does not.
    pub fn remedy(&self) -> Option<String> {
        let remedy = match self {
            Self::BadRequest(_) => "this is a mistake of xapi's or of the plugin's: report it",
            Self::InvalidDeviceConfig { key: "uri", .. } => {
                "give uri=file:///absolute/path of a directory that exists"
            }
            Self::InvalidDeviceConfig { key: "sr_uuid", .. } => "look whether the right file system is mounted",
            Self::SrNotAttached(_) => "plug its PBD",
            Self::SrUnavailable { path, .. } => {
                let check = check(path).map(|check| format!("; if it is, {check} says what can be done"));
                return Some(format!("look whether its file system is mounted{}", check.unwrap_or_default()));
            }
            Self::SrExists(_) => "give another directory, or introduce the SR that is there",
            Self::RecordLost(path) => {
                return Some(format!("give another directory; {} says what is left of it", check_command(path)));
            }
            Self::SrNotEmpty(_) => "destroy them first",
            Self::SrInUse { .. } => "stop the VMs that use it",
            Self::VolumeDoesNotExist(_) => "scan the SR",
            Self::DataDestroyed(_) => "use another snapshot",
            Self::ChangesNotTracked(_) => "enable changed block tracking before the first snapshot",
            Self::UnrelatedVolumes { .. } => "ask for two volumes of one disk",
            Self::VolumeInUse { .. } => "stop the VM, or wait until the migration or task has ended",
            Self::NotActive { .. } => "let xapi activate it first",
            Self::NotComposed(_) => "start the VM at the source, whose disk is whole, or compose the two volumes",
            Self::ImportBroken { .. } | Self::MirrorBroken { .. } => {
                "the disk at the source is whole: let the VM run there, and migrate it again"
            }
            Self::ActivatedOnAnotherHost { .. } => "deactivate it there",
            Self::ChainTooLong { .. } => {
                "destroy snapshots, and give gc the time to merge what they leave, or copy the volume"
            }
            Self::NoSpace { .. } => "free space: destroying volumes works on a full SR",
            Self::ReadOnlyFileSystem { .. } => "mount it for writing",
            Self::Io { .. } => "the kernel's log may say more",
            Self::Timeout { .. } => "'xapi-storage-qcow2 status' says what hangs",
            Self::Qemu { .. } | Self::Qmp { .. } => "'xapi-storage-qcow2 status' and the host's log may say more",
            Self::Undo { first, .. } => return first.remedy(),
            Self::Internal(_) => "report it",
            Self::MissingDeviceConfig(_)
            | Self::InvalidDeviceConfig { .. }
            | Self::DamagedRecord { .. }
            | Self::NewerFormat { .. }
            | Self::Image { .. }
            | Self::InvalidSize(_)
            | Self::Unsupported(_) => return None,
        };
        Some(remedy.to_owned())
    }

    /// Gives the message with those of its causes, joined by colons.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

/// Says by which command a person learns more of a file that is part of an SR.
fn advice(path: &Path) -> String {
    check(path).map_or_else(String::new, |check| format!("; {check} says what can be done"))
}

/// Gives the command that looks at the SR that a file is part of, where the file's name tells which that is.
fn check(path: &Path) -> Option<String> {
    let above = |levels: usize| path.ancestors().nth(levels);
    let is_in = |levels, name: &str| above(levels).and_then(Path::file_name).is_some_and(|found| found == name);
    let sr = if path.file_name().is_some_and(|name| name == "sr.json" || name == "trees") {
        above(1)
    } else if is_in(2, "trees") {
        above(3)
    } else if is_in(1, "trees") {
        above(2)
    } else {
        None
    };
    sr.map(check_command)
}

/// Gives the command that looks at the SR in a directory.
fn check_command(sr: &Path) -> String {
    format!("'xapi-storage-qcow2 check {}'", sr.display())
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn a_full_disk_is_told_when_another_error_is_around_it() {
        let around = io::Error::new(io::Error::from(Errno::NOSPC).kind(), "more words");
        assert_eq!(Error::io("writing x", around).code().0, "SR_BACKEND_FAILURE_44");
    }

    #[test]
    fn a_full_disk_is_told_apart_from_other_failures() {
        for (errno, code) in [
            (Errno::NOSPC, "SR_BACKEND_FAILURE_44"),
            (Errno::DQUOT, "SR_BACKEND_FAILURE_44"),
            (Errno::ROFS, "SR_BACKEND_FAILURE_461"),
            (Errno::IO, "SR_BACKEND_FAILURE_200"),
        ] {
            assert_eq!(Error::io("writing x", errno.into()).code().0, code);
        }
    }

    #[test]
    fn the_cause_is_printed_after_the_message() {
        let error = Error::io("writing x", io::Error::other("because"));
        assert_eq!(error.chain(), "writing x failed: because");
    }

    #[test]
    fn what_is_wrong_in_an_sr_names_the_command_that_helps() {
        for (path, sr) in [
            ("/sr/sr.json", Some("/sr")),
            ("/sr/trees/t/tree.json", Some("/sr")),
            ("/sr/trees/t/n.qcow2", Some("/sr")),
            ("/sr/trees/odd", Some("/sr")),
            ("/run/xapi-storage-qcow2/volumes/v/state.json", None),
            ("/", None),
        ] {
            let error = Error::DamagedRecord { path: path.into(), reason: "r".to_owned() };
            let expected = sr.map(|sr| format!("'xapi-storage-qcow2 check {sr}'"));
            assert_eq!(error.to_string().contains("check"), expected.is_some(), "{error}");
            assert!(expected.is_none_or(|words| error.to_string().contains(&words)), "{error}");
        }
    }

    #[test]
    fn another_hosts_activation_has_the_parameters_that_xapi_interprets() {
        let host = Uuid::new_v4();
        let error = Error::ActivatedOnAnotherHost { volume: "v".to_owned(), host };
        assert_eq!(error.code().1, ["Activated_on_another_host".to_owned(), host.to_string()]);
    }
}
