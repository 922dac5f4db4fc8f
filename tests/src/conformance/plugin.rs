//! What a plugin says of itself.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::bench::DBG;
use super::request::METHODS;
use super::{Bench, Group, Need};
use crate::script::script_path;
use crate::wire::{Json, Plugin, Request};

/// The features that xapi knows (ocaml/xapi/smint.ml), by which script has to be there for each.
const FEATURES: &[(&str, &str)] = &[
    ("SR_PROBE", "SR.probe"),
    ("SR_UPDATE", "SR.stat"),
    ("VDI_CREATE", "Volume.create"),
    ("VDI_DESTROY", "Volume.destroy"),
    ("VDI_SNAPSHOT", "Volume.snapshot"),
    ("VDI_CLONE", "Volume.clone"),
    ("VDI_RESIZE", "Volume.resize"),
    ("VDI_MIRROR", "Data.mirror"),
    ("VDI_REVERT", "Volume.revert"),
    ("VDI_COMPOSE", "Volume.compose"),
    ("VDI_CONFIG_CBT", "Volume.list_changed_blocks"),
    ("VDI_ACTIVATE_READONLY", "Datapath.activate_readonly"),
    ("VDI_MIRROR_IN", "Datapath.attach"),
    ("NONPERSISTENT", "Datapath.open"),
];

/// What xapi does with any SR and any disk, the script by which, and the scripts of which one has to be there for it to
/// get so far; none if it does in any case (ocaml/xapi-storage-script/main.ml).
const NEEDED: &[(&str, &str, &[&str])] = &[
    ("PBD.plug attaches the SR", "SR.attach", &[]),
    ("PBD.plug asks what was attached", "SR.stat", &[]),
    ("PBD.unplug detaches the SR", "SR.detach", &[]),
    ("a scan lists the volumes", "SR.ls", &[]),
    ("every call of a datapath asks for the volume's URI before", "Volume.stat", &[]),
    ("VDI.create, snapshot and clone store what kind of a disk it is", "Volume.set", MAKERS),
    ("VDI.destroy destroys the volume", "Volume.destroy", MAKERS),
    ("VBD.plug attaches the volume", "Datapath.attach", &[]),
    ("VBD.plug activates the volume", "Datapath.activate", &[]),
    ("VBD.unplug deactivates the volume", "Datapath.deactivate", &[]),
    ("VBD.unplug detaches the volume", "Datapath.detach", &[]),
];

/// The scripts that make volumes.
const MAKERS: &[&str] = &["Volume.create", "Volume.snapshot", "Volume.clone"];

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("Plugin.Query of the volume plugin names the SR type and a known API version", &[], query);
    group.add("Plugin.Query of the datapath plugin names an API version that the daemon takes", &[], datapath_query);
    group.add("Plugin.Query advertises only features whose scripts are there", &[], features);
    group.add("the scripts are there without which xapi can do nothing with an SR and its disks", &[], needed);
    group.add("Plugin.diagnostics answers a text", &[Need::Method("Plugin.diagnostics")], diagnostics);
    group.add("Plugin.ls lists the attached SRs, and no detached one", &[Need::Method("Plugin.ls")], ls);
    group.add("every script accepts a dbg with a trace context behind a newline", &[], trace_context);
    group.add("every script works when the observer runs it, as with tracing on", &[Need::Observer], observed);
}

async fn query(b: Arc<Bench>) -> Result<()> {
    let query = Plugin::decode(&b.call(&Request::query(DBG)).await?)?;
    ensure!(query.plugin == b.subject.sr_type, "the plugin is called {:?}", query.plugin);
    ensure!(["3.0", "5.0"].contains(&query.required_api_version.as_str()), "{:?}", query.required_api_version);
    ensure!(!query.name.is_empty() && !query.version.is_empty(), "{query:?}");
    for (key, _) in &b.subject.config {
        ensure!(query.configuration.iter().any(|(k, _)| k == key), "device-config {key} is not described: {query:?}");
    }
    Ok(())
}

