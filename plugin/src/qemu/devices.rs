//! The nodes of a daemon's block graph, as the daemon describes them.

use serde::Deserialize;
use serde_json::{Value, json};

use super::qmp::Client;
use crate::error::{Error, Result};

/// The command that lists nodes.
const QUERY_NODES: &str = "query-named-block-nodes";

/// A node (QAPI BlockDeviceInfo).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Device {
    /// Its name; QEMU's own nodes may have none.
    #[serde(rename = "node-name", default)]
    pub name: Option<String>,
    /// The file of the node that it lies on, where it has one.
    #[serde(default)]
    pub backing_file: Option<String>,
    /// What it is an image of.
    image: ImageInfo,
    /// What is noted of writes to it.
    #[serde(rename = "dirty-bitmaps", default)]
    pub bitmaps: Vec<Bitmap>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ImageInfo {
    virtual_size: u64,
}

/// A bitmap of a node (QAPI BlockDirtyInfo).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Bitmap {
    /// Its name; those of jobs have none.
    #[serde(default)]
    pub name: Option<String>,
    /// How many bytes it has noted.
    #[serde(rename = "count")]
    pub bytes: u64,
}

impl Device {
    /// Gives the size that a reader of the node sees, in bytes.
    pub fn size(&self) -> u64 {
        self.image.virtual_size
    }

    /// Finds a bitmap by its name.
    pub fn bitmap(&self, name: &str) -> Option<&Bitmap> {
        self.bitmaps.iter().find(|bitmap| bitmap.name.as_deref() == Some(name))
    }
}

/// Lists a daemon's nodes, the last one added first.
///
/// # Errors
///
/// When the daemon does not answer.
pub async fn devices(client: &Client) -> Result<Vec<Device>> {
    decode(QUERY_NODES, Some(client.execute(QUERY_NODES, json!({"flat": true})).await))
}

/// Describes one node; `None` when there is none of this name.
///
/// # Errors
///
/// When the daemon does not answer.
pub async fn device(client: &Client, name: &str) -> Result<Option<Device>> {
    Ok(devices(client).await?.into_iter().find(|device| device.name.as_deref() == Some(name)))
}

/// Decodes a command's answer.
pub(super) fn decode<T: serde::de::DeserializeOwned>(command: &str, answer: Option<Result<Value>>) -> Result<T> {
    let answer = answer.ok_or_else(|| Error::Internal(format!("QMP {command} was not sent")))??;
    serde_json::from_value(answer).map_err(|error| Error::Qemu {
        doing: format!("QMP {command}"),
        reason: format!("its answer cannot be read: {error}"),
    })
}
