//! `DATA.copy` (the SMAPIv1 module of ocaml/xapi/storage_smapiv1_migrate.ml, whatever the SR is): a whole snapshot into a
//! blank volume, with no regard to what it is based on.

use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::process::Command;

use super::engine::Ctx;
use super::leaf::new_dp;
use super::observe::Event;
use super::order::Conf;
use crate::host::{Host, ImportPath};
use crate::nbd::{Client, Uri};
use crate::smapiv2::{Dp, Error, Result, Sr, Vdi, VdiInfo, Vm, nbd_server};

/// How long a copy may stand still. sparse_dd itself waits for ever for a proxy that failed before it pumped, because xapi
/// forgets to close its connection, until somebody cancels the task.
const SILENCE: Duration = Duration::from_secs(10);

/// Copies one volume into the destination SR and answers the snapshot that stays there.
///
/// What fails after the blank volume was made leaves it behind, as xapi does.
pub(super) async fn copy_into_sr(ctx: &Ctx<'_>, conf: &Conf) -> Result<VdiInfo> {
    let (source, host, sr) = (&ctx.source, &ctx.destination, &ctx.sr);
    let local = find(source.sr_scan(&ctx.dbg, &conf.sr).await?, &conf.vdi)?;
    host.sr_scan(&ctx.dbg, sr).await?;
    let blank = host.vdi_create(&ctx.dbg, sr, &VdiInfo { ty: conf.info.ty.clone(), ..local }).await?;

    let remote = find(host.sr_scan(&ctx.dbg, sr).await?, &blank.vdi)?;
    let volumes = source.sr_scan(&ctx.dbg, &conf.sr).await?;
    let local = find(volumes.clone(), &conf.vdi)?;
    if local.virtual_size > remote.virtual_size {
        return Err(Error::Internal("local VDI is larger than the remote VDI".to_owned()));
    }
    // Content ids are empty where nobody has set them, and empty equals empty: any volume of the SR may be the base.
    let base = volumes.into_iter().find(|v| v.content_id == remote.content_id).map(|v| v.vdi);

    let (remote_dp, base_dp, leaf_dp) = (new_dp(), new_dp(), new_dp());
    let copied = async {
        let vm = &conf.copy_vm;
        let attached = host.vdi_attach3(&ctx.dbg, &remote_dp, sr, &remote.vdi, vm, true).await?;
        let export = nbd_server(&attached).map(|u| u.export().to_owned());
        let export = export.ok_or_else(|| Error::Internal("no NBD server at the destination".to_owned()))?;
        host.vdi_activate3(&ctx.dbg, &remote_dp, sr, &remote.vdi, vm).await?;
        let path = ImportPath { vm: vm.clone(), sr: sr.clone(), vdi: remote.vdi.clone(), dp: remote_dp.clone() };
        ctx.tell(Event::Started { source: conf.vdi.clone(), destination: remote.vdi.clone() });
        let base = match &base {
            Some(base) => Some(Disk::open(ctx, &conf.sr, base, &base_dp, vm).await?),
            None => None,
        };
        let copied = async {
            let leaf = Disk::open(ctx, &conf.sr, &conf.vdi, &leaf_dp, vm).await?;
            let copying = Copying {
                source,
                destination: host,
                vm,
                vdi: conf.vdi.clone(),
                from: format!("nbd+unix:///{}?socket={}", leaf.uri.export(), leaf.uri.socket().display()),
                export: &export,
                path,
            };
            let copied = sparse_dd(copying, || ctx.cancel.check().is_err()).await;
            leaf.close(ctx).await.and(copied)
        }
        .await;
        match base {
            Some(base) => base.close(ctx).await.and(copied),
            None => copied,
        }
    }
    .await;
    host.dp_destroy(&ctx.dbg, &remote_dp).await?;
    copied?;
    ctx.tell(Event::Complete { source: conf.vdi.clone() });

    host.vdi_set_content_id(&ctx.dbg, sr, &remote.vdi, &local.content_id).await?;
    source.vdi_set_content_id(&ctx.dbg, &conf.sr, &local.vdi, &local.content_id).await?;
    let remote = find(host.sr_scan(&ctx.dbg, sr).await?, &remote.vdi)?;
    let snapshot = host.vdi_snapshot(&ctx.dbg, sr, &remote).await?;
    host.vdi_destroy(&ctx.dbg, sr, &remote.vdi).await?;
    ctx.tell(Event::Arrived { source: conf.vdi.clone(), destination: snapshot.vdi.clone() });
    Ok(VdiInfo { content_id: local.content_id, ty: remote.ty, ..snapshot })
}

