//! What Datapath and Data scripts answer.

use super::json::{Json, Malformed};

/// One way to reach an attached volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Implementation {
    /// A backend for Xen's block protocol.
    XenDisk {
        /// What the backend is told.
        params: String,
        /// More xenstore keys.
        extra: Vec<(String, String)>,
        /// The device kind.
        backend_type: String,
    },
    /// A block device of dom0.
    BlockDevice {
        /// Its path.
        path: String,
    },
    /// A file of dom0.
    File {
        /// Its path.
        path: String,
    },
    /// An NBD server.
    Nbd {
        /// `nbd:unix:<socket>:exportname=<name>`
        uri: String,
    },
}

impl Implementation {
    fn decode(value: &Json, at: &str) -> Result<Self, Malformed> {
        let (tag, payload) = value.variant(at)?;
        let f = payload.fields(at)?;
        match tag {
            "XenDisk" => Ok(Self::XenDisk {
                params: f.required("params", Json::string)?,
                extra: f.required("extra", Json::string_map)?,
                backend_type: f.required("backend_type", Json::string)?,
            }),
            "BlockDevice" => Ok(Self::BlockDevice { path: f.required("path", Json::string)? }),
            "File" => Ok(Self::File { path: f.required("path", Json::string)? }),
            "Nbd" => Ok(Self::Nbd { uri: f.required("uri", Json::string)? }),
            _ => Err(Malformed::new(at, "XenDisk, BlockDevice, File or Nbd", value)),
        }
    }
}

/// The answer of `Datapath.attach`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// The ways to reach the volume, in the plugin's order.
    pub implementations: Vec<Implementation>,
}

impl Attached {
    /// Decodes the answer; one unknown tag fails all of it.
    pub fn decode(value: &Json) -> Result<Self, Malformed> {
        let f = value.fields("attached")?;
        let implementations = f.required("implementations", |v, at| {
            v.array(at)?
                .iter()
                .enumerate()
                .map(|(i, v)| Implementation::decode(v, &format!("{at}[{i}]")))
                .collect::<Result<Vec<_>, _>>()
        })?;
        Ok(Self { implementations })
    }

    /// The NBD server that xapi uses: the last one listed, because it folds over the list.
    #[must_use]
    pub fn nbd(&self) -> Option<&str> {
        self.implementations.iter().rev().find_map(|i| match i {
            Implementation::Nbd { uri } => Some(uri.as_str()),
            _ => None,
        })
    }

    /// Whether xenopsd can make a VBD of it.
    #[must_use]
    pub fn has_xen_disk(&self) -> bool {
        self.implementations.iter().any(|i| matches!(i, Implementation::XenDisk { .. }))
    }

    /// A device or a file of dom0, which xapi prefers to NBD where it reads a disk itself.
    #[must_use]
    pub fn path(&self) -> Option<&str> {
        self.implementations.iter().rev().find_map(|i| match i {
            Implementation::BlockDevice { path } | Implementation::File { path } => Some(path.as_str()),
            _ => None,
        })
    }
}

/// What `Data.mirror` started and `Data.stat` is asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// A copy that ends by itself.
    Copy(String),
    /// A mirror.
    Mirror(String),
}

impl Operation {
    /// Decodes the answer of `Data.mirror`.
    pub fn decode(value: &Json) -> Result<Self, Malformed> {
        let (tag, payload) = value.variant("operation")?;
        let key = payload.string("operation")?;
        match tag {
            "CopyV1" => Ok(Self::Copy(key)),
            "MirrorV1" => Ok(Self::Mirror(key)),
            _ => Err(Malformed::new("operation", "CopyV1 or MirrorV1", value)),
        }
    }

    /// Encodes it for `Data.stat`, `Data.cancel` and `Data.destroy`.
    #[must_use]
    pub fn to_json(&self) -> Json {
        let (tag, key) = match self {
            Self::Copy(key) => ("CopyV1", key),
            Self::Mirror(key) => ("MirrorV1", key),
        };
        Json::Array(vec![Json::from(tag), Json::from(key)])
    }
}

/// The answer of `Data.stat`.
#[derive(Debug, Clone, PartialEq)]
pub struct MirrorStatus {
    /// The mirror broke. xapi looks at `complete` first.
    pub failed: bool,
    /// The first synchronisation is done.
    pub complete: bool,
    /// How far it is, 0 to 1.
    pub progress: Option<f64>,
}

impl MirrorStatus {
    /// Decodes the answer.
    pub fn decode(value: &Json) -> Result<Self, Malformed> {
        let f = value.fields("status")?;
        Ok(Self {
            failed: f.required("failed", Json::bool)?,
            complete: f.required("complete", Json::bool)?,
            progress: f.optional("progress", Json::number)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attached(text: &str) -> Result<Attached, Malformed> {
        Attached::decode(&Json::parse(text.as_bytes()).unwrap())
    }

    #[test]
    fn one_unknown_implementation_fails_the_whole_answer() {
        assert!(attached(r#"{"implementations":[["File",{"path":"/f"}]]}"#).is_ok());
        for bad in [
            r#"{"implementations":[["File",{"path":"/f"}],["Tape",{"path":"/t"}]]}"#,
            r#"{"implementations":[["XenDisk",{"params":"","backend_type":"qdisk"}]]}"#,
            r#"{"implementations":[["XenDisk",{"params":"","extra":[],"backend_type":"qdisk"}]]}"#,
            r#"{"implementations":[["XenDisk",{"params":"","extra":null,"backend_type":"qdisk"}]]}"#,
            r#"{"implementations":["Nbd"]}"#,
            r#"{"implementations":{}}"#,
            "{}",
        ] {
            assert!(attached(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn the_last_nbd_server_is_the_one_used() {
        let answer = attached(r#"{"implementations":[["Nbd",{"uri":"a"}],["Nbd",{"uri":"b"}]]}"#).unwrap();
        assert_eq!(answer.nbd(), Some("b"));
    }

    #[test]
    fn a_status_is_strict_about_booleans_and_null() {
        let status = |text: &str| MirrorStatus::decode(&Json::parse(text.as_bytes()).unwrap());
        assert!(status(r#"{"failed":false,"complete":true}"#).is_ok());
        assert_eq!(status(r#"{"failed":false,"complete":true,"progress":1}"#).unwrap().progress, Some(1.0));
        for bad in [
            r#"{"failed":false,"complete":true,"progress":null}"#,
            r#"{"failed":"false","complete":true}"#,
            r#"{"failed":0,"complete":true}"#,
            r#"{"complete":true}"#,
        ] {
            assert!(status(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn an_operation_is_one_of_two_tags() {
        let decode = |text: &str| Operation::decode(&Json::parse(text.as_bytes()).unwrap());
        assert_eq!(decode(r#"["MirrorV1","k"]"#), Ok(Operation::Mirror("k".into())));
        for bad in [r#""MirrorV1""#, r#"["MirrorV2","k"]"#, r#"["MirrorV1",1]"#, r#"["MirrorV1","k","l"]"#] {
            assert!(decode(bad).is_err(), "{bad} was accepted");
        }
    }
}
