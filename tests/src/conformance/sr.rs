//! The life of an SR.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use uuid::Uuid;

use super::bench::{AttachedSr, DBG, MIB, refused, refused_with, uri_of};
use super::{Bench, Group, Need};
use crate::script::Fault;
use crate::wire::{Health, ProbeResult, Request, Volume};

const PROBE: Need = Need::Method("SR.probe");

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("SR.create answers a device-config with which the SR can be attached", &[], create);
    group.add("SR.stat tells name, description, uuid, space and health", &[], stat);
    group.add("SR.ls of a new SR is empty, and lists each volume once as Volume.stat tells it", &[], ls);
    group.add("SR.set_name and SR.set_description are seen by SR.stat and survive a detachment", &[], rename);
    group.add("volumes, their keys and names survive that the SR is detached and attached", &[], survives);
    group.add("SR.attach of an attached SR gives the same answer", &[], attach_twice);
    group.add("SR.detach of a detached SR succeeds", &[], detach_twice);
    group.add("a detached SR refuses SR.stat, SR.ls and Volume calls", &[], detached);
    group.add("SR.detach is refused while a volume is attached", &[Need::OwnLayout], detach_in_use);
    group.add(
        "SR.destroy of an SR with volumes is refused and leaves them all, or destroys them all",
        &[],
        destroy_full,
    );
    group.add("after SR.destroy there is no SR to attach", &[], destroy);
    group.add("SR.create where another SR is fails and leaves that one alone", &[Need::OwnLayout], create_over);
    group.add("SR.create again with the same uuid keeps the volumes", &[Need::OwnLayout], create_again);
    group.add("SR.probe finds an SR with its uuid and what SR.stat tells of it", &[PROBE, Need::OwnLayout], probe);
    group.add("SR.probe of an empty place finds no SR", &[PROBE], probe_empty);
    group.add(
        "SR.probe of a directory above SRs finds each, and offers it as no place",
        &[PROBE, Need::OwnLayout],
        below,
    );
    group.add("SR.probe with an sr_uuid finds that SR alone", &[PROBE, Need::OwnLayout], probe_one);
    group.add("SR.probe says what stands against a place that cannot be one", &[PROBE, Need::OwnLayout], obstacle);
    group.add("SR.stat of an SR that is gone is Unavailable and says what to do", &[Need::OwnLayout], health);
    group.add("SR.destroy that was killed can be made again", &[Need::OwnLayout], destroy_killed);
    group.add("two SRs on one host do not see each other's volumes", &[], two_srs);
    group.add("a volume of one SR is unknown in another", &[], foreign_key);
}

async fn create(b: Arc<Bench>) -> Result<()> {
    let other = b.new_sr("other").await?;
    ensure!(other.sr != b.sr.sr, "two SRs are both called {}", other.sr);
    b.call(&Request::sr("SR.destroy", DBG, &other.sr)).await.map(drop)
}

async fn stat(b: Arc<Bench>) -> Result<()> {
    let stat = b.sr_stat().await?;
    ensure!(stat.sr == b.sr.sr, "SR.attach said {}, SR.stat says {}", b.sr.sr, stat.sr);
    ensure!((stat.name.as_str(), stat.description.as_str()) == ("an SR", "for a check"), "{stat:?}");
    ensure!(stat.uuid.as_deref() == Some(&b.sr.uuid), "{stat:?}");
    ensure!(stat.total_space > 0 && (0..=stat.total_space).contains(&stat.free_space), "{stat:?}");
    ensure!(matches!(stat.health, Health::Healthy(_)), "{stat:?}");
    Ok(())
}

async fn ls(b: Arc<Bench>) -> Result<()> {
    ensure!(b.ls().await?.is_empty(), "a new SR has volumes");
    for n in 1..=3 {
        b.create(n * MIB).await?;
    }
    let listed = b.ls().await?;
    ensure!(listed.len() == 3, "{listed:?}");
    for volume in &listed {
        let stat = b.stat(&volume.key).await?;
        ensure!(stat == *volume, "SR.ls has {volume:?}, Volume.stat {stat:?}");
    }
    Ok(())
}

