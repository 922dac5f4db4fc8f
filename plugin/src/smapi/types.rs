//! The types of SMAPIv3's answers, as xapi-storage-script decodes them.
//!
//! Two rules hold throughout, seen with the real daemon: an optional field that is unset is left out, never `null`,
//! and an integer is written as one (`1`, not `1.0`). The published types are in xen-api's
//! `ocaml/xapi-storage/generator/lib/`.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::Error;
use crate::id::{MirrorKey, Shortened, VolumeKey};

/// A volume's keys, set by xapi and given back as they are.
pub type Keys = BTreeMap<String, String>;

/// A device-config: what xapi keeps in each PBD.
pub type Configuration = BTreeMap<String, String>;

/// What kind of data a volume holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeType {
    /// Data of a guest.
    Data,
    /// Only the record of changed blocks: the data was destroyed.
    #[serde(rename = "CBT_Metadata")]
    CbtMetadata,
}

/// A volume, as Volume.stat and SR.ls give it.
#[derive(Clone, Debug, Serialize)]
pub struct VolumeRecord {
    /// The key by which xapi names the volume.
    pub key: VolumeKey,
    /// The same: xapi takes one for the other.
    pub uuid: VolumeKey,
    /// The name for people.
    pub name: String,
    /// The description for people.
    pub description: String,
    /// Whether it may be written to.
    pub read_write: bool,
    /// Whether several domains may write to it at once.
    pub sharable: bool,
    /// The size that a guest sees, in bytes.
    pub virtual_size: u64,
    /// What the volume's own node takes on the SR, in bytes.
    pub physical_utilisation: u64,
    /// The URIs at which the datapath plugin finds it.
    pub uri: Vec<String>,
    /// The keys that xapi set.
    pub keys: Keys,
    /// What kind of data it holds.
    pub volume_type: VolumeType,
    /// Whether changed blocks are tracked.
    pub cbt_enabled: bool,
}

/// Which blocks differ between two volumes, as Volume.list_changed_blocks gives it.
#[derive(Clone, Debug, Serialize)]
pub struct ChangedBlocks {
    /// How many bytes a bit stands for.
    pub granularity: u64,
    /// The bits in base64, the first block in the highest bit of the first byte.
    #[serde(serialize_with = "base64")]
    pub bitmap: Vec<u8>,
}

/// Ranges of blocks, as Volume.compare gives them.
#[derive(Clone, Debug, Serialize)]
pub struct BlockList {
    /// The size of a block in bytes.
    pub blocksize: u64,
    /// The ranges, each its first block and the number of blocks.
    pub ranges: Vec<(u64, u64)>,
}

/// Writes bytes as base64 (RFC 4648, section 4).
fn base64<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let group = three.iter().chain([0; 2].iter()).take(3).fold(0, |group, byte| group << 8 | usize::from(*byte));
        for digit in 0..4 {
            let value = group >> (18 - 6 * digit) & 63;
            text.push(if digit <= three.len() { char::from(DIGITS[value]) } else { '=' });
        }
    }
    serializer.serialize_str(&text)
}

/// An SR's health.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// All is well.
    Healthy(String),
    /// It is being brought back.
    Recovering(String),
    /// It cannot be reached now.
    Unreachable(String),
    /// It cannot be used.
    Unavailable(String),
}

impl Serialize for Health {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let pair = match self {
            Self::Healthy(reason) => ("Healthy", reason),
            Self::Recovering(reason) => ("Recovering", reason),
            Self::Unreachable(reason) => ("Unreachable", reason),
            Self::Unavailable(reason) => ("Unavailable", reason),
        };
        pair.serialize(serializer)
    }
}

/// An SR, as SR.stat gives it.
#[derive(Clone, Debug, Serialize)]
pub struct SrStat {
    /// What SR.attach gave.
    pub sr: String,
    /// The name for people.
    pub name: String,
    /// The SR's uuid.
    pub uuid: String,
    /// The description for people.
    pub description: String,
    /// Free bytes of the file system.
    pub free_space: u64,
    /// All bytes of the file system.
    pub total_space: u64,
    /// Sources of metrics; none.
    pub datasources: Vec<String>,
    /// Whether the SR needs a cluster stack.
    pub clustered: bool,
    /// Its health.
    pub health: Health,
}

/// One SR, or one place for an SR, as SR.probe gives it.
#[derive(Clone, Debug, Serialize)]
pub struct ProbeResult {
    /// The device-config that leads there.
    pub configuration: Configuration,
    /// Whether the device-config is all that SR.attach needs.
    pub complete: bool,
    /// The SR that is there, if one is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sr: Option<SrStat>,
    /// More for people.
    pub extra_info: BTreeMap<String, String>,
}

/// What a plugin says of itself.
#[derive(Clone, Debug, Serialize)]
pub struct QueryResult {
    /// The SR type, or the URI scheme.
    pub plugin: &'static str,
    /// The name for people.
    pub name: &'static str,
    /// The description for people.
    pub description: &'static str,
    /// Who made it.
    pub vendor: &'static str,
    /// Whose it is.
    pub copyright: &'static str,
    /// The plugin's version.
    pub version: &'static str,
    /// The version of SMAPIv3.
    pub required_api_version: &'static str,
    /// What works, in xapi's words (xen-api `ocaml/xapi/smint.ml`).
    pub features: Vec<&'static str>,
    /// The device-config's keys, each with a description.
    pub configuration: BTreeMap<&'static str, &'static str>,
    /// The cluster stacks it needs; none.
    pub required_cluster_stack: Vec<String>,
}

