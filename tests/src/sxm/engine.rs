//! The frame around all flows (ocaml/xapi/xapi_vm_migrate.ml): each VDI within the one before it, so that success destroys
//! the sources last VDI first, and failure unwinds them in the same order.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::observe::{Event, Observer};
use super::order::{self, Conf};
use super::{Cancel, Failed, Flow, Migrated, Migration, MirrorId, Moved, cleanup, leaf, switch, tree};
use crate::db::{VmRef, Xapi};
use crate::host::{Host, lock};
use crate::report::Phases;
use crate::smapiv2::{Dp, Error, Result, Sr, Vdi, VdiInfo, Vm};

/// What every part of a migration needs.
pub(super) struct Ctx<'a> {
    pub xapi: &'a Xapi,
    pub vm: VmRef,
    pub source: Arc<Host>,
    pub destination: Arc<Host>,
    /// The destination SR.
    pub sr: Sr,
    pub flow: Flow,
    pub poll: Duration,
    pub cancel: Cancel,
    /// The domain's number, or -1.
    pub live_vm: Vm,
    pub dbg: String,
    observer: &'a dyn Observer,
}

impl Ctx<'_> {
    pub fn tell(&self, event: Event) {
        self.observer.event(&event);
    }

    pub fn observer(&self) -> &dyn Observer {
        self.observer
    }
}

/// A source snapshot and its copy, in the flow tree.
#[derive(Debug, Clone)]
pub(super) struct Relation {
    pub source: Vdi,
    pub copy: VdiInfo,
}

/// What a mirror of a live leaf answers.
#[derive(Debug)]
pub(super) struct Sent {
    pub id: MirrorId,
    pub remote: VdiInfo,
    pub relations: Vec<Relation>,
}

/// A volume that has travelled and whose fate hangs on those after it.
#[derive(Debug)]
pub(super) struct Done {
    pub conf: Conf,
    pub dp: Dp,
    pub id: Option<MirrorId>,
    pub remote: VdiInfo,
    pub relations: Vec<Relation>,
}

/// Measures phases, one at a time.
struct Clock {
    phases: Phases,
    phase: &'static str,
    since: Instant,
}

impl Clock {
    fn enter(&mut self, ctx: &Ctx<'_>, phase: &'static str) {
        if self.phase != phase {
            self.stop();
            self.phase = phase;
            ctx.tell(Event::Phase(phase));
        }
    }

    fn stop(&mut self) {
        if !self.phase.is_empty() {
            self.phases.add(self.phase, self.since.elapsed().as_secs_f64());
        }
        self.since = Instant::now();
    }
}

/// Migrates a VM with its snapshots.
///
/// On success the database knows the VM at its new place. On failure xapi's own clean-up has run, then what a user would
/// do about its rest, and the VM runs at the source if it did before.
///
/// # Errors
/// Whatever made it fail, with what was left to sweep.
pub async fn migrate(xapi: &Xapi, migration: &Migration, observer: &dyn Observer) -> Result<Migrated, Box<Failed>> {
    let Ok(record) = xapi.vm(migration.vm) else {
        return Err(Box::new(Failed {
            error: Error::Internal("there is no such VM".to_owned()),
            phase: "prepare".to_owned(),
            swept: Vec::new(),
            restarted: false,
            wires: Vec::new(),
        }));
    };
    let ctx = Ctx {
        xapi,
        vm: migration.vm,
        source: Arc::clone(&record.host),
        destination: Arc::clone(&migration.destination),
        sr: migration.sr.clone(),
        flow: migration.flow,
        poll: migration.poll,
        cancel: migration.cancel.clone(),
        live_vm: Vm(record.domid.map_or_else(|| "-1".to_owned(), |domid| domid.to_string())),
        dbg: format!("OpaqueRef:{}", record.uuid),
        observer,
    };
    let wires_before = ctx.source.wires().all().len();
    let mut clock = Clock { phases: Phases::default(), phase: "", since: Instant::now() };
    let mut done = Vec::new();
    let moved = forward(&ctx, &mut done, &mut clock).await;
    let wires = ctx.source.wires().all().split_off(wires_before);
    match moved {
        Ok(switched) => {
            clock.enter(&ctx, "destroy source");
            let not_destroyed = destroy_sources(&ctx, &done).await;
            let moved = moved_volumes(&ctx, &done);
            let stale = stale(&ctx, &done);
            switch::commit(&ctx, &done, switched.as_ref().map(|s| s.domid));
            clock.stop();
            let downtime = switched.map(|s| s.downtime);
            Ok(Migrated { moved, phases: clock.phases, downtime, wires, stale, not_destroyed })
        }
        Err(failure) => {
            let phase = clock.phase.to_owned();
            clock.enter(&ctx, "clean up");
            let error = unwind(&ctx, &done, failure.error).await;
            let restarted = failure.suspended && switch::restart(&ctx).await;
            let swept = sweep_all(&ctx).await;
            Err(Box::new(Failed { error, phase, swept, restarted, wires }))
        }
    }
}

