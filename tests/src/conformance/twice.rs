//! The caller resends what it does not know the end of: every call made twice is right both times.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::bench::{DBG, MIB, leftovers, refused, uri_of};
use super::live::has_all_writes;
use super::mirror::{guest_of, target};
use super::request::{self, METHODS, remote_of};
use super::{Bench, Group, Need, answer};
use crate::wire::{Attached, Json, Request, Volume};

const MIRROR: Need = Need::Method("Data.mirror");

/// How a call is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    InARow,
    AtOnce,
}

/// Calls that make something new each time; of two of them two things come.
const MAKING: &[&str] = &["Volume.create", "Volume.snapshot", "Volume.clone"];

/// Calls whose answers tell how much space there is, which others change meanwhile.
const FIGURES: &[&str] = &["SR.stat", "SR.probe", "Plugin.diagnostics"];

pub(super) fn checks(group: &mut Group<'_>) {
    for method in METHODS.iter().copied() {
        let needs = [Need::Method(method)];
        // A mirror's peer takes one connection, and an SR that is destroyed is no longer attached: both are asked below.
        if ["Data.mirror", "SR.destroy"].contains(&method) {
            continue;
        }
        let what = if MAKING.contains(&method) { "makes two volumes" } else { "gives the same answer" };
        group.add(format!("{method} twice in a row {what}"), &needs, move |b| repeat(b, method, How::InARow));
        group.add(format!("{method} by two processes at once {what}"), &needs, move |b| {
            repeat(b, method, How::AtOnce)
        });
    }
    for (how, title) in [(How::InARow, "twice in a row"), (How::AtOnce, "by two processes at once")] {
        group.add(format!("every step of a datapath's life made {title} leaves it working"), &[], move |b| {
            life(b, how)
        });
    }
    group.add("SR.destroy again of a destroyed SR says Sr_not_attached", &[], |b| destroy_sr(b, How::InARow));
    group.add("SR.destroy by two processes at once destroys the SR", &[], |b| destroy_sr(b, How::AtOnce));
    group.add(
        "Data.mirror again to the same peer ends well or is refused, and the guest loses nothing",
        &[MIRROR],
        mirror_again,
    );
    group.add("a snapshot of an active volume made by two processes at once makes two", &[], snapshots_at_once);
    group.add("Volume.destroy of an SR's every volume by two processes at once leaves nothing", &[], destroy_all);
}

async fn made_twice(b: &Bench, request: &Request, how: How) -> Result<(Json, Json)> {
    Ok(match how {
        How::InARow => (b.call(request).await.context("the first")?, b.call(request).await.context("the second")?),
        How::AtOnce => {
            let (one, other) = tokio::join!(b.call(request), b.call(request));
            (one.context("one of the two")?, other.context("the other of the two")?)
        }
    })
}

async fn repeat(b: Arc<Bench>, method: &'static str, how: How) -> Result<()> {
    let request = request::valid(&b, method).await?;
    let before = b.ls().await?;
    let (one, other) = made_twice(&b, &request, how).await?;
    for json in [&one, &other] {
        answer::decode(method, json)?;
    }
    let after = b.ls().await?;
    if MAKING.contains(&method) {
        let (one, other) = (Volume::decode(&one, "one")?, Volume::decode(&other, "other")?);
        ensure!(one.key != other.key, "both made {}", one.key);
        let (one, other) = (b.stat(&one.key).await?, b.stat(&other.key).await?);
        ensure!(one.uri != other.uri, "{} and {} are both {:?}", one.key, other.key, one.uri);
        ensure!(after.len() == before.len() + 2, "{} volumes became {}", before.len(), after.len());
        for made in [one, other] {
            ensure!(after.iter().any(|v| v.key == made.key), "{} was made and is not listed", made.key);
        }
    } else {
        let same = FIGURES.contains(&method) || one == other;
        ensure!(same, "first {}, then {}", one.encode(), other.encode());
        let gone = usize::from(method == "Volume.destroy");
        ensure!(after.len() + gone == before.len(), "{} volumes became {}", before.len(), after.len());
    }
    effect(&b, method, &request).await?;
    b.sr_is_sound().await
}

/// What one call would have done is done.
async fn effect(b: &Bench, method: &str, request: &Request) -> Result<()> {
    let Some(key) = request.text("key") else { return Ok(()) };
    if method == "Volume.destroy" {
        return Ok(());
    }
    let stat = b.stat(key).await?;
    match method {
        "Volume.set" => ensure!(stat.key_value("vdi-type") == Some("user"), "{:?}", stat.keys),
        "Volume.unset" => ensure!(stat.key_value("content_id").is_none(), "{:?}", stat.keys),
        "Volume.set_name" => ensure!(stat.name == "another name", "{stat:?}"),
        "Volume.set_description" => ensure!(stat.description == "another description", "{stat:?}"),
        "Volume.resize" => ensure!(stat.virtual_size == 8 * MIB, "{stat:?}"),
        _ => {}
    }
    Ok(())
}

