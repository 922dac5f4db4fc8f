//! What a plugin advertises against what can be called, both ways round.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use super::bench::{DBG, MIB, uri_of};
use super::{Bench, Group, Need};
use crate::script::script_path;
use crate::wire::Request;

/// Whose list of features counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum List {
    Volume,
    Datapath,
}

/// Features that no script shows by itself, and the scripts that each needs (ocaml/xapi/smint.ml,
/// ocaml/xapi-storage-script/main.ml).
const SCRIPTS: &[(List, &str, &[&str])] = &[
    (List::Volume, "VDI_MIRROR", &["Data.mirror", "Data.stat"]),
    (List::Volume, "VDI_MIRROR_IN", &["Datapath.attach", "Datapath.activate"]),
    (List::Volume, "VDI_REVERT", &["Volume.revert"]),
    (List::Volume, "VDI_COMPOSE", &["Volume.compose"]),
    (List::Volume, "VDI_ACTIVATE_READONLY", &["Datapath.activate_readonly"]),
    (List::Volume, "VDI_RESIZE_ONLINE", &["Volume.resize"]),
    (
        List::Volume,
        "VDI_CONFIG_CBT",
        &["Volume.enable_cbt", "Volume.disable_cbt", "Volume.data_destroy", "Volume.list_changed_blocks"],
    ),
    (
        List::Volume,
        "VDI_ATTACH_OFFLINE",
        &[
            "SR.attach",
            "Volume.stat",
            "Datapath.attach",
            "Datapath.activate",
            "Datapath.deactivate",
            "Datapath.detach",
        ],
    ),
    (List::Datapath, "NONPERSISTENT", &["Datapath.open", "Datapath.close"]),
    (List::Datapath, "VDI_MIRROR_IN", &["Datapath.import_activate"]),
];

/// Scripts that nobody calls unless a feature says so.
const OPTIONAL: &[(&str, List, &str)] = &[
    ("Data.mirror", List::Volume, "VDI_MIRROR"),
    ("Volume.revert", List::Volume, "VDI_REVERT"),
    ("Volume.compose", List::Volume, "VDI_COMPOSE"),
    ("Datapath.activate_readonly", List::Volume, "VDI_ACTIVATE_READONLY"),
    ("Volume.enable_cbt", List::Volume, "VDI_CONFIG_CBT"),
    ("Volume.disable_cbt", List::Volume, "VDI_CONFIG_CBT"),
    ("Volume.data_destroy", List::Volume, "VDI_CONFIG_CBT"),
    ("Volume.list_changed_blocks", List::Volume, "VDI_CONFIG_CBT"),
    ("Datapath.import_activate", List::Datapath, "VDI_MIRROR_IN"),
];

/// What xapi knows beside those that it finds by the scripts, with those that promise nothing that can be called.
const KNOWN: &[&str] = &[
    "LARGE_VDI",
    "THIN_PROVISIONING",
    "SR_STATS",
    "SR_TRIM",
    "SR_MULTIPATH",
    "SR_CACHING",
    "SR_SUPPORTS_LOCAL_CACHING",
    "SR_METADATA",
    "VDI_GENERATE_CONFIG",
    "VDI_READ_CACHING",
    "VDI_RESET_ON_BOOT",
];