/// An error on the way, and whether the VM was suspended by then.
struct Failure {
    error: Error,
    suspended: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, suspended: false }
    }
}

async fn forward(
    ctx: &Ctx<'_>,
    done: &mut Vec<Done>,
    clock: &mut Clock,
) -> Result<Option<switch::Switched>, Failure> {
    clock.enter(ctx, "prepare");
    let confs = order::order(&ctx.xapi.db(), ctx.vm, ctx.flow);
    assert_can_migrate(ctx, &confs)?;
    for conf in confs {
        ctx.cancel.check()?;
        clock.enter(ctx, if conf.is_leaf() { "mirror" } else { "copy" });
        let dp = Dp(format!("{}_{}", if conf.is_leaf() { "mirror" } else { "copy" }, conf.dp));
        match one(ctx, &conf, &dp, done).await {
            Ok((id, remote, relations)) => done.push(Done { conf, dp, id, remote, relations }),
            Err(error) => {
                if let Err(error) = ctx.source.dp_destroy(&ctx.dbg, &dp).await {
                    tracing::warn!(%error, %dp, "failed to clean up a datapath");
                }
                return Err(error.into());
            }
        }
    }
    clock.enter(ctx, "metadata");
    switch::update_snapshot_info(ctx, done).await?;
    ctx.cancel.check()?;
    // The local datapaths go before the VM does.
    for done in done.iter() {
        ctx.source.dp_destroy(&ctx.dbg, &done.dp).await?;
    }
    clock.enter(ctx, "switch");
    if ctx.live_vm.0 == "-1" {
        return Ok(None);
    }
    switch::migrate_vm(ctx, done).await.map(Some).map_err(|error| Failure { error, suspended: true })
}

fn assert_can_migrate(ctx: &Ctx<'_>, confs: &[Conf]) -> Result<()> {
    for (host, sr, features) in confs.iter().map(|c| (&ctx.source, &c.sr, ["VDI_SNAPSHOT", "VDI_MIRROR"])).chain([(
        &ctx.destination,
        &ctx.sr,
        ["VDI_SNAPSHOT", "VDI_MIRROR_IN"],
    )]) {
        for feature in features {
            if !host.sr_has(sr, feature) {
                return Err(Error::Unimplemented(format!("{feature} of SR {sr} on {}", host.name())));
            }
        }
    }
    Ok(())
}

type One = (Option<MirrorId>, VdiInfo, Vec<Relation>);

/// One VDI to the destination, up to the scan that finds it there.
async fn one(ctx: &Ctx<'_>, conf: &Conf, dp: &Dp, done: &[Done]) -> Result<One> {
    let base = match (ctx.flow, &conf.parent) {
        (Flow::Base, Some(parent)) => done.iter().find(|d| d.conf.vdi == *parent).map(|d| &d.remote.vdi),
        _ => None,
    };
    let (id, remote, relations) = if conf.is_leaf() {
        let sent = leaf::start(ctx, conf, dp, base).await?;
        mirror_stat(&ctx.source, &ctx.dbg, &sent.id).await?;
        (Some(sent.id), sent.remote, sent.relations)
    } else if ctx.flow == Flow::Base {
        (None, super::base::copy_onto(ctx, conf, base).await?, Vec::new())
    } else {
        (None, super::copy::copy_into_sr(ctx, conf).await?, Vec::new())
    };
    let found = ctx.destination.sr_scan(&ctx.dbg, &ctx.sr).await?;
    if !found.iter().any(|v| v.vdi == remote.vdi) {
        return Err(Error::VdiDoesNotExist(remote.vdi.0.clone()));
    }
    Ok((id, remote, relations))
}

/// `DATA.MIRROR.stat`: whether the mirror has failed, if one was started.
async fn mirror_stat(host: &Host, dbg: &str, id: &MirrorId) -> Result<bool> {
    let (sending, receiving) = {
        let state = lock(&host.sxm);
        (state.sends.get(id).cloned(), state.receives.contains_key(id))
    };
    match sending {
        Some(sending) => match sending.operation {
            Some(operation) => Ok(host.data_stat(dbg, &id.sr, &id.vdi, &operation).await?.failed),
            None => Ok(false),
        },
        None if receiving => Ok(false),
        None => Err(Error::Internal(format!("there is no mirror {id}"))),
    }
}