async fn rename(b: Arc<Bench>) -> Result<()> {
    for text in ["plain", "", "ünïcode ☃ \" ' \\ \n\t$(x)"] {
        b.call(&Request::sr_set_name(DBG, &b.sr.sr, text)).await?;
        b.call(&Request::sr_set_description(DBG, &b.sr.sr, &format!("{text}!"))).await?;
        b.call(&Request::sr("SR.detach", DBG, &b.sr.sr)).await?;
        b.attach_sr(&b.sr.config).await?;
        let stat = b.sr_stat().await?;
        ensure!(stat.name == text && stat.description == format!("{text}!"), "{stat:?} after {text:?}");
    }
    Ok(())
}

async fn survives(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    b.snapshot(&volume.key).await?;
    b.set(&volume.key, "vdi-type", "user").await?;
    b.write(&volume, 0, 4096, 0x5a).await?;
    let before = b.ls().await?;
    b.call(&Request::sr("SR.detach", DBG, &b.sr.sr)).await?;
    let again = b.attach_sr(&b.sr.config).await?;
    ensure!(again == b.sr.sr, "the SR was called {}, now {again}", b.sr.sr);
    let after = b.ls().await?;
    ensure!(before == after, "{before:?} became {after:?}");
    b.expect_content(&volume, &[(0, 4096, 0x5a)]).await
}

async fn attach_twice(b: Arc<Bench>) -> Result<()> {
    for _ in 0..2 {
        let again = b.attach_sr(&b.sr.config).await?;
        ensure!(again == b.sr.sr, "first {}, then {again}", b.sr.sr);
    }
    Ok(())
}

async fn detach_twice(b: Arc<Bench>) -> Result<()> {
    let other = b.new_sr("other").await?;
    for _ in 0..2 {
        b.call(&Request::sr("SR.detach", DBG, &other.sr)).await?;
    }
    Ok(())
}

async fn detached(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    b.call(&Request::sr("SR.detach", DBG, &b.sr.sr)).await?;
    for method in ["SR.stat", "SR.ls"] {
        refused_with(b.call(&Request::sr(method, DBG, &b.sr.sr)).await, "Sr_not_attached").context(method)?;
    }
    for method in ["Volume.stat", "Volume.snapshot", "Volume.clone", "Volume.destroy"] {
        let called = b.call(&Request::volume(method, DBG, &b.sr.sr, &volume.key)).await;
        refused_with(called, "Sr_not_attached").context(method)?;
    }
    refused_with(b.create(MIB).await, "Sr_not_attached")?;
    b.attach_sr(&b.sr.config).await?;
    ensure!(b.ls().await? == [volume], "the volume is not as it was");
    Ok(())
}

async fn detach_in_use(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    b.start(&volume, "7").await?;
    refused_with(b.call(&Request::sr("SR.detach", DBG, &b.sr.sr)).await, "SR_BACKEND_FAILURE_16")?;
    b.unplug(&volume, "7").await?;
    b.call(&Request::sr("SR.detach", DBG, &b.sr.sr)).await?;
    b.attach_sr(&b.sr.config).await.map(drop)
}

async fn destroy_full(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let called = b.call(&Request::sr("SR.destroy", DBG, &b.sr.sr)).await;
    if called.is_err() {
        refused_with(called, "SR_BACKEND_FAILURE_39")?;
        ensure!(b.ls().await? == [volume], "the volume is not as it was");
        return Ok(());
    }
    // The published interface has it delete them (ocaml/xapi-storage/generator/lib/control.ml); XenServer's own refuse.
    let Ok(sr) = b.attach_sr(&b.sr.config).await else {
        let again = Request::sr_create(DBG, &b.sr.uuid, &b.sr.config, "an SR", "for a check");
        return b.call(&again).await.map(drop);
    };
    let left = Volume::decode_list(&b.call(&Request::sr("SR.ls", DBG, &sr)).await?)?;
    ensure!(left.is_empty(), "it was not refused, and {} of the volumes are there after it", left.len());
    Ok(())
}

