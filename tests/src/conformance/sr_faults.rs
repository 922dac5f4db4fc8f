//! An SR whose files are missing or damaged is an error that names the file, and never an empty SR.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::bench::{DBG, MIB, refused};
use super::{Bench, Group, Need};
use crate::disk::Sr;
use crate::wire::{Failure, Health, Request, SrStat, Volume};

const OWN: Need = Need::OwnLayout;

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("an SR whose directory is gone is an error and not an empty SR", &[OWN], directory_gone);
    group.add("an SR whose mount point is empty is an error and not an empty SR", &[OWN], not_mounted);
    group.add("an SR that turns out to be another one is refused", &[OWN], wrong_uuid);
    group.add("an SR record that is torn at any byte is an error that names the file", &[OWN], torn_sr);
    group.add("an SR record of a newer format is refused politely", &[OWN], newer_sr);
    group.add("a tree record that is torn at any byte is an error that names the file", &[OWN], torn_tree);
    group.add("a tree record of a newer format is refused politely", &[OWN], newer_tree);
    group.add("a tree without its record is an error", &[OWN], record_gone);
    group.add("a node file that is missing is an error for its volume", &[OWN], node_gone);
    group.add("a node file whose header was tampered with is refused", &[OWN], bad_header);
    group.add("a damaged tree leaves the volumes of other trees usable", &[OWN], other_trees);
}

/// Sees that everything which looks at an SR is refused, by an error that names a file.
async fn all_refuse(b: &Bench, named: &Path) -> Result<()> {
    let name = named.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let requests = [
        Request::sr("SR.ls", DBG, &b.sr.sr),
        Request::sr_attach(DBG, &b.sr.config),
        Request::volume_create(DBG, &b.sr.sr, "n", "d", MIB, false),
        Request::sr("SR.destroy", DBG, &b.sr.sr),
    ];
    for request in requests {
        let failure = refused(b.call(&request).await).with_context(|| request.method.to_owned())?;
        names(&failure, &name).with_context(|| request.method.to_owned())?;
    }
    // SR.stat may say by its health what is wrong, or fail.
    match b.call(&Request::sr("SR.stat", DBG, &b.sr.sr)).await {
        Err(error) => refused::<()>(Err(error)).map(drop),
        Ok(json) => {
            let stat = SrStat::decode(&json, "stat")?;
            ensure!(!matches!(stat.health, Health::Healthy(_)), "broken, but {stat:?}");
            Ok(())
        }
    }
}

fn names(failure: &Failure, file: &str) -> Result<()> {
    let backtrace = failure.backtrace.as_ref().map(|b| b.error.as_str()).unwrap_or_default();
    let named = failure.params.iter().any(|p| p.contains(file)) || backtrace.contains(file);
    ensure!(named, "{failure} ({backtrace}) does not name {file}");
    Ok(())
}

async fn with_two(b: &Bench) -> Result<(Volume, Volume)> {
    let volume = b.create(MIB).await?;
    Ok((b.snapshot(&volume.key).await?, volume))
}

fn tree_record(b: &Bench, volume: &Volume) -> Result<PathBuf> {
    let sr = Sr::read(&b.sr.path)?;
    let tree = sr.tree_of(&volume.key).context("the volume is in a tree")?;
    Ok(b.sr.path.join("trees").join(&tree.uuid).join("tree.json"))
}

async fn directory_gone(b: Arc<Bench>) -> Result<()> {
    with_two(&b).await?;
    let (before, aside) = (b.ls().await?, b.directory().join("aside"));
    std::fs::rename(&b.sr.path, &aside)?;
    let checked = all_refuse(&b, &b.sr.path).await;
    ensure!(!b.sr.path.exists(), "the directory was made anew");
    std::fs::rename(&aside, &b.sr.path)?;
    checked?;
    b.attach_sr(&b.sr.config).await?;
    ensure!(b.ls().await? == before, "the SR is not as it was");
    Ok(())
}

