//! The copy onto a named base (xen-api pull request 7223 as merged): each snapshot is mirrored in full into a clone of its
//! parent's copy, and a snapshot of that clone is what stays.

use super::engine::Ctx;
use super::leaf;
use super::observe::Event;
use super::order::Conf;
use crate::smapiv2::{Error, Result, Vdi, VdiInfo};

/// A clone of a base, named as what it will hold and at least as large.
pub(super) async fn clone_base(
    ctx: &Ctx<'_>,
    base: &Vdi,
    wanted: &VdiInfo,
    mirror_id: Option<&str>,
) -> Result<VdiInfo> {
    let (host, sr) = (&ctx.destination, &ctx.sr);
    let base = host.vdi_stat(&ctx.dbg, sr, base).await?;
    let mut clone = host.vdi_clone(&ctx.dbg, sr, &base).await?;
    let prepared = async {
        host.vdi_set_name_label(&ctx.dbg, sr, &clone.vdi, &wanted.name_label).await?;
        host.vdi_set_name_description(&ctx.dbg, sr, &clone.vdi, &wanted.name_description).await?;
        if let Some(id) = mirror_id {
            host.vdi_add_to_sm_config(&ctx.dbg, sr, &clone.vdi, "base_mirror", id).await?;
        }
        if clone.virtual_size < wanted.virtual_size {
            clone.virtual_size = host.vdi_resize(&ctx.dbg, sr, &clone.vdi, wanted.virtual_size).await?;
        }
        Ok(())
    }
    .await;
    match prepared {
        Ok(()) => Ok(VdiInfo { ty: wanted.ty.clone(), ..clone }),
        Err(error) => {
            super::tree::destroy_logged(ctx, &clone.vdi).await;
            Err(error)
        }
    }
}

/// `DATA.copy2`: one snapshot, onto the copy of the volume that it is based on.
pub(super) async fn copy_onto(ctx: &Ctx<'_>, conf: &Conf, base: Option<&Vdi>) -> Result<VdiInfo> {
    let (source, host, sr) = (&ctx.source, &ctx.destination, &ctx.sr);
    let local = source.vdi_stat(&ctx.dbg, &conf.sr, &conf.vdi).await?;
    let wanted = VdiInfo { ty: conf.info.ty.clone(), ..local };
    let clone = match base {
        None => host.vdi_create(&ctx.dbg, sr, &wanted).await?,
        Some(base) => clone_base(ctx, base, &wanted, None).await?,
    };
    let (vdi, dp) = (clone.vdi.clone(), leaf::new_dp());
    let copied = copy_into(ctx, conf, clone, dp.clone()).await;
    // The clone goes in any case; what of that fails is only logged.
    let log = |error: Error| tracing::warn!(%error, %vdi, "clean-up of a copy failed");
    host.vdi_deactivate(&ctx.dbg, &dp).await.map(drop).unwrap_or_else(log);
    host.vdi_detach(&ctx.dbg, &dp, sr, &vdi, &conf.copy_vm).await.unwrap_or_else(log);
    host.vdi_destroy(&ctx.dbg, sr, &vdi).await.unwrap_or_else(log);
    copied
}

async fn copy_into(ctx: &Ctx<'_>, conf: &Conf, clone: VdiInfo, dp: crate::smapiv2::Dp) -> Result<VdiInfo> {
    let (source, host, vm) = (&ctx.source, &ctx.destination, &conf.copy_vm);
    let target = leaf::open_target(ctx, clone, dp, vm).await?;
    let local_dp = leaf::new_dp();
    let content_id = source.vdi_stat(&ctx.dbg, &conf.sr, &conf.vdi).await?.content_id;
    let mirrored = async {
        source.vdi_attach3(&ctx.dbg, &local_dp, &conf.sr, &conf.vdi, vm, false).await?;
        source.vdi_activate_readonly(&ctx.dbg, &local_dp, &conf.sr, &conf.vdi, vm).await?;
        let operation = leaf::start_mirror(ctx, (&conf.sr, &conf.vdi, vm), vm, &target, false).await?;
        leaf::wait_for_mirror(ctx, &conf.sr, &conf.vdi, &operation, Some(ctx.poll)).await
    }
    .await;
    let deactivated = source.vdi_deactivate(&ctx.dbg, &local_dp).await;
    let detached = source.vdi_detach(&ctx.dbg, &local_dp, &conf.sr, &conf.vdi, vm).await;
    mirrored?;
    deactivated?;
    detached?;
    let snapshot = host.vdi_snapshot(&ctx.dbg, &ctx.sr, &target.info).await?;
    if let Err(error) = host.vdi_set_content_id(&ctx.dbg, &ctx.sr, &snapshot.vdi, &content_id).await {
        super::tree::destroy_logged(ctx, &snapshot.vdi).await;
        return Err(error);
    }
    ctx.tell(Event::Arrived { source: conf.vdi.clone(), destination: snapshot.vdi.clone() });
    Ok(VdiInfo { content_id, ty: target.info.ty, ..snapshot })
}