/// What each level of the nesting does when something within it failed.
async fn unwind(ctx: &Ctx<'_>, done: &[Done], mut error: Error) -> Error {
    for done in done.iter().rev() {
        if let Some(id) = &done.id {
            match mirror_stat(&ctx.source, &ctx.dbg, id).await {
                // Not guarded in xapi: nothing is stopped then, and the user sees this error instead of the first. The
                // first is what a reader of a report wants.
                Err(other) => tracing::warn!(%other, %id, "DATA.MIRROR.stat failed"),
                Ok(failed) => {
                    if let Err(error) = cleanup::stop(&ctx.source, &ctx.dbg, id).await {
                        tracing::warn!(%error, %id, "stop failed");
                    }
                    if failed {
                        error = Error::Mirror(format!("mirror_failed {}", done.conf.vdi));
                    }
                }
            }
        }
        tree::destroy_logged(ctx, &done.remote.vdi).await;
        // The published walk forgets its snapshots once it has returned; a user would have to destroy them.
        for relation in done.relations.iter().rev() {
            tree::destroy_logged(ctx, &relation.copy.vdi).await;
        }
        if let Err(error) = ctx.source.dp_destroy(&ctx.dbg, &done.dp).await {
            tracing::warn!(%error, dp = %done.dp, "failed to clean up a datapath");
        }
    }
    error
}

/// Destroys the sources, last VDI first; in the flow tree a leaf goes before the snapshots that went with it.
async fn destroy_sources(ctx: &Ctx<'_>, done: &[Done]) -> Vec<Vdi> {
    let mut left = Vec::new();
    for done in done.iter().rev() {
        let mut all = vec![&done.conf.vdi];
        all.extend(done.relations.iter().map(|r| &r.source));
        for vdi in all {
            // xapi would unwind here although the VM runs at the destination already, and destroy the copies of its
            // snapshots; what a plugin can be asked is to succeed when it is asked again.
            let mut result = ctx.source.vdi_destroy(&ctx.dbg, &done.conf.sr, vdi).await;
            if result.is_err() {
                result = ctx.source.vdi_destroy(&ctx.dbg, &done.conf.sr, vdi).await;
            }
            if let Err(error) = result {
                tracing::warn!(%error, %vdi, "a source volume stays");
                left.push(vdi.clone());
            }
        }
    }
    left
}

fn moved_volumes(ctx: &Ctx<'_>, done: &[Done]) -> Vec<Moved> {
    let db = ctx.xapi.db();
    let mut destinations: Vec<(&Vdi, &Vdi)> = done.iter().map(|d| (&d.conf.vdi, &d.remote.vdi)).collect();
    destinations.extend(done.iter().flat_map(|d| d.relations.iter().map(|r| (&r.source, &r.copy.vdi))));
    order::order(&db, ctx.vm, Flow::Base)
        .into_iter()
        .filter_map(|conf| {
            let (_, destination) = destinations.iter().find(|(source, _)| **source == conf.vdi)?;
            Some(Moved {
                source: conf.vdi,
                destination: (*destination).clone(),
                parent: conf.parent,
                snapshot: conf.snapshot,
                disk: conf.index,
            })
        })
        .collect()
}

/// The receivers that nobody finalised: those of a halted VM.
fn stale(ctx: &Ctx<'_>, done: &[Done]) -> Vec<super::Receiving> {
    let state = lock(&ctx.source.sxm);
    done.iter().filter_map(|d| state.receives.get(d.id.as_ref()?).cloned()).collect()
}

/// After a failure: the records that xapi forgot, and then every volume at either side that no database knows.
async fn sweep_all(ctx: &Ctx<'_>) -> Vec<cleanup::Swept> {
    let confs = order::leaves(&ctx.xapi.db(), ctx.vm);
    for conf in &confs {
        let id = MirrorId { sr: conf.sr.clone(), vdi: conf.vdi.clone() };
        // As the next toolstack restart would.
        cleanup::receive_cancel(&ctx.source, &ctx.dbg, &id).await;
        lock(&ctx.source.sxm).sends.remove(&id);
    }
    let mut swept = Vec::new();
    let mut places: Vec<(&Arc<Host>, &Sr)> = vec![(&ctx.destination, &ctx.sr)];
    places.extend(confs.iter().map(|c| (&ctx.source, &c.sr)));
    places.dedup_by(|a, b| a.1 == b.1 && Arc::ptr_eq(a.0, b.0));
    for (host, sr) in places {
        match cleanup::sweep(ctx.xapi, host, sr).await {
            Ok(found) => swept.extend(found),
            Err(error) => tracing::warn!(%error, %sr, "cannot sweep"),
        }
    }
    swept
}