async fn datapath_query(b: Arc<Bench>) -> Result<()> {
    for (scheme, plugin) in &b.host.datapath_plugins {
        let version = &plugin.query.required_api_version;
        ensure!(["3.0", "5.0"].contains(&version.as_str()), "{scheme}: {version:?}");
    }
    Ok(())
}

async fn features(b: Arc<Bench>) -> Result<()> {
    let volume = b.host.volume_plugin(&b.subject.sr_type)?;
    let declared = volume.query.features.iter();
    for feature in declared.chain(b.host.datapath_plugins.values().flat_map(|plugin| &plugin.query.features)) {
        let bare = feature.split('/').next().unwrap_or_default();
        if let Some((_, method)) = FEATURES.iter().find(|(known, _)| *known == bare) {
            ensure!(b.script(method).is_ok(), "{feature} is advertised without {method}");
        }
    }
    Ok(())
}

async fn needed(b: Arc<Bench>) -> Result<()> {
    let is_there = |script: &&str| b.subject.lacks_script(script).is_none();
    let is_missing = |(_, script, makers): &&(&str, &str, &[&str])| {
        !is_there(script) && (makers.is_empty() || makers.iter().any(is_there))
    };
    let missing: Vec<_> =
        NEEDED.iter().filter(is_missing).map(|(what, script, _)| format!("{what}: {script}")).collect();
    ensure!(missing.is_empty(), "there is no script by which\n{}", missing.join("\n"));
    Ok(())
}

async fn diagnostics(b: Arc<Bench>) -> Result<()> {
    let text = b.call(&Request::diagnostics(DBG)).await?.string("diagnostics")?;
    ensure!(!text.is_empty(), "the diagnostics are empty");
    Ok(())
}

async fn ls(b: Arc<Bench>) -> Result<()> {
    let list = Request::new("Plugin.ls", DBG, vec![]);
    let listed = b.call(&list).await?.strings("ls")?;
    ensure!(listed.contains(&b.sr.sr), "{listed:?} has not {}", b.sr.sr);
    let other = b.new_sr("other").await?;
    b.call(&Request::sr("SR.detach", DBG, &other.sr)).await?;
    let listed = b.call(&list).await?.strings("ls")?;
    ensure!(!listed.contains(&other.sr), "{listed:?} has the detached {}", other.sr);
    Ok(())
}

async fn trace_context(b: Arc<Bench>) -> Result<()> {
    let dbg = "task\n{\"traceparent\":\"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\"}";
    for method in METHODS.iter().copied() {
        if b.subject.lacks(Need::Method(method)).is_some() {
            continue;
        }
        let mut fields = super::request::fields(&super::request::valid(&b, method).await?)?;
        for (name, value) in &mut fields {
            if name == "dbg" {
                *value = Json::from(dbg);
            }
        }
        let script = b.script(method)?;
        ensure!(script_path(script.parent().context("a script is in a directory")?, method).is_ok(), "{method}");
        let printed = b.raw(method, Json::Object(fields).encode().as_bytes()).await?;
        let json = printed.judge()?.with_context(|| method.to_owned())?;
        super::answer::decode(method, &json).with_context(|| method.to_owned())?;
        if method == "Data.mirror" {
            let operation = crate::wire::Operation::decode(&json)?;
            b.data_wait(&operation).await?;
        }
    }
    Ok(())
}

async fn observed(b: Arc<Bench>) -> Result<()> {
    b.host.runner().trace(true);
    for method in METHODS.iter().copied() {
        if b.subject.lacks(Need::Method(method)).is_some() {
            continue;
        }
        let request = super::request::valid(&b, method).await.with_context(|| method.to_owned())?;
        let answer = b.call(&request).await?;
        if method == "Data.mirror" {
            b.data_wait(&crate::wire::Operation::decode(&answer)?).await?;
        }
    }
    b.host.runner().trace(false);
    Ok(())
}