async fn destroy(b: Arc<Bench>) -> Result<()> {
    let other = b.new_sr("other").await?;
    b.call(&Request::sr("SR.destroy", DBG, &other.sr)).await?;
    refused(b.call(&Request::sr("SR.ls", DBG, &other.sr)).await).context("SR.ls after it")?;
    refused(b.attach_sr(&other.config).await).context("SR.attach after it")?;
    if b.subject.own_layout {
        let left: Vec<_> = std::fs::read_dir(&other.path)?.flatten().map(|e| e.file_name()).collect();
        ensure!(left.is_empty() || left == ["lock"], "the directory still holds {left:?}");
    }
    Ok(())
}

async fn create_over(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let request = Request::sr_create(DBG, &Uuid::new_v4().to_string(), &b.sr.config, "x", "x");
    refused_with(b.call(&request).await, "SR_BACKEND_FAILURE_42")?;
    ensure!(b.sr_stat().await?.name == "an SR" && b.ls().await? == [volume], "the SR was touched");
    Ok(())
}

async fn create_again(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    b.call(&Request::sr_create(DBG, &b.sr.uuid, &b.sr.config, "an SR", "for a check")).await?;
    ensure!(b.ls().await? == [volume], "the volume is not as it was");
    Ok(())
}

async fn probe(b: Arc<Bench>) -> Result<()> {
    let config: Vec<_> = b.sr.config.iter().filter(|(k, _)| k == "uri").cloned().collect();
    let found = ProbeResult::decode_list(&b.call(&Request::sr_probe(DBG, &config)).await?)?;
    let named = |r: &&ProbeResult| r.configuration.iter().any(|(k, v)| k == "sr_uuid" && *v == b.sr.uuid);
    let result = found.iter().find(named).with_context(|| format!("{found:?} has no SR {}", b.sr.uuid))?;
    ensure!(result.complete, "{result:?}");
    let stat = result.sr.as_ref().context("the SR that was found has no stat")?;
    ensure!(stat.name == "an SR" && stat.uuid.as_deref() == Some(&b.sr.uuid), "{stat:?}");
    Ok(())
}

async fn probe_empty(b: Arc<Bench>) -> Result<()> {
    let empty = b.directory().join("empty");
    std::fs::create_dir(&empty)?;
    let request = Request::sr_probe(DBG, &b.subject.config_in(&empty));
    let found = ProbeResult::decode_list(&b.call(&request).await?)?;
    ensure!(found.iter().all(|r| r.sr.is_none()), "{found:?}");
    ensure!(std::fs::read_dir(&empty)?.next().is_none(), "probing left something");
    Ok(())
}

async fn two_srs(b: Arc<Bench>) -> Result<()> {
    let other = b.new_sr("other").await?;
    let here = b.create(MIB).await?;
    let request = Request::volume_create(DBG, &other.sr, "there", "", MIB, false);
    let there = b.volume_answer(&request).await?;
    ensure!(uri_of(&here)? != uri_of(&there)? && here.key != there.key, "{here:?} and {there:?}");
    ensure!(b.ls().await? == [here], "SR.ls has another SR's volume");
    b.call(&Request::volume("Volume.destroy", DBG, &other.sr, &there.key)).await?;
    b.call(&Request::sr("SR.destroy", DBG, &other.sr)).await.map(drop)
}

async fn foreign_key(b: Arc<Bench>) -> Result<()> {
    let other = b.new_sr("other").await?;
    let here = b.create(MIB).await?;
    let stat = b.call(&Request::volume("Volume.stat", DBG, &other.sr, &here.key)).await;
    refused_with(stat, "Volume_does_not_exist")?;
    b.call(&Request::volume("Volume.destroy", DBG, &other.sr, &here.key)).await?;
    ensure!(b.ls().await? == [here], "a volume was destroyed through another SR");
    b.call(&Request::sr("SR.destroy", DBG, &other.sr)).await.map(drop)
}

