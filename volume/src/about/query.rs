//! Plugin.Query: what this plugin is and what works.

use std::collections::BTreeMap;

use plugin::error::Result;
use plugin::host::Host;
use plugin::smapi::QueryResult;
use serde::Deserialize;

/// What works, beside what xapi-storage-script sees by the scripts that are there.
const FEATURES: &[&str] = &[
    "VDI_MIRROR",
    "VDI_MIRROR_IN",
    "VDI_REVERT",
    "VDI_COMPOSE",
    "VDI_ACTIVATE_READONLY",
    "VDI_ATTACH_OFFLINE",
    "VDI_CONFIG_CBT",
    "THIN_PROVISIONING",
    "LARGE_VDI",
];

/// Nothing is asked.
#[derive(Debug, Deserialize)]
pub struct Parameters {}

/// Describes the plugin.
///
/// # Errors
///
/// None.
pub fn execute(_: &Host, _: Parameters) -> Result<QueryResult> {
    Ok(QueryResult {
        plugin: "qcow2",
        name: "qcow2 files in a directory",
        description: "Trees of qcow2 files in a directory of a local or shared file system",
        vendor: "xapi-storage-qcow2",
        copyright: "LGPL-2.1-or-later",
        version: env!("CARGO_PKG_VERSION"),
        required_api_version: "5.0",
        features: FEATURES.to_vec(),
        configuration: BTreeMap::from([
            ("uri", "The SR's directory: file:///absolute/path, percent-encoded"),
            ("verify", "true: compare source and destination after a mirror that sent only a difference"),
        ]),
        required_cluster_stack: Vec::new(),
    })
}
