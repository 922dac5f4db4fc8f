//! Plugin.Query: what this plugin is and what works.

use std::collections::BTreeMap;

use plugin::error::Result;
use plugin::host::Host;
use plugin::id::SCHEME;
use plugin::smapi::QueryResult;
use serde::Deserialize;

/// What works, beside what xapi-storage-script sees by the scripts that are there.
///
/// Of a datapath plugin's features it reads two (xen-api `ocaml/xapi-storage-script/main.ml`): `NONPERSISTENT`, that
/// Datapath.open can forget a guest's writes, and `VDI_MIRROR_IN`, that there is Datapath.import_activate.
const FEATURES: &[&str] = &["VDI_MIRROR_IN", "NONPERSISTENT"];

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
        plugin: SCHEME,
        name: "QEMU's storage daemon",
        description: "Volumes of qcow2 SRs, each served over NBD by a storage daemon of its own",
        vendor: "xapi-storage-qcow2",
        copyright: "LGPL-2.1-or-later",
        version: env!("CARGO_PKG_VERSION"),
        required_api_version: "5.0",
        features: FEATURES.to_vec(),
        configuration: BTreeMap::new(),
        required_cluster_stack: Vec::new(),
    })
}
