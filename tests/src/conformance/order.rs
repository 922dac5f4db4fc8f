//! attach, activate, deactivate and detach come in any order and any number.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::bench::{DBG, MIB, leftovers, nbd_of, refused, uri_of};
use super::random::{Random, seed};
use super::{Bench, Group, Need};
use crate::host::Host;
use crate::nbd::Client;
use crate::wire::{Attached, Request, Volume};

const READONLY: Need = Need::Method("Datapath.activate_readonly");

pub(super) fn checks(group: &mut Group<'_>) {
    for number in 1..=4 {
        let title = format!("any sequence of datapath calls by several domains on two volumes, number {number}");
        group.add(title, &[READONLY], any_sequence);
    }
    group.add("detach, deactivate and close of what was never attached succeed", &[], never_attached);
    group.add("deactivate of an attached volume that was never activated succeeds", &[], never_activated);
    group.add("attach answers every domain the same, and again while it is active", &[], same_answer);
    group.add("the export accepts connections from the moment that activate returns", &[], at_once);
    group.add("a deactivated volume can be activated again without a new attach", &[], reactivate);
    group.add("detach without deactivate ends the activation", &[], detach_active);
    group.add("one domain's deactivate and detach leave another domain's activation alone", &[], two_domains);
    group.add("the same domain can be active on two volumes at once", &[], one_domain);
    group.add(
        "the datapath of a domain that was never activated is taken down while a guest writes",
        &[],
        idle_domain,
    );
    group.add("a volume can be flipped to read-only and back while it stays attached", &[READONLY], flip);
    group.add("activate_readonly by twenty domains at once serves until the last is gone", &[READONLY], many_readers);
    group.add("a snapshot can be active read-only while its volume is active for writing", &[READONLY], snapshot_too);
    group.add(
        "a migration's activation without a client does not keep a guest from the volume",
        &[],
        stale_migration,
    );
    group.add("open and close succeed in any order", &[Need::Method("Datapath.open")], open_close);
    group.add("a volume that is gone refuses attach and activate, and not deactivate and detach", &[], gone);
    group.add(
        "a volume active for writing on another host says Activated_on_another_host",
        &[Need::OwnLayout],
        elsewhere,
    );
}

/// What the suite remembers of one volume.
#[derive(Default)]
struct Known {
    attached: BTreeSet<&'static str>,
    writing: BTreeSet<&'static str>,
    reading: BTreeSet<&'static str>,
    answers: BTreeSet<String>,
    written: BTreeMap<u64, u8>,
}

async fn any_sequence(b: Arc<Bench>) -> Result<()> {
    let seed = seed();
    let made = sequence(&b, &mut Random::from_seed(seed)).await;
    made.with_context(|| format!("CONFORMANCE_SEED={seed}"))
}

async fn sequence(b: &Bench, random: &mut Random) -> Result<()> {
    let volumes = [b.create(MIB).await?, b.create(MIB).await?];
    let mut known: [Known; 2] = Default::default();
    let mut history = Vec::new();
    for step in 0..40u8 {
        let which = random.below(2);
        let domain = *random.pick(&["1", "2", "u0_mirror_vbd_5_xvda"]);
        let method = *random.pick(&[
            "Datapath.attach",
            "Datapath.attach",
            "Datapath.activate",
            "Datapath.activate",
            "Datapath.activate_readonly",
            "Datapath.deactivate",
            "Datapath.detach",
            "Volume.snapshot",
        ]);
        history.push(format!("{method} {which} {domain}"));
        let made = one_step(b, &volumes[which], &mut known[which], method, domain, step).await;
        made.with_context(|| format!("the last of {history:?}"))?;
    }
    for (volume, known) in volumes.iter().zip(&known) {
        for domain in ["1", "2", "u0_mirror_vbd_5_xvda"] {
            b.unplug(volume, domain).await?;
        }
        let stretches: Vec<_> = known.written.iter().map(|(offset, byte)| (*offset, 4096, *byte)).collect();
        b.expect_content(volume, &stretches).await.with_context(|| format!("after {history:?}"))?;
    }
    let left = leftovers(&b.host).await;
    ensure!(left.is_empty(), "all detached after {history:?}, but there are {left:?}");
    b.sr_is_sound().await
}

