//! The SMAPIv3 engine's mirror of one live leaf (ocaml/xapi/storage_smapiv3_migrate.ml): what all flows end with.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::engine::Ctx;
use super::observe::Event;
use super::order::Conf;
use super::{MirrorId, Receiving, Sending};
use crate::host::{Host, ImportPath, lock};
use crate::smapiv2::{Dp, Error, Result, Sr, Vdi, VdiInfo, Vm, nbd_server};
use crate::wire::Operation;

/// In the flow leaf the proxy thread and `Data.mirror` start together, and the socket comes when it comes.
const LATE: Duration = Duration::from_millis(200);

/// A destination volume that is attached and active for a mirror.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub info: VdiInfo,
    pub dp: Dp,
    pub vm: Vm,
    pub export: String,
}

/// A fresh datapath name.
pub(super) fn new_dp() -> Dp {
    Dp(Uuid::new_v4().to_string())
}

/// Attaches and activates a destination volume for a mirror; nothing is undone here.
pub(super) async fn open_target(ctx: &Ctx<'_>, info: VdiInfo, dp: Dp, vm: &Vm) -> Result<Target> {
    let (host, sr) = (&ctx.destination, &ctx.sr);
    let attached = host.vdi_attach3(&ctx.dbg, &dp, sr, &info.vdi, vm, true).await?;
    let uri = nbd_server(&attached).ok_or_else(|| Error::Preparation("cannot parse nbd uri".to_owned()))?;
    host.vdi_activate3(&ctx.dbg, &dp, sr, &info.vdi, vm).await?;
    Ok(Target { info, dp, vm: vm.clone(), export: uri.export().to_owned() })
}

/// `receive_start3`: the destination's leaf, blank or a clone of a base, attached and active.
///
/// `size` is the leaf's own in xapi; the flow tree asks for the first node's, because a mirror's ends have to be of one
/// size and its working volume begins as that node.
pub(super) async fn receive_start(
    ctx: &Ctx<'_>,
    conf: &Conf,
    id: &MirrorId,
    base: Option<&Vdi>,
    size: i64,
) -> Result<Target> {
    let (host, sr) = (&ctx.destination, &ctx.sr);
    let wanted = VdiInfo { virtual_size: size, ..conf.info.clone() };
    let leaf = match base {
        None => host.vdi_create(&ctx.dbg, sr, &wanted).await?,
        Some(base) => super::base::clone_base(ctx, base, &wanted, Some(&id.to_string())).await?,
    };
    let vdi = leaf.vdi.clone();
    match open_target(ctx, leaf, new_dp(), &conf.mirror_vm).await {
        Ok(target) => {
            let receiving = Receiving {
                host: Arc::clone(host),
                sr: sr.clone(),
                vdi,
                dp: target.dp.clone(),
                vm: conf.mirror_vm.clone(),
            };
            lock(&ctx.source.sxm).receives.insert(id.clone(), receiving);
            Ok(target)
        }
        Err(error) => {
            // xapi destroys the volume without detaching it first.
            if let Err(error) = host.vdi_destroy(&ctx.dbg, sr, &vdi).await {
                tracing::warn!(%error, %vdi, "clean-up of the destination leaf failed");
            }
            Err(error)
        }
    }
}

/// Starts the proxy of one connection and the mirror through it.
pub(super) async fn start_mirror(
    ctx: &Ctx<'_>,
    source: (&Sr, &Vdi, &Vm),
    socket_vm: &Vm,
    target: &Target,
    late: bool,
) -> Result<Operation> {
    let (sr, vdi, vm) = source;
    let path =
        ImportPath { vm: target.vm.clone(), sr: ctx.sr.clone(), vdi: target.info.vdi.clone(), dp: target.dp.clone() };
    let remote = remote_uri(&target.export, &ctx.source, socket_vm);
    let (host, destination, socket_vm, from) =
        (Arc::clone(&ctx.source), Arc::clone(&ctx.destination), socket_vm.clone(), vdi.clone());
    ctx.tell(Event::Started { source: vdi.clone(), destination: target.info.vdi.clone() });
    if late {
        let spawner = Arc::clone(&host);
        let claim = host.claim_export(&socket_vm);
        spawner.spawn(async move {
            tokio::time::sleep(LATE).await;
            match host.bind_claimed(&socket_vm, claim) {
                Ok(Some(listener)) => host.run_export(listener, from, &destination, path),
                Ok(None) => {}
                Err(error) => tracing::error!(error = format!("{error:#}"), "no export proxy"),
            }
        });
    } else {
        host.claim_export(&socket_vm);
        let listener = host.bind_export(&socket_vm).map_err(|e| Error::Internal(format!("{e:#}")))?;
        host.run_export(listener, from, &destination, path);
    }
    ctx.source.data_mirror(&ctx.dbg, sr, vdi, vm, &remote).await
}