/// What every plugin has, or what a script shows by itself; harmless to say again.
const IMPLIED: &[&str] = &[
    "SR_CREATE",
    "SR_DELETE",
    "SR_ATTACH",
    "SR_DETACH",
    "SR_SCAN",
    "SR_PROBE",
    "SR_UPDATE",
    "VDI_CREATE",
    "VDI_DELETE",
    "VDI_DESTROY",
    "VDI_ATTACH",
    "VDI_DETACH",
    "VDI_ACTIVATE",
    "VDI_DEACTIVATE",
    "VDI_CLONE",
    "VDI_SNAPSHOT",
    "VDI_RESIZE",
    "VDI_UPDATE",
    "VDI_INTRODUCE",
];

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("every feature is one that xapi knows", &[], known);
    for (list, feature, scripts) in SCRIPTS {
        let title = match list {
            List::Volume => format!("{feature} is advertised only with {}", scripts.join(", ")),
            List::Datapath => format!("{feature} of the datapath is advertised only with {}", scripts.join(", ")),
        };
        group.add(title, &[], move |b| async move { has_scripts(&b, *list, feature, scripts) });
    }
    for (script, list, feature) in OPTIONAL {
        let title = format!("{script} is there only with the feature {feature}, without which nobody calls it");
        group.add(title, &[Need::Method(script)], move |b| async move {
            ensure!(advertised(&b, *list)?.iter().any(|known| known == feature), "{feature} is not advertised");
            Ok(())
        });
    }
    group.add("LARGE_VDI: a disk of more than 2 TiB can be made", &[Need::Feature("LARGE_VDI")], large);
    group.add("THIN_PROVISIONING: a new disk takes less than it holds", &[Need::Feature("THIN_PROVISIONING")], thin);
    group.add(
        "NONPERSISTENT: Datapath.open takes a disk that forgets",
        &[Need::Feature("NONPERSISTENT")],
        forgetting,
    );
    group.add(
        "VDI_RESIZE_ONLINE: a disk grows while a guest is connected",
        &[Need::Feature("VDI_RESIZE_ONLINE")],
        resize_online,
    );
}

/// The features of one of the lists, without the versions behind them.
fn advertised(b: &Bench, list: List) -> Result<Vec<String>> {
    let bare = |feature: &String| feature.split('/').next().unwrap_or_default().to_owned();
    Ok(match list {
        List::Volume => b.host.volume_plugin(&b.subject.sr_type)?.query.features.iter().map(bare).collect(),
        List::Datapath => b.host.datapath_plugins.values().flat_map(|p| &p.query.features).map(bare).collect(),
    })
}

async fn known(b: Arc<Bench>) -> Result<()> {
    for list in [List::Volume, List::Datapath] {
        for feature in advertised(&b, list)? {
            let by_scripts = SCRIPTS.iter().any(|(_, known, _)| *known == feature);
            let known = by_scripts || KNOWN.contains(&feature.as_str()) || IMPLIED.contains(&feature.as_str());
            ensure!(known, "the {list:?} plugin advertises {feature:?}");
        }
    }
    Ok(())
}

fn has_scripts(b: &Bench, list: List, feature: &str, scripts: &[&'static str]) -> Result<()> {
    if !advertised(b, list)?.iter().any(|known| known == feature) {
        return Ok(());
    }
    for script in scripts {
        let Ok(found) = b.script(script) else { bail!("{feature} is advertised without {script}") };
        let Some(dir) = found.parent() else { bail!("{} is in no directory", found.display()) };
        script_path(dir, script).with_context(|| format!("{feature} is advertised, but {script} cannot be run"))?;
    }
    Ok(())
}

async fn large(b: Arc<Bench>) -> Result<()> {
    let volume = b.create((2 << 40) + MIB).await?;
    ensure!(volume.virtual_size > 2 << 40, "{volume:?}");
    b.start(&volume, "7").await?;
    b.unplug(&volume, "7").await
}

async fn thin(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(64 * MIB).await?;
    ensure!(volume.physical_utilisation < volume.virtual_size / 2, "{volume:?}");
    Ok(())
}

async fn forgetting(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let opened = b.call(&Request::datapath_open(DBG, uri_of(&volume)?, false)).await;
    opened?;
    b.start(&volume, "7").await?;
    b.unplug(&volume, "7").await?;
    b.call(&Request::datapath_close(DBG, uri_of(&volume)?)).await.map(drop)
}

async fn resize_online(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(2 * MIB).await?;
    let client = crate::nbd::Client::connect(&b.plug(&volume, "7").await?).await?;
    b.resize(&volume.key, 4 * MIB).await?;
    client.write(0, vec![1; 4096].into()).await?;
    client.disconnect().await;
    b.unplug(&volume, "7").await
}
