//! Many processes at once: none fails, nobody sees anything half-made, and everything fits together afterwards.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use tokio::task::JoinSet;

use super::bench::{DBG, MIB, leftovers, refused};
use super::random::{Random, seed};
use super::{Bench, Group, Need};
use crate::nbd::Client;
use crate::wire::{Failure, Request, Volume};

/// How many processes call at once.
const CROWD: usize = 16;

const SNAPSHOT: Need = Need::Method("Volume.snapshot");
const CLONE: Need = Need::Method("Volume.clone");

pub(super) fn checks(group: &mut Group<'_>) {
    group.add(
        "sixteen processes make mixed calls on one volume while others list the SR",
        &[SNAPSHOT, CLONE],
        one_volume,
    );
    group.add("sixteen processes make mixed calls on volumes of their own", &[SNAPSHOT, CLONE], several_volumes);
    group.add(
        "sixteen processes set sixteen keys of one volume and none is lost",
        &[Need::Method("Volume.set")],
        keys,
    );
    group.add("sixteen processes create and destroy while the SR is listed", &[], create_destroy);
    group.add("datapath calls of many domains and snapshots of one volume at once", &[SNAPSHOT], datapaths);
    group.add("SR.attach, SR.detach and SR.ls by many processes at once", &[], attach_detach);
}

/// Lists the SR until it is told to stop: it never fails, and nothing is half-made or missing.
fn watch(b: &Arc<Bench>, always: &[Volume]) -> (Arc<AtomicBool>, tokio::task::JoinHandle<Result<usize>>) {
    let stop = Arc::new(AtomicBool::new(false));
    let (b, stopped) = (Arc::clone(b), Arc::clone(&stop));
    let always: BTreeSet<String> = always.iter().map(|v| v.key.clone()).collect();
    let task = tokio::spawn(async move {
        let mut times = 0;
        while !stopped.load(Ordering::SeqCst) {
            let volumes = b.ls().await.context("SR.ls meanwhile")?;
            let keys: BTreeSet<String> = volumes.iter().map(|v| v.key.clone()).collect();
            ensure!(keys.len() == volumes.len(), "SR.ls lists a volume twice: {volumes:?}");
            ensure!(keys.is_superset(&always), "SR.ls lacks one of {always:?}");
            for volume in &volumes {
                ensure!(volume.virtual_size > 0 && volume.uri.len() == 1, "half-made: {volume:?}");
                ensure!(volume.uuid.as_ref().is_none_or(|uuid| *uuid == volume.key), "{volume:?}");
            }
            times += 1;
        }
        Ok(times)
    });
    (stop, task)
}

async fn with_watchers(b: &Arc<Bench>, always: &[Volume], mut calls: JoinSet<Result<()>>) -> Result<()> {
    let watchers = [watch(b, always), watch(b, always)];
    let mut first_failure = Ok(());
    while let Some(called) = calls.join_next().await {
        first_failure = first_failure.and(called?);
    }
    for (stop, task) in watchers {
        stop.store(true, Ordering::SeqCst);
        let times = task.await??;
        ensure!(times > 0, "the SR was never listed");
    }
    first_failure
}

/// A call on a volume that another process may have destroyed meanwhile.
fn unless_gone<T>(called: Result<T>) -> Result<Option<T>> {
    match called {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error.downcast_ref::<Failure>().is_some_and(|f| f.code == "Volume_does_not_exist") => Ok(None),
        Err(error) => Err(error),
    }
}

/// One process's part: what it makes it may destroy again, and others may use meanwhile.
async fn mixed(b: Arc<Bench>, volume: Volume, mut random: Random, who: usize, calls: usize) -> Result<()> {
    let mut made: Vec<String> = Vec::new();
    for number in 0..calls {
        let key = &volume.key;
        match random.below(8) {
            0 => made.push(b.snapshot(key).await?.key),
            1 => made.push(b.clone_of(key).await?.key),
            2 => b.set(key, &format!("k{who}"), &number.to_string()).await?,
            3 => b.unset(key, &format!("k{who}")).await?,
            4 => b.call(&Request::volume_set_name(DBG, &b.sr.sr, key, &format!("{who}-{number}"))).await.map(drop)?,
            5 => {
                let now = b.stat(key).await?.virtual_size;
                // Another process may have made it larger since, and then this is a shrinking.
                if let Err(error) = b.resize(key, now + MIB).await {
                    refused::<()>(Err(error))?;
                }
            }
            6 if !made.is_empty() => {
                let of = random.pick(&made).clone();
                made.extend(unless_gone(b.clone_of(&of).await)?.map(|v| v.key));
            }
            _ => {
                if let Some(key) = made.pop() {
                    b.destroy(&key).await?;
                    refused(b.stat(&key).await)?;
                }
            }
        }
    }
    Ok(())
}