fn remote_uri(export: &str, host: &Host, socket_vm: &Vm) -> String {
    let mut name = String::new();
    for byte in export.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            name.push(char::from(byte));
        } else {
            name.push_str(&format!("%{byte:02X}"));
        }
    }
    format!("nbd+unix:///{name}?socket={}", host.export_socket(socket_vm).display())
}

/// Asks until the mirror is complete or has failed; complete is looked at first.
pub(super) async fn wait_for_mirror(
    ctx: &Ctx<'_>,
    sr: &Sr,
    vdi: &Vdi,
    operation: &Operation,
    poll: Option<Duration>,
) -> Result<()> {
    if matches!(operation, Operation::Copy(_)) {
        // The flows leaf and tree take a copy for done at once.
        return match ctx.flow {
            super::Flow::Base => Err(Error::Internal("Data.mirror answered CopyV1".to_owned())),
            _ => Ok(()),
        };
    }
    loop {
        let status = ctx.source.data_stat(&ctx.dbg, sr, vdi, operation).await?;
        ctx.tell(Event::Progress { source: vdi.clone(), fraction: status.progress });
        if status.complete {
            ctx.tell(Event::Complete { source: vdi.clone() });
            return Ok(());
        }
        if status.failed {
            return Err(Error::Mirror("Mirror failed during syncing".to_owned()));
        }
        if let Some(poll) = poll {
            // The published walk does not look here; that it does makes every point of it a place to stop.
            ctx.cancel.check()?;
            tokio::time::sleep(poll).await;
        }
    }
}

/// The mirror of the live leaf itself, once the destination is what it is based on.
pub(super) async fn mirror_leaf(ctx: &Ctx<'_>, conf: &Conf, id: &MirrorId, target: &Target) -> Result<()> {
    // Generation A polls without a pause and never looks whether somebody cancelled.
    let poll = (ctx.flow != super::Flow::Leaf).then_some(ctx.poll);
    let live = (&conf.sr, &conf.vdi, &ctx.live_vm);
    let operation = start_mirror(ctx, live, &conf.mirror_vm, target, ctx.flow == super::Flow::Leaf).await?;
    if let Some(sending) = lock(&ctx.source.sxm).sends.get_mut(id) {
        sending.remote = Some(target.info.vdi.clone());
        sending.operation = Some(operation.clone());
    }
    let waited = wait_for_mirror(ctx, &conf.sr, &conf.vdi, &operation, poll).await;
    if matches!(waited, Err(Error::Mirror(_)))
        && let Some(sending) = lock(&ctx.source.sxm).sends.get_mut(id)
    {
        sending.failed = true;
    }
    waited
}

/// `Storage_migrate.start`: scan, prepare, send; with the clean-up that each kind of error gets.
pub(super) async fn start(ctx: &Ctx<'_>, conf: &Conf, dp: &Dp, base: Option<&Vdi>) -> Result<super::engine::Sent> {
    let scanned = ctx.source.sr_scan(&ctx.dbg, &conf.sr).await?;
    let local = scanned.into_iter().find(|v| v.vdi == conf.vdi);
    let local = local.ok_or_else(|| Error::VdiDoesNotExist(conf.vdi.0.clone()))?;
    let conf = &Conf { info: VdiInfo { ty: conf.info.ty.clone(), ..local }, ..conf.clone() };
    let id = MirrorId { sr: conf.sr.clone(), vdi: conf.vdi.clone() };
    let sending = Sending { local_dp: dp.clone(), remote: None, operation: None, failed: false };
    lock(&ctx.source.sxm).sends.insert(id.clone(), sending);
    let forest = super::tree::forest_of(ctx, conf);
    let size = super::tree::first_size(&forest).unwrap_or(conf.info.virtual_size);

    let sent = async {
        let mut target =
            receive_start(ctx, conf, &id, base, size).await.map_err(|error| Error::Preparation(error.to_string()))?;
        ctx.source.vdi_attach3(&ctx.dbg, dp, &conf.sr, &conf.vdi, &Vm::from("0"), true).await?;
        let relations = if ctx.flow == super::Flow::Tree {
            super::tree::send(ctx, conf, &id, &mut target, &forest).await?
        } else {
            // Everything that fails from here on counts as a failed mirror.
            mirror_leaf(ctx, conf, &id, &target).await.map_err(|error| match error {
                Error::Cancelled => Error::Cancelled,
                error => Error::Mirror(error.to_string()),
            })?;
            Vec::new()
        };
        Ok(super::engine::Sent { id: id.clone(), remote: target.info.clone(), relations })
    }
    .await;

    if let Err(error) = &sent {
        match error {
            Error::SrNotAttached(_) => {}
            Error::Mirror(_) => super::cleanup::receive_cancel(&ctx.source, &ctx.dbg, &id).await,
            _ => {
                if let Err(error) = super::cleanup::stop(&ctx.source, &ctx.dbg, &id).await {
                    tracing::warn!(%error, %id, "stop failed");
                }
            }
        }
    }
    sent
}