async fn one_step(
    b: &Bench,
    volume: &Volume,
    known: &mut Known,
    method: &'static str,
    domain: &'static str,
    step: u8,
) -> Result<()> {
    match method {
        "Volume.snapshot" => {
            b.snapshot(&volume.key).await?;
        }
        "Datapath.attach" => {
            known.answers.insert(format!("{:?}", b.attach(volume, domain).await?));
            known.attached.insert(domain);
            ensure!(known.answers.len() == 1, "attach answered {:?}", known.answers);
        }
        "Datapath.activate" | "Datapath.activate_readonly" => {
            let called = b.datapath(method, volume, domain).await;
            if known.attached.contains(domain) {
                called?;
            } else if let Err(error) = called {
                // Without an attach it may be refused, but well.
                refused::<()>(Err(error))?;
                return Ok(());
            } else {
                known.attached.insert(domain);
            }
            known.reading.remove(domain);
            known.writing.remove(domain);
            if method == "Datapath.activate" { &mut known.writing } else { &mut known.reading }.insert(domain);
        }
        _ => {
            b.datapath(method, volume, domain).await?;
            known.reading.remove(domain);
            known.writing.remove(domain);
            if method == "Datapath.detach" {
                known.attached.remove(domain);
            }
        }
    }
    if known.writing.is_empty() && known.reading.is_empty() {
        return Ok(());
    }
    let uri = nbd_of(&b.attach(volume, known.attached.first().copied().unwrap_or(domain)).await?)?;
    let client = Client::connect(&uri).await.context("active, but not exported")?;
    if !known.writing.is_empty() {
        let offset = u64::from(step) * 4096;
        client.write(offset, vec![step + 1; 4096].into()).await.context("active for writing")?;
        known.written.insert(offset, step + 1);
    }
    for (offset, byte) in &known.written {
        let read = client.read(*offset, 4096).await?;
        ensure!(read.iter().all(|b| b == byte), "what was written at {offset} is lost");
    }
    client.disconnect().await;
    Ok(())
}

