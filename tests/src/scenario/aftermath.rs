//! What is looked at once a migration is over: the rest of the report.

use std::time::Duration;

use anyhow::{Context, Result};

use super::{Stage, Witness};
use crate::db::VmRef;
use crate::disk::{Inventory, Sr as SrFiles};
use crate::guest::{Durability, verify_export};
use crate::host::Leftovers;
use crate::nbd::Client;
use crate::report::Report;
use crate::sxm::{self, Failed, Migrated};

const DBG: &str = "OpaqueRef:aftermath";
/// How long what a plugin left running may take to end by itself.
const SETTLE: Duration = Duration::from_secs(20);
/// Records that each guest has to get written after the switch.
const AFTER_SWITCH: u64 = 50;

/// Fills in the report of a migration that succeeded; answers the picture of both sides.
pub(super) async fn of_success(
    stage: &Stage,
    witness: &Witness,
    vm: VmRef,
    migrated: &Migrated,
    report: &mut Report,
) -> Result<String> {
    // Guests write at the destination, and all that they ever wrote is there.
    if let Err(error) = witness.guests_write(AFTER_SWITCH).await {
        report.problems.push(format!("after the switch {error:#}"));
    }
    witness.suspend_guests().await;
    let mut acknowledged = true;
    for (ledger, uri) in witness.ledgers() {
        let client = Client::connect(&uri).await?;
        let verdict = verify_export(&ledger, &client, Durability::Acknowledged).await?;
        client.disconnect().await;
        if let Some(first) = verdict.violations.first() {
            acknowledged = false;
            let (wrong, checked) = (verdict.wrong, verdict.checked);
            report.problems.push(format!("after the switch {wrong} of {checked} blocks are wrong, {first}"));
        }
    }

    let mut judging = 0.0;
    let mut drawing = String::new();
    match witness.take_judged() {
        Ok(judged) => {
            judging = judged.took.as_secs_f64();
            drawing = judged.drawing;
            report.properties.topology = judged.judgement.topology;
            report.properties.content = judged.judgement.content && judged.history;
            acknowledged &= judged.acknowledged_writes;
            report.problems.extend(judged.judgement.problems);
            report.nodes = judged.judgement.nodes;
            report.physical_bytes = judged.physical_bytes;
            report.source_physical_bytes = judged.source_physical_bytes;
            report.unique_allocated_bytes = judged.unique_allocated_bytes;
        }
        Err(error) => report.problems.push(format!("nothing could be judged: {error:#}")),
    }
    report.properties.acknowledged_writes = acknowledged;
    report.bytes_on_the_wire = migrated.wires.iter().map(|wire| wire.to_destination()).sum();
    report.bytes_back = migrated.wires.iter().map(|wire| wire.from_destination()).sum();
    report.downtime_seconds = witness.downtime().map(|downtime| downtime.as_secs_f64());
    for (phase, seconds) in migrated.phases.iter() {
        let judged_in_it = if phase == if witness.downtime().is_some() { "switch" } else { "destroy source" } {
            judging
        } else {
            0.0
        };
        report.seconds.add(phase, seconds - judged_in_it);
    }
    report.seconds.add("judge", judging);

    stage.xapi.vm_shutdown(vm).await.context("the VM could not be shut down at the destination")?;
    sxm::release(&stage.source, &migrated.stale).await.context("a halted VM's receiver could not be released")?;
    source_after_success(stage, report).await?;
    destination_after_success(stage, witness, report).await.map(|()| drawing)
}

async fn source_after_success(stage: &Stage, report: &mut Report) -> Result<()> {
    let left = Inventory::of(&stage.source_path)?;
    report
        .problems
        .extend(left.beyond(&Inventory::default()).iter().map(|what| format!("left at the source: {what}")));
    let listed = stage.source.sr_ls(DBG, &stage.source_sr).await?;
    report.problems.extend(listed.iter().map(|volume| format!("SR.ls at the source still has {}", volume.key)));
    let settled = stage.settled(&stage.source, SETTLE, &mut report.problems).await;
    report.properties.source_clean = left.is_empty() && listed.is_empty() && settled;
    Ok(())
}