fn find(volumes: Vec<VdiInfo>, vdi: &Vdi) -> Result<VdiInfo> {
    volumes.into_iter().find(|v| v.vdi == *vdi).ok_or_else(|| Error::VdiDoesNotExist(vdi.0.clone()))
}

/// A source volume that is attached read-only and has a client, as a device of dom0 would be.
struct Disk<'a> {
    sr: &'a Sr,
    vdi: &'a Vdi,
    dp: &'a Dp,
    vm: &'a Vm,
    uri: Uri,
    client: Client,
}

impl<'a> Disk<'a> {
    async fn open(ctx: &Ctx<'_>, sr: &'a Sr, vdi: &'a Vdi, dp: &'a Dp, vm: &'a Vm) -> Result<Self> {
        let host = &ctx.source;
        let attached = host.vdi_attach3(&ctx.dbg, dp, sr, vdi, vm, false).await?;
        let opened = async {
            let uri = nbd_server(&attached);
            let uri = uri.ok_or_else(|| Error::Internal("no NBD server at the source".to_owned()))?;
            host.vdi_activate3(&ctx.dbg, dp, sr, vdi, vm).await?;
            match Client::connect(&uri).await {
                Ok(client) => Ok((uri, client)),
                Err(error) => {
                    let _ = host.vdi_deactivate(&ctx.dbg, dp).await;
                    Err(Error::Internal(format!("cannot reach the source volume: {error}")))
                }
            }
        }
        .await;
        match opened {
            Ok((uri, client)) => Ok(Self { sr, vdi, dp, vm, uri, client }),
            Err(error) => {
                host.vdi_detach(&ctx.dbg, dp, sr, vdi, vm).await?;
                Err(error)
            }
        }
    }

    async fn close(self, ctx: &Ctx<'_>) -> Result<()> {
        self.client.disconnect().await;
        let deactivated = ctx.source.vdi_deactivate(&ctx.dbg, self.dp).await;
        ctx.source.vdi_detach(&ctx.dbg, self.dp, self.sr, self.vdi, self.vm).await?;
        deactivated.map(drop)
    }
}

/// What sparse_dd is told.
pub(super) struct Copying<'a> {
    pub(super) source: &'a Arc<Host>,
    pub(super) destination: &'a Arc<Host>,
    /// The domain of the copy, which names the source's proxy.
    pub(super) vm: &'a Vm,
    pub(super) vdi: Vdi,
    /// What nbdcopy reads.
    pub(super) from: String,
    /// What it writes to, through the proxies.
    pub(super) export: &'a str,
    pub(super) path: ImportPath,
}

/// What sparse_dd does, by libnbd's nbdcopy: one connection through the proxy, a destination known to be blank.
pub(super) async fn sparse_dd(copying: Copying<'_>, cancelled: impl Fn() -> bool) -> Result<()> {
    let Copying { source, destination, vm, vdi, from, export, path } = copying;
    let internal = |e: &dyn std::fmt::Display| Error::Internal(format!("sparse_dd: {e}"));
    let listener = source.bind_export(vm).map_err(|e| internal(&format!("{e:#}")))?;
    source.run_export(listener, vdi, destination, path);
    let mut child = Command::new("nbdcopy")
        .args(["--connections=1", "--requests=16", "--flush", "--destination-is-zero"])
        .arg(from)
        .arg(format!("nbd+unix:///{export}?socket={}", source.export_socket(vm).display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| internal(&e))?;
    let sent = || source.wires().all().iter().map(|wire| wire.to_destination()).sum::<u64>();
    let (mut last, mut moved) = (sent(), Instant::now());
    loop {
        tokio::select! {
            status = child.wait() => {
                let status = status.map_err(|e| internal(&e))?;
                if status.success() {
                    return Ok(());
                }
                let mut said = String::new();
                if let Some(stderr) = &mut child.stderr {
                    let _ = tokio::io::AsyncReadExt::read_to_string(stderr, &mut said).await;
                }
                return Err(internal(&format!("{status}: {}", said.trim())));
            }
            () = tokio::time::sleep(Duration::from_millis(100)) => {
                if cancelled() {
                    let _ = child.kill().await;
                    return Err(Error::Cancelled);
                }
                let now = sent();
                if now != last {
                    (last, moved) = (now, Instant::now());
                } else if moved.elapsed() >= SILENCE {
                    let _ = child.kill().await;
                    return Err(internal(&"nothing was sent for too long"));
                }
            }
        }
    }
}
