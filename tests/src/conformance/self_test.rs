//! What xapi-storage-script's own self-test calls, in its order and under the name that is built into it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use uuid::Uuid;

use super::bench::{DBG, MIB};
use super::{Bench, Group};
use crate::host::{Host, PluginSource};
use crate::script::CallLog;
use crate::smapiv2::{Sr, VdiInfo};
use crate::wire::Request;

/// ocaml/xapi-storage-script/main.ml, `self_test`.
const DUMMY: &str = "org.xen.xapi.storage.dummyv5";

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("the sequence of xapi-storage-script's self-test ends well under the name dummyv5", &[], sequence);
}

/// The self-test gives an SR that is no uuid, a device-config of its own and a disk of no bytes; what is sent here is
/// what xapi would send in their places.
async fn sequence(b: Arc<Bench>) -> Result<()> {
    let kind = b.subject.sr_type.as_str();
    let plugins = PluginSource::Existing(under_another_name(&b)?);
    let host = Host::start("self-test", &b.directory().join("t"), &plugins, &CallLog::default())
        .await
        .context("the plugin cannot be registered as dummyv5")?;
    let dir = host.volume_plugin(kind)?.dir.clone();
    ensure!(dir.ends_with(DUMMY), "{} is registered instead", dir.display());

    host.runner().call(&dir, &Request::diagnostics("debug")).await?.string("diagnostics")?;
    let place = b.new_place("dummy")?;
    let sr = Sr(Uuid::new_v4().to_string());
    let config = host.sr_create("debug", kind, &sr, &place, "dummy name", "dummy description").await?;
    host.sr_detach("debug", &sr).await?;
    host.sr_attach("debug", kind, &sr, &config).await?;
    let wanted = VdiInfo { ty: "redolog".to_owned(), ..VdiInfo::blank("vdi name", MIB) };
    let vdi = host.vdi_create("debug", &sr, &wanted).await?;
    let stat = host.vdi_stat("debug", &sr, &vdi.vdi).await?;
    ensure!(stat.ty == "redolog", "{stat:?}");
    host.vdi_destroy("debug", &sr, &vdi.vdi).await?;
    host.sr_stat("debug", &sr).await?;
    let left = host.sr_scan("debug", &sr).await?;
    ensure!(left.is_empty(), "the scan still finds {left:?}");
    if host.volume_plugin(kind)?.has("SR_PROBE") {
        host.sr_probe(DBG, kind, &config).await?;
    }
    host.sr_destroy("debug", &sr).await?;
    host.close();
    Ok(())
}

/// Makes a root in which the same scripts are a plugin of the self-test's name.
fn under_another_name(b: &Bench) -> Result<PathBuf> {
    let root = b.directory().join("p");
    link_scripts(&b.host.volume_plugin(&b.subject.sr_type)?.dir, &root.join("volume").join(DUMMY))?;
    for (scheme, plugin) in &b.host.datapath_plugins {
        link_scripts(&plugin.dir, &root.join("datapath").join(scheme))?;
    }
    Ok(root)
}

fn link_scripts(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        std::os::unix::fs::symlink(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}