async fn not_mounted(b: Arc<Bench>) -> Result<()> {
    let (_, volume) = with_two(&b).await?;
    let (before, aside) = (b.ls().await?, b.directory().join("aside"));
    std::fs::rename(&b.sr.path, &aside)?;
    std::fs::create_dir(&b.sr.path)?;
    let checked = all_refuse(&b, &b.sr.path).await;
    let stat = refused(b.stat(&volume.key).await);
    let destroyed = refused(b.destroy(&volume.key).await);
    let left: Vec<_> = std::fs::read_dir(&b.sr.path)?.flatten().map(|e| e.file_name()).collect();
    std::fs::remove_dir_all(&b.sr.path)?;
    std::fs::rename(&aside, &b.sr.path)?;
    checked?;
    ensure!(stat?.code != "Volume_does_not_exist", "the volume was taken for gone");
    destroyed.context("a volume of an SR that is not there is not destroyed")?;
    ensure!(left.is_empty(), "{left:?} was made in the empty directory");
    b.attach_sr(&b.sr.config).await?;
    ensure!(b.ls().await? == before, "the SR is not as it was");
    Ok(())
}

async fn wrong_uuid(b: Arc<Bench>) -> Result<()> {
    with_two(&b).await?;
    let path = b.sr.path.join("sr.json");
    let good = std::fs::read(&path)?;
    let mut record: Value = serde_json::from_slice(&good)?;
    record["uuid"] = json!(uuid::Uuid::new_v4().to_string());
    std::fs::write(&path, serde_json::to_vec(&record)?)?;
    let listed = refused(b.call(&Request::sr("SR.ls", DBG, &b.sr.sr)).await);
    let made = refused(b.create(MIB).await);
    std::fs::write(&path, good)?;
    names(&listed?, "sr.json")?;
    names(&made?, "sr.json")
}

/// A record cut at many lengths, and garbage in its place.
fn torn(good: &[u8]) -> Vec<Vec<u8>> {
    let step = (good.len() / 12).max(1);
    let mut contents: Vec<Vec<u8>> = (0..good.len()).step_by(step).map(|length| good[..length].to_vec()).collect();
    contents.push(good[..good.len() - 2].to_vec());
    contents.push(vec![0; good.len()]);
    contents.extend([b"{}".to_vec(), b"[]".to_vec(), b"null".to_vec(), [good, good].concat()]);
    contents
}

async fn torn_sr(b: Arc<Bench>) -> Result<()> {
    with_two(&b).await?;
    let path = b.sr.path.join("sr.json");
    let good = std::fs::read(&path)?;
    for bad in torn(&good) {
        std::fs::write(&path, &bad)?;
        let checked = all_refuse(&b, &path).await;
        std::fs::write(&path, &good)?;
        checked.with_context(|| format!("{} bytes: {:?}", bad.len(), String::from_utf8_lossy(&bad)))?;
    }
    Ok(())
}

async fn newer_sr(b: Arc<Bench>) -> Result<()> {
    let path = b.sr.path.join("sr.json");
    let good = std::fs::read(&path)?;
    let mut record: Value = serde_json::from_slice(&good)?;
    record["format"] = json!(999);
    record["something_new"] = json!({"a": [1]});
    std::fs::write(&path, serde_json::to_vec(&record)?)?;
    let checked = all_refuse(&b, Path::new("sr.json")).await;
    let attach = refused(b.attach_sr(&b.sr.config).await);
    std::fs::write(&path, good)?;
    checked?;
    names(&attach?, "999")
}

async fn tree_refuses(b: &Bench, volume: &Volume) -> Result<()> {
    let listed = refused(b.call(&Request::sr("SR.ls", DBG, &b.sr.sr)).await).context("SR.ls")?;
    names(&listed, "tree.json")?;
    for method in ["Volume.stat", "Volume.snapshot", "Volume.clone", "Volume.destroy"] {
        let failure = refused(b.call(&Request::volume(method, DBG, &b.sr.sr, &volume.key)).await).context(method)?;
        names(&failure, "tree.json").context(method)?;
    }
    refused(b.attach(volume, "7").await).context("Datapath.attach").map(drop).or_else(|_| {
        // Attaching needs nothing of the tree, but activating does.
        anyhow::Ok(())
    })?;
    let failure = refused(b.activate(volume, "7").await).context("Datapath.activate")?;
    names(&failure, "tree.json")?;
    if let Err(error) = b.datapath("Datapath.deactivate", volume, "7").await {
        refused::<()>(Err(error)).context("Datapath.deactivate")?;
    }
    b.datapath("Datapath.detach", volume, "7").await.context("a damaged volume must be detachable")
}