async fn destroy_sr(b: Arc<Bench>, how: How) -> Result<()> {
    let other = b.new_sr("other").await?;
    let request = Request::sr("SR.destroy", DBG, &other.sr);
    let (one, second) = match how {
        How::InARow => (b.call(&request).await, b.call(&request).await),
        How::AtOnce => tokio::join!(b.call(&request), b.call(&request)),
    };
    ensure!(one.is_ok() || second.is_ok(), "neither succeeded: {one:?}, {second:?}");
    for called in [one, second].into_iter().filter(Result::is_err) {
        let failure = refused(called)?;
        ensure!(failure.code == "Sr_not_attached", "{failure}");
    }
    refused(b.attach_sr(&other.config).await).map(drop)
}

async fn mirror_again(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(4 * MIB).await?;
    let mut guest = guest_of(&b, &volume).await?;
    let (target, uri) = target(&b, 4 * MIB).await?;
    let remote = remote_of(&uri);
    let (one, other) = tokio::join!(b.mirror(&volume, "5", &remote), b.mirror(&volume, "5", &remote));
    let mut completed = 0;
    for called in [one, other] {
        match called {
            Err(error) => drop(refused::<()>(Err(error))?),
            Ok(operation) => completed += usize::from(b.data_wait(&operation).await?.complete),
        }
    }
    guest.suspend().await;
    b.unplug(&volume, "5").await?;
    b.unplug(&target, "MIR0a1b2c").await?;
    has_all_writes(&b, &volume, &guest).await?;
    if completed > 0 { has_all_writes(&b, &target, &guest).await } else { Ok(()) }
}

async fn life(b: Arc<Bench>, how: How) -> Result<()> {
    let volume = b.create(2 * MIB).await?;
    for byte in [1, 2] {
        let step = |method| Request::datapath(method, DBG, uri_of(&volume).unwrap_or_default(), "7");
        let (one, other) = made_twice(&b, &step("Datapath.attach"), how).await?;
        ensure!(one == other, "attach answered {} and {}", one.encode(), other.encode());
        let uri = super::bench::nbd_of(&Attached::decode(&one)?)?;
        made_twice(&b, &step("Datapath.activate"), how).await.context("activate")?;
        let client = crate::nbd::Client::connect(&uri).await?;
        client.write(0, vec![byte; 4096].into()).await?;
        // Activating what a guest is writing to is nothing new either.
        made_twice(&b, &step("Datapath.activate"), how).await.context("activate with a client")?;
        client.write(8192, vec![byte; 4096].into()).await?;
        client.disconnect().await;
        made_twice(&b, &step("Datapath.deactivate"), how).await.context("deactivate")?;
        made_twice(&b, &step("Datapath.detach"), how).await.context("detach")?;
        let left = leftovers(&b.host).await;
        ensure!(left.is_empty(), "detached, but there are {left:?}");
        b.expect_content(&volume, &[(0, 4096, byte), (8192, 4096, byte)]).await?;
    }
    Ok(())
}

async fn snapshots_at_once(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(2 * MIB).await?;
    let client = crate::nbd::Client::connect(&b.plug(&volume, "7").await?).await?;
    client.write(0, vec![1; 4096].into()).await?;
    let (one, other) = tokio::join!(b.snapshot(&volume.key), b.snapshot(&volume.key));
    let (one, other) = (one?, other?);
    client.write(4096, vec![2; 4096].into()).await?;
    client.flush().await?;
    client.disconnect().await;
    b.unplug(&volume, "7").await?;
    ensure!(one.key != other.key, "both made {}", one.key);
    for snapshot in [&one, &other] {
        b.expect_content(snapshot, &[(0, 4096, 1)]).await?;
    }
    b.expect_content(&volume, &[(0, 4096, 1), (4096, 4096, 2)]).await?;
    b.sr_is_sound().await
}

async fn destroy_all(b: Arc<Bench>) -> Result<()> {
    let leaf = b.create(MIB).await?;
    let mut keys = vec![leaf.key.clone()];
    for _ in 0..4 {
        let snapshot = b.snapshot(&leaf.key).await?;
        keys.push(b.clone_of(&snapshot.key).await?.key);
        keys.push(snapshot.key);
    }
    let mut calls = tokio::task::JoinSet::new();
    for key in keys.iter().chain(&keys) {
        let (b, key) = (Arc::clone(&b), key.clone());
        calls.spawn(async move { b.destroy(&key).await });
    }
    while let Some(called) = calls.join_next().await {
        called??;
    }
    ensure!(b.ls().await?.is_empty(), "volumes are left");
    b.sr_is_sound().await
}