/// The destination has what was migrated and nothing else, by its files, its records and SR.ls alike.
async fn destination_after_success(stage: &Stage, witness: &Witness, report: &mut Report) -> Result<()> {
    let sr = SrFiles::read(&stage.destination_path)?;
    let mut wrong = sr.contradictions()?;
    wrong.extend(sr.check()?);
    let pairs = witness.pairs();
    let mut expected: Vec<&str> = pairs.iter().map(|pair| pair.destination.as_str()).collect();
    let mut recorded: Vec<&str> = sr.volumes().collect();
    let volumes = stage.destination.sr_ls(DBG, &stage.destination_sr).await?;
    let mut listed: Vec<&str> = volumes.iter().map(|volume| volume.key.as_str()).collect();
    for list in [&mut expected, &mut recorded, &mut listed] {
        list.sort_unstable();
    }
    for (place, there) in [("its records", recorded), ("SR.ls", listed)] {
        if there != expected {
            wrong.push(format!("the destination has {there:?} by {place}, not {expected:?}"));
        }
    }
    for (snapshot, disk) in witness.snapshots() {
        let found = volumes.iter().find(|volume| volume.key == snapshot);
        let of = found.and_then(|volume| volume.key_value("snapshot_of"));
        if of != Some(&disk) || found.is_none_or(|volume| volume.key_value("is_a_snapshot") != Some("true")) {
            report.properties.topology = false;
            report.problems.push(format!("by SR.ls {snapshot} is a snapshot of {of:?}, not of {disk}"));
        }
    }
    let settled = stage.settled(&stage.destination, SETTLE, &mut report.problems).await;
    report.properties.destination_clean = wrong.is_empty() && settled;
    report.problems.extend(wrong);
    Ok(())
}

/// Fills in the report of a migration that failed: never ok, but source and destination are to be as before.
pub(super) async fn of_failure(
    stage: &Stage,
    witness: &Witness,
    vm: VmRef,
    failed: Failed,
    report: &mut Report,
) -> Result<()> {
    report.bytes_on_the_wire = failed.wires.iter().map(|wire| wire.to_destination()).sum();
    report.bytes_back = failed.wires.iter().map(|wire| wire.from_destination()).sum();
    report.problems.push(format!("{:#}", anyhow::Error::from(failed)));
    let wrote = witness.guests_write(AFTER_SWITCH).await;
    if let Err(error) = &wrote {
        report.problems.push(format!("at the source {error:#}"));
    }
    witness.suspend_guests().await;
    let mut acknowledged = wrote.is_ok();
    for (ledger, uri) in witness.ledgers() {
        let client = Client::connect(&uri).await?;
        acknowledged &= verify_export(&ledger, &client, Durability::Acknowledged).await?.holds();
        client.disconnect().await;
    }
    report.properties.acknowledged_writes = acknowledged;
    stage.xapi.vm_shutdown(vm).await.context("the VM could not be shut down at the source")?;
    let left = Inventory::of(&stage.destination_path)?;
    let what = left.beyond(&Inventory::default());
    report.problems.extend(what.iter().map(|what| format!("left at the destination: {what}")));
    let ended = Leftovers::without_ended_mirrors;
    let settled = stage.settled_but_for(&stage.destination, SETTLE, ended, &mut report.problems).await;
    report.properties.destination_clean = left.is_empty() && settled;
    let contradictions = SrFiles::read(&stage.source_path)?.contradictions()?;
    let settled = stage.settled_but_for(&stage.source, SETTLE, ended, &mut report.problems).await;
    report.properties.source_clean = contradictions.is_empty() && settled;
    report.problems.extend(contradictions);
    Ok(())
}