async fn never_attached(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    for domain in ["7", "-1", "MIR0a1b2c", "u0_mirror_vbd_5_xvda"] {
        b.datapath("Datapath.detach", &volume, domain).await?;
        b.unplug(&volume, domain).await?;
    }
    if b.script("Datapath.close").is_ok() {
        b.call(&Request::datapath_close(DBG, uri_of(&volume)?)).await?;
    }
    let left = leftovers(&b.host).await;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

async fn never_activated(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    b.attach(&volume, "7").await?;
    b.datapath("Datapath.deactivate", &volume, "7").await?;
    b.activate(&volume, "7").await?;
    b.unplug(&volume, "7").await
}

async fn same_answer(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let first = b.attach(&volume, "7").await?;
    ensure!(first.has_xen_disk() || first.path().is_some(), "no VBD can be made of {first:?}");
    let uri = nbd_of(&first)?;
    ensure!(uri.socket().as_os_str().len() <= 107, "{} is too long for a socket", uri.socket().display());
    b.activate(&volume, "7").await?;
    let client = Client::connect(&uri).await?;
    for domain in ["7", "8", "MIR0a1b2c"] {
        let again = b.attach(&volume, domain).await?;
        ensure!(again == first, "first {first:?}, then {again:?}");
    }
    client.write(0, vec![1; 512].into()).await?;
    client.disconnect().await;
    Ok(())
}

async fn at_once(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let uri = nbd_of(&b.attach(&volume, "7").await?)?;
    for _ in 0..5 {
        b.activate(&volume, "7").await?;
        let client = Client::connect(&uri).await?;
        ensure!(client.export().size == MIB as u64 && !client.export().read_only(), "{:?}", client.export());
        client.disconnect().await;
        b.datapath("Datapath.deactivate", &volume, "7").await?;
        ensure!(Client::connect(&uri).await.is_err(), "deactivated, but still exported");
    }
    Ok(())
}

async fn reactivate(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let uri = nbd_of(&b.attach(&volume, "7").await?)?;
    for byte in 1..=3u8 {
        b.activate(&volume, "7").await?;
        let client = Client::connect(&uri).await?;
        client.write(u64::from(byte) * 4096, vec![byte; 4096].into()).await?;
        // No flush: the volume is deactivated in order, and what was acknowledged is kept.
        client.disconnect().await;
        b.datapath("Datapath.deactivate", &volume, "7").await?;
    }
    b.datapath("Datapath.detach", &volume, "7").await?;
    b.expect_content(&volume, &[(4096, 4096, 1), (8192, 4096, 2), (12288, 4096, 3)]).await
}

async fn detach_active(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let uri = b.plug(&volume, "7").await?;
    b.datapath("Datapath.detach", &volume, "7").await?;
    ensure!(Client::connect(&uri).await.is_err(), "detached, but still exported");
    b.destroy(&volume.key).await
}

async fn two_domains(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let client = Client::connect(&b.plug(&volume, "7").await?).await?;
    b.plug(&volume, "8").await?;
    for _ in 0..2 {
        b.unplug(&volume, "8").await?;
        client.write(0, vec![1; 4096].into()).await?;
    }
    client.disconnect().await;
    b.unplug(&volume, "7").await?;
    b.expect_content(&volume, &[(0, 4096, 1)]).await
}

async fn one_domain(b: Arc<Bench>) -> Result<()> {
    let (one, other) = (b.create(MIB).await?, b.create(MIB).await?);
    let (uri, other_uri) = (b.plug(&one, "MIR0a1b2c").await?, b.plug(&other, "MIR0a1b2c").await?);
    ensure!(uri != other_uri, "both are {uri:?}");
    let (client, other_client) = (Client::connect(&uri).await?, Client::connect(&other_uri).await?);
    client.write(0, vec![1; 512].into()).await?;
    client.disconnect().await;
    b.unplug(&one, "MIR0a1b2c").await?;
    other_client.write(0, vec![2; 512].into()).await?;
    other_client.disconnect().await;
    b.unplug(&other, "MIR0a1b2c").await?;
    b.expect_content(&one, &[(0, 512, 1)]).await?;
    b.expect_content(&other, &[(0, 512, 2)]).await
}

async fn idle_domain(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let client = Client::connect(&b.plug(&volume, "5").await?).await?;
    b.attach(&volume, "u0_mirror_vbd_5_xvda").await?;
    client.write(0, vec![1; 512].into()).await?;
    b.unplug(&volume, "u0_mirror_vbd_5_xvda").await?;
    client.write(512, vec![2; 512].into()).await?;
    client.flush().await?;
    client.disconnect().await;
    b.unplug(&volume, "5").await?;
    b.expect_content(&volume, &[(0, 512, 1), (512, 512, 2)]).await
}

async fn flip(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let uri = nbd_of(&b.attach(&volume, "MIR0a1b2c").await?)?;
    for byte in 1..=3u8 {
        b.activate(&volume, "MIR0a1b2c").await?;
        let client = Client::connect(&uri).await?;
        client.write(0, vec![byte; 512].into()).await?;
        client.disconnect().await;
        b.datapath("Datapath.deactivate", &volume, "MIR0a1b2c").await?;
        b.datapath("Datapath.activate_readonly", &volume, "MIR0a1b2c").await?;
        let client = Client::connect(&uri).await?;
        ensure!(client.export().read_only(), "activated read-only, but it can be written to");
        ensure!(client.read(0, 512).await?.iter().all(|b| *b == byte), "what was written is not read");
        client.disconnect().await;
        b.snapshot(&volume.key).await?;
        b.datapath("Datapath.deactivate", &volume, "MIR0a1b2c").await?;
    }
    b.datapath("Datapath.detach", &volume, "MIR0a1b2c").await?;
    b.expect_content(&volume, &[(0, 512, 3)]).await?;
    b.sr_is_sound().await
}

async fn many_readers(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    b.write(&volume, 0, 512, 7).await?;
    let domains: Vec<String> = (1..=20).map(|n| n.to_string()).collect();
    let mut calls = tokio::task::JoinSet::new();
    for domain in domains.clone() {
        let (b, volume) = (Arc::clone(&b), volume.clone());
        calls.spawn(async move { b.plug_readonly(&volume, &domain).await });
    }
    let mut uri = None;
    while let Some(called) = calls.join_next().await {
        uri = Some(called??);
    }
    let uri = uri.context("there are twenty")?;
    for domain in &domains {
        let client = Client::connect(&uri).await.with_context(|| format!("domain {domain} and others are active"))?;
        ensure!(client.read(0, 512).await?.iter().all(|b| *b == 7), "the content is not served");
        client.disconnect().await;
        b.unplug(&volume, domain).await?;
    }
    ensure!(Client::connect(&uri).await.is_err(), "nobody is active, but it is exported");
    Ok(())
}

async fn snapshot_too(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let client = Client::connect(&b.plug(&volume, "7").await?).await?;
    client.write(0, vec![1; 512].into()).await?;
    let snapshot = b.snapshot(&volume.key).await?;
    let reader = Client::connect(&b.plug_readonly(&snapshot, "CP0a1b2c").await?).await?;
    client.write(0, vec![2; 512].into()).await?;
    ensure!(reader.read(0, 512).await?.iter().all(|b| *b == 1), "the snapshot follows its volume");
    let second = b.snapshot(&volume.key).await?;
    client.write(0, vec![3; 512].into()).await?;
    for client in [client, reader] {
        client.disconnect().await;
    }
    b.unplug(&volume, "7").await?;
    b.unplug(&snapshot, "CP0a1b2c").await?;
    for (volume, byte) in [(&snapshot, 1), (&second, 2), (&volume, 3)] {
        b.expect_content(volume, &[(0, 512, byte)]).await?;
    }
    Ok(())
}

async fn stale_migration(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let client = Client::connect(&b.plug(&volume, "MIR0a1b2c").await?).await?;
    client.write(0, vec![1; 512].into()).await?;
    client.disconnect().await;
    let client = Client::connect(&b.plug(&volume, "7").await?).await?;
    ensure!(client.read(0, 512).await?.iter().all(|b| *b == 1), "what the migration wrote is lost");
    client.write(0, vec![2; 512].into()).await?;
    b.unplug(&volume, "MIR0a1b2c").await?;
    client.write(512, vec![3; 512].into()).await?;
    client.disconnect().await;
    b.unplug(&volume, "7").await?;
    b.expect_content(&volume, &[(0, 512, 2), (512, 512, 3)]).await
}

async fn open_close(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let uri = uri_of(&volume)?;
    for open in [false, true, true, false, false, true] {
        let request = if open { Request::datapath_open(DBG, uri, true) } else { Request::datapath_close(DBG, uri) };
        b.call(&request).await?;
        b.write(&volume, 0, 512, 3).await?;
    }
    b.call(&Request::datapath_close(DBG, uri)).await?;
    b.expect_content(&volume, &[(0, 512, 3)]).await
}

async fn gone(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    b.destroy(&volume.key).await?;
    for method in ["Datapath.attach", "Datapath.activate", "Datapath.activate_readonly"] {
        if b.subject.lacks(Need::Method(method)).is_some() {
            continue;
        }
        let called = b.call(&Request::datapath(method, DBG, uri_of(&volume)?, "7")).await;
        refused(called).context(method)?;
    }
    b.unplug(&volume, "7").await?;
    let left = leftovers(&b.host).await;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

async fn elsewhere(b: Arc<Bench>) -> Result<()> {
    let volume = b.create(MIB).await?;
    let log = crate::script::CallLog::default();
    let root = b.directory().join("b");
    let other = Host::start("b", &root, &b.subject.plugins, &log).await?;
    let checked = refused_elsewhere(&b, &volume, &other).await;
    if checked.is_err() && b.subject.own_layout {
        other.kill(|_| true);
    }
    checked
}

/// Sees that a second host may do nothing with a volume that the first one writes to, and everything after that.
async fn refused_elsewhere(b: &Bench, volume: &Volume, other: &Host) -> Result<()> {
    let dir = other.volume_plugin(&b.subject.sr_type)?.dir.clone();
    other.runner().call(&dir, &Request::sr_attach(DBG, &b.sr.config)).await?;
    let datapath = other.datapath_plugins.values().next().context("no datapath plugin")?.dir.clone();
    let there = async |method| {
        other.runner().call(&datapath, &Request::datapath(method, DBG, uri_of(volume).unwrap_or_default(), "9")).await
    };

    let client = Client::connect(&b.plug(volume, "7").await?).await?;
    client.write(0, vec![1; 512].into()).await?;
    Attached::decode(&there("Datapath.attach").await?)?;
    for method in ["Datapath.activate", "Datapath.activate_readonly"] {
        let failure = there(method).await.err().with_context(|| format!("{method} on a second host succeeded"))?;
        let holder = failure.activated_on_another_host().map(str::to_owned);
        ensure!(holder == Some(b.host.uuid().to_string()), "{method}: {failure}");
    }
    let snapshot = other.runner().call(&dir, &Request::volume("Volume.snapshot", DBG, &b.sr.sr, &volume.key)).await;
    let failure = snapshot.err().context("a second host made a snapshot of what this one writes to")?;
    ensure!(failure.activated_on_another_host().is_some(), "{failure}");
    client.disconnect().await;
    b.unplug(volume, "7").await?;
    there("Datapath.activate").await?;
    for method in ["Datapath.deactivate", "Datapath.detach"] {
        there(method).await?;
    }
    other.runner().call(&dir, &Request::sr("SR.detach", DBG, &b.sr.sr)).await?;
    let left = leftovers(other).await;
    ensure!(left.is_empty(), "{left:?}");
    b.expect_content(volume, &[(0, 512, 1)]).await
}