/// One way to reach an attached volume, as Datapath.attach gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// For xenopsd: how the backend of a virtual disk is set up. xapi wants one for every disk of a guest.
    XenDisk(XenDisk),
    /// A block device of this host.
    BlockDevice {
        /// Its path.
        path: String,
    },
    /// An NBD export, `nbd:unix:<socket>:exportname=<name>`.
    Nbd {
        /// Its URI; xapi splits it on colons into exactly four parts.
        uri: String,
    },
}

impl Serialize for Backend {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::XenDisk(disk) => ("XenDisk", disk).serialize(serializer),
            Self::BlockDevice { path } => ("BlockDevice", BTreeMap::from([("path", path)])).serialize(serializer),
            Self::Nbd { uri } => ("Nbd", BTreeMap::from([("uri", uri)])).serialize(serializer),
        }
    }
}

/// The payload of [`Backend::XenDisk`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct XenDisk {
    /// The backend's parameters, put into xenstore.
    pub params: String,
    /// More keys for xenstore.
    pub extra: BTreeMap<String, String>,
    /// The backend's kind.
    pub backend_type: String,
}

/// A data operation, as Data.mirror gives it and Data.stat takes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "(String, String)", try_from = "(String, String)")]
pub enum Operation {
    /// A copy.
    CopyV1(String),
    /// A mirror.
    MirrorV1(String),
}

impl Operation {
    /// Names a copy.
    pub fn copy(key: MirrorKey) -> Self {
        Self::CopyV1(key.to_string())
    }

    /// Names a mirror.
    pub fn mirror(key: MirrorKey) -> Self {
        Self::MirrorV1(key.to_string())
    }
}

impl From<Operation> for (String, String) {
    fn from(operation: Operation) -> Self {
        match operation {
            Operation::CopyV1(key) => ("CopyV1".to_owned(), key),
            Operation::MirrorV1(key) => ("MirrorV1".to_owned(), key),
        }
    }
}

impl TryFrom<(String, String)> for Operation {
    type Error = Error;

    fn try_from((tag, key): (String, String)) -> Result<Self, Error> {
        match tag.as_str() {
            "CopyV1" => Ok(Self::CopyV1(key)),
            "MirrorV1" => Ok(Self::MirrorV1(key)),
            _ => Err(Error::BadRequest(format!("{:?} is not a kind of operation", Shortened(&tag)))),
        }
    }
}

/// The state of a data operation, as Data.stat gives it.
///
/// xapi tests `complete` before `failed` (xen-api `ocaml/xapi/storage_smapiv3_migrate.ml`), so a failure is only
/// seen with `complete` false; the constructors keep to that.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct DataStatus {
    failed: bool,
    complete: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    progress: Option<f64>,
}

impl DataStatus {
    /// The operation goes on; `progress` is between 0 and 1.
    pub fn running(progress: f64) -> Self {
        Self { failed: false, complete: false, progress: Some(progress.clamp(0.0, 1.0)) }
    }

    /// The destination has everything; a mirror of a live leaf goes on mirroring.
    pub fn complete() -> Self {
        Self { failed: false, complete: true, progress: Some(1.0) }
    }

    /// The operation failed.
    pub fn failed() -> Self {
        Self { failed: true, complete: false, progress: None }
    }

    /// Tells whether the operation goes on and is not complete.
    pub fn is_running(&self) -> bool {
        !self.failed && !self.complete
    }
}

/// Decodes a value that may be absent but not `null`; for `#[serde(default, deserialize_with = …)]`.
///
/// # Errors
///
/// Those of the value itself.
pub fn not_null<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    T::deserialize(deserializer).map(Some)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_failure_is_never_complete() {
        let text = serde_json::to_string(&DataStatus::failed()).unwrap();
        assert_eq!(text, r#"{"failed":true,"complete":false}"#);
    }

    #[test]
    fn bitmaps_are_base64() {
        for (bytes, text) in
            [(&b""[..], ""), (b"f", "Zg=="), (b"fo", "Zm8="), (b"foo", "Zm9v"), (b"foob\xff\x80", "Zm9vYv+A")]
        {
            let blocks = ChangedBlocks { granularity: 65536, bitmap: bytes.to_vec() };
            assert_eq!(serde_json::to_value(blocks).unwrap(), json!({"granularity": 65536, "bitmap": text}));
        }
    }

    #[test]
    fn variants_are_pairs() {
        let cases = [
            (serde_json::to_value(Health::Healthy(String::new())), json!(["Healthy", ""])),
            (serde_json::to_value(Backend::Nbd { uri: "u".to_owned() }), json!(["Nbd", {"uri": "u"}])),
            (serde_json::to_value(Operation::MirrorV1("k".to_owned())), json!(["MirrorV1", "k"])),
        ];
        for (value, expected) in cases {
            assert_eq!(value.unwrap(), expected);
        }
        assert!(serde_json::from_value::<Operation>(json!(["MoveV1", "k"])).is_err());
    }
}