async fn one_volume(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(4 * MIB).await?;
    b.write(&volume, 0, 4096, 9).await?;
    let seed = seed();
    let mut calls = JoinSet::new();
    for who in 0..CROWD {
        let random = Random::from_seed(seed + who as u64);
        calls.spawn(mixed(Arc::clone(&b), volume.clone(), random, who, 6));
    }
    with_watchers(&b, std::slice::from_ref(&volume), calls)
        .await
        .with_context(|| format!("CONFORMANCE_SEED={seed}"))?;
    b.sr_is_sound().await?;
    let client = Client::connect(&b.plug(&volume, "7").await?).await?;
    ensure!(client.read(0, 4096).await?.iter().all(|byte| *byte == 9), "the content is lost");
    client.disconnect().await;
    b.unplug(&volume, "7").await
}

async fn several_volumes(b: Arc<Bench>) -> Result<()> {
    let mut volumes = Vec::new();
    for _ in 0..4 {
        volumes.push(b.create(4 * MIB).await?);
    }
    let seed = seed();
    let mut calls = JoinSet::new();
    for who in 0..CROWD {
        let random = Random::from_seed(seed + who as u64);
        calls.spawn(mixed(Arc::clone(&b), volumes[who % 4].clone(), random, who, 6));
    }
    with_watchers(&b, &volumes, calls).await.with_context(|| format!("CONFORMANCE_SEED={seed}"))?;
    b.sr_is_sound().await
}

async fn keys(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let mut calls = JoinSet::new();
    for who in 0..CROWD {
        let (b, key) = (Arc::clone(&b), volume.key.clone());
        calls.spawn(async move {
            for n in 0..3 {
                b.set(&key, &format!("k{who}"), &n.to_string()).await?;
            }
            Ok(())
        });
    }
    with_watchers(&b, std::slice::from_ref(&volume), calls).await?;
    let stat = b.stat(&volume.key).await?;
    for who in 0..CROWD {
        ensure!(stat.key_value(&format!("k{who}")) == Some("2"), "k{who} is lost: {:?}", stat.keys);
    }
    Ok(())
}

async fn create_destroy(b: Arc<Bench>) -> Result<()> {
    let always = b.create(MIB).await?;
    let mut calls = JoinSet::new();
    for _ in 0..CROWD {
        let b = Arc::clone(&b);
        calls.spawn(async move {
            for _ in 0..2 {
                let volume = b.create(MIB).await?;
                b.stat(&volume.key).await?;
                b.destroy(&volume.key).await?;
            }
            Ok(())
        });
    }
    with_watchers(&b, std::slice::from_ref(&always), calls).await?;
    ensure!(b.ls().await? == [always], "SR.ls has not just the one that stayed");
    b.sr_is_sound().await
}

async fn datapaths(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(2 * MIB).await?;
    let client = Client::connect(&b.plug(&volume, "99").await?).await?;
    let mut calls = JoinSet::new();
    for who in 0..CROWD {
        let (b, volume) = (Arc::clone(&b), volume.clone());
        calls.spawn(async move {
            let domain = (who % 12).to_string();
            for _ in 0..2 {
                if who >= 12 {
                    b.snapshot(&volume.key).await?;
                    continue;
                }
                b.plug(&volume, &domain).await?;
                b.unplug(&volume, &domain).await?;
            }
            Ok(())
        });
    }
    let writer = async {
        for n in 0..50u8 {
            client.write(u64::from(n) * 4096, vec![n + 1; 4096].into()).await?;
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        anyhow::Ok(())
    };
    let always = [volume.clone()];
    let (called, written) = tokio::join!(with_watchers(&b, &always, calls), writer);
    called?;
    written.context("the guest meanwhile")?;
    client.disconnect().await;
    b.unplug(&volume, "99").await?;
    let left = leftovers(&b.host).await;
    ensure!(left.is_empty(), "all detached, but there are {left:?}");
    let stretches: Vec<_> = (0..50u8).map(|n| (u64::from(n) * 4096, 4096, n + 1)).collect();
    b.expect_content(&volume, &stretches).await?;
    b.sr_is_sound().await
}

async fn attach_detach(b: Arc<Bench>) -> Result<()> {
    let other = b.new_sr("other").await?;
    let mut calls = JoinSet::new();
    for who in 0..CROWD {
        let (b, other) = (Arc::clone(&b), other.clone());
        calls.spawn(async move {
            match who % 3 {
                0 => b.attach_sr(&other.config).await.map(drop),
                1 => b.call(&Request::sr("SR.detach", DBG, &other.sr)).await.map(drop),
                _ => match b.call(&Request::sr("SR.ls", DBG, &other.sr)).await {
                    Err(error) => refused::<()>(Err(error)).map(drop),
                    Ok(_) => Ok(()),
                },
            }
        });
    }
    with_watchers(&b, &[], calls).await?;
    b.attach_sr(&other.config).await?;
    b.call(&Request::sr("SR.destroy", DBG, &other.sr)).await.map(drop)
}