async fn torn_tree(b: Arc<Bench>) -> Result<()> {
    let (_, volume) = with_two(&b).await?;
    let before = b.ls().await?;
    let path = tree_record(&b, &volume)?;
    let good = std::fs::read(&path)?;
    for bad in torn(&good) {
        std::fs::write(&path, &bad)?;
        let checked = tree_refuses(&b, &volume).await;
        std::fs::write(&path, &good)?;
        checked.with_context(|| format!("{} bytes: {:?}", bad.len(), String::from_utf8_lossy(&bad)))?;
    }
    ensure!(b.ls().await? == before, "the SR is not as it was");
    Ok(())
}

async fn newer_tree(b: Arc<Bench>) -> Result<()> {
    let (_, volume) = with_two(&b).await?;
    let path = tree_record(&b, &volume)?;
    let good = std::fs::read(&path)?;
    let mut record: Value = serde_json::from_slice(&good)?;
    record["format"] = json!(999);
    record["something_new"] = json!(true);
    std::fs::write(&path, serde_json::to_vec(&record)?)?;
    let checked = tree_refuses(&b, &volume).await;
    let listed = refused(b.call(&Request::sr("SR.ls", DBG, &b.sr.sr)).await);
    std::fs::write(&path, good)?;
    checked?;
    names(&listed?, "999")
}

async fn record_gone(b: Arc<Bench>) -> Result<()> {
    let (_, volume) = with_two(&b).await?;
    let path = tree_record(&b, &volume)?;
    let aside = b.directory().join("aside");
    std::fs::rename(&path, &aside)?;
    let checked = tree_refuses(&b, &volume).await;
    std::fs::rename(&aside, &path)?;
    checked
}

async fn node_gone(b: Arc<Bench>) -> Result<()> {
    let (_, volume) = with_two(&b).await?;
    let image = super::invariant::image_of(&b.sr.path, &volume.key)?;
    let aside = b.directory().join("aside");
    std::fs::rename(&image, &aside)?;
    let name = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut refusals = Vec::new();
    let _ = b.attach(&volume, "7").await;
    refusals.push(refused(b.activate(&volume, "7").await).context("Datapath.activate"));
    b.unplug(&volume, "7").await?;
    std::fs::rename(&aside, &image)?;
    for refusal in refusals {
        names(&refusal?, &name)?;
    }
    b.sr_is_sound().await
}

async fn bad_header(b: Arc<Bench>) -> Result<()> {
    let (_, volume) = with_two(&b).await?;
    let image = super::invariant::image_of(&b.sr.path, &volume.key)?;
    let good = std::fs::read(&image)?;
    // The magic, the version, an incompatible feature that nobody knows, an external data file, the backing string.
    for (at, byte) in [(0, b'X'), (7, 2), (72, 0x80), (79, 0x04), (15, 0xff)] {
        let mut bad = good.clone();
        bad[at] = byte;
        std::fs::write(&image, &bad)?;
        let _ = b.attach(&volume, "7").await;
        let activated = refused(b.activate(&volume, "7").await).with_context(|| format!("byte {at} is {byte:#x}"));
        b.unplug(&volume, "7").await?;
        std::fs::write(&image, &good)?;
        activated?;
    }
    b.sr_is_sound().await
}

async fn other_trees(b: Arc<Bench>) -> Result<()> {
    let (damaged, good) = (b.create(MIB).await?, b.create(MIB).await?);
    let path = tree_record(&b, &damaged)?;
    let record = std::fs::read(&path)?;
    std::fs::write(&path, "{")?;
    let used = async {
        b.write(&good, 0, 4096, 1).await?;
        let snapshot = b.snapshot(&good.key).await?;
        b.destroy(&snapshot.key).await?;
        b.stat(&good.key).await
    };
    let used = used.await;
    std::fs::write(&path, record)?;
    used?;
    b.expect_content(&good, &[(0, 4096, 1)]).await
}