async fn probed(b: &Bench, config: &[(String, String)]) -> Result<Vec<ProbeResult>> {
    Ok(ProbeResult::decode_list(&b.call(&Request::sr_probe(DBG, config)).await?)?)
}

fn uuid_in(found: &ProbeResult) -> Option<&str> {
    found.configuration.iter().find(|(key, _)| key == "sr_uuid").map(|(_, uuid)| uuid.as_str())
}

/// The directory that holds the bench's SR and another.
async fn two_below(b: &Bench) -> Result<(AttachedSr, Vec<(String, String)>)> {
    Ok((b.new_sr("other").await?, b.subject.config_in(b.directory())))
}

async fn below(b: Arc<Bench>) -> Result<()> {
    let (other, above) = two_below(&b).await?;
    let found = probed(&b, &above).await?;
    for sr in [&b.sr, &other] {
        let entry = found.iter().find(|entry| uuid_in(entry) == Some(&sr.uuid));
        let entry = entry.with_context(|| format!("{} is not in {found:?}", sr.uuid))?;
        ensure!(entry.complete && entry.sr.is_some(), "{entry:?}");
        let again = b.attach_sr(&entry.configuration).await.context("with the configuration that was found")?;
        ensure!(again == sr.sr, "it leads to {again}");
    }
    let places: Vec<_> = found.iter().filter(|entry| uuid_in(entry).is_none()).collect();
    ensure!(places.iter().all(|place| !place.complete && place.sr.is_none()), "{places:?}");
    b.call(&Request::sr("SR.destroy", DBG, &other.sr)).await.map(drop)
}

async fn probe_one(b: Arc<Bench>) -> Result<()> {
    let (other, mut above) = two_below(&b).await?;
    above.push(("sr_uuid".to_owned(), other.uuid.clone()));
    let found = probed(&b, &above).await?;
    ensure!(found.len() == 1 && uuid_in(&found[0]) == Some(&other.uuid), "{found:?}");
    b.call(&Request::sr("SR.destroy", DBG, &other.sr)).await.map(drop)
}

async fn obstacle(b: Arc<Bench>) -> Result<()> {
    let place = b.new_place("left")?;
    std::fs::create_dir_all(b.directory().join("left/trees/something"))?;
    let found = probed(&b, &place).await?;
    ensure!(found.len() == 1 && !found[0].complete && found[0].sr.is_none(), "{found:?}");
    ensure!(found[0].extra_info.iter().any(|(_, why)| why.contains("sr.json")), "{found:?}");
    Ok(())
}

async fn health(b: Arc<Bench>) -> Result<()> {
    let aside = b.directory().join("aside");
    std::fs::rename(&b.sr.path, &aside)?;
    let stat = b.sr_stat().await;
    std::fs::rename(&aside, &b.sr.path)?;
    let stat = stat?;
    let Health::Unavailable(why) = &stat.health else { bail!("it is gone, but {stat:?}") };
    ensure!(why.contains("sr.json") && why.contains("mount"), "{why}");
    ensure!(stat.name == "an SR" && stat.uuid.as_deref() == Some(&b.sr.uuid), "{stat:?}");
    ensure!(matches!(b.sr_stat().await?.health, Health::Healthy(_)), "it is back and not healthy");
    Ok(())
}

async fn destroy_killed(b: Arc<Bench>) -> Result<()> {
    for (number, milliseconds) in [1, 2, 3, 4, 6, 8, 12, 20, 40].into_iter().enumerate() {
        let other = b.new_sr(&format!("killed {number}")).await?;
        let kill = Fault::Kill(Duration::from_millis(milliseconds));
        b.host.runner().faults().nth_of("a", "SR.destroy", 0, kill);
        let request = Request::sr("SR.destroy", DBG, &other.sr);
        let ended = b.call(&request).await.is_ok();
        b.host.runner().faults().clear();
        let again = b.call(&request).await;
        match again {
            Ok(_) => ensure!(!ended, "it was destroyed twice"),
            Err(error) => refused_with::<()>(Err(error), "Sr_not_attached").map(drop)?,
        }
        refused(b.attach_sr(&other.config).await)?;
    }
    Ok(())
}
