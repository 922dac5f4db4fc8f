//! The walk over a disk's tree (xen-api pull requests 7137 and 7223, first revision): depth first, inactive branches on
//! clones, the active path on the working volume, which ends up as what the live leaf is mirrored into.

use super::MirrorId;
use super::engine::{Ctx, Relation};
use super::leaf::{self, Target};
use super::observe::Event;
use super::order::{Conf, Node, forest};
use crate::smapiv2::{Error, Result, Vdi, VdiInfo};

/// The forest of a disk, in the flow that walks it.
pub(super) fn forest_of(ctx: &Ctx<'_>, conf: &Conf) -> Vec<Node> {
    if ctx.flow == super::Flow::Tree { forest(&ctx.xapi.db(), ctx.vm, conf) } else { Vec::new() }
}

/// The size of the first node that the working volume takes in.
pub(super) fn first_size(forest: &[Node]) -> Option<i64> {
    let root = forest.iter().find(|n| n.active)?;
    Some(root.conf.info.virtual_size)
}

/// Mirrors the whole tree and then the live leaf; on failure the destination's snapshots are destroyed, newest first.
pub(super) async fn send(
    ctx: &Ctx<'_>,
    conf: &Conf,
    id: &MirrorId,
    working: &mut Target,
    forest: &[Node],
) -> Result<Vec<Relation>> {
    let mut walk = Walk { ctx, conf, relations: Vec::new(), made: Vec::new() };
    let done = async {
        // The published walk takes several roots in order of age and puts them all into the working volume, which
        // would make the second a child of the first. Inactive roots get a blank volume of their own here.
        for root in forest.iter().filter(|n| !n.active) {
            walk.branch(None, root).await?;
        }
        for root in forest.iter().filter(|n| n.active) {
            walk.node(working, root).await?;
        }
        grow(ctx, working, conf.info.virtual_size).await?;
        leaf::mirror_leaf(ctx, conf, id, working).await
    }
    .await;
    let Walk { relations, made, .. } = walk;
    match done {
        Ok(()) => Ok(relations),
        Err(error) => {
            for snapshot in made.iter().rev() {
                destroy_logged(ctx, snapshot).await;
            }
            Err(error)
        }
    }
}

/// Destroys a destination volume in a clean-up, where errors are only logged.
pub(super) async fn destroy_logged(ctx: &Ctx<'_>, vdi: &Vdi) {
    if let Err(error) = ctx.destination.vdi_destroy(&ctx.dbg, &ctx.sr, vdi).await {
        tracing::warn!(%error, %vdi, "clean-up of a destination volume failed");
    }
}

struct Walk<'a> {
    ctx: &'a Ctx<'a>,
    conf: &'a Conf,
    relations: Vec<Relation>,
    /// Destination snapshots in the order of their making.
    made: Vec<Vdi>,
}

impl Walk<'_> {
    /// One node into a volume, its inactive children into clones of its copy, its active child into the same volume.
    async fn node(&mut self, working: &mut Target, node: &Node) -> Result<()> {
        let copy = self.mirror(working, &node.conf).await?;
        for child in node.children.iter().filter(|c| !c.active) {
            Box::pin(self.branch(Some(&copy), child)).await?;
        }
        for child in node.children.iter().filter(|c| c.active) {
            Box::pin(self.node(working, child)).await?;
        }
        Ok(())
    }

    /// An inactive subtree, on a clone of its parent's copy that is destroyed at the end.
    async fn branch(&mut self, parent: Option<&VdiInfo>, node: &Node) -> Result<()> {
        let (ctx, vm) = (self.ctx, &self.conf.mirror_vm);
        let (host, sr) = (&ctx.destination, &ctx.sr);
        let info = match parent {
            Some(parent) => host.vdi_clone(&ctx.dbg, sr, parent).await?,
            None => host.vdi_create(&ctx.dbg, sr, &node.conf.info).await?,
        };
        let (vdi, dp) = (info.vdi.clone(), leaf::new_dp());
        let done = async {
            let mut target = leaf::open_target(ctx, info, dp.clone(), vm).await?;
            self.node(&mut target, node).await
        }
        .await;
        let log = |error: Error| tracing::warn!(%error, %vdi, "clean-up of a branch failed");
        host.vdi_deactivate(&ctx.dbg, &dp).await.map(drop).unwrap_or_else(log);
        host.vdi_detach(&ctx.dbg, &dp, sr, &vdi, vm).await.unwrap_or_else(log);
        host.vdi_destroy(&ctx.dbg, sr, &vdi).await.unwrap_or_else(log);
        done
    }

    /// Mirrors one snapshot into a volume and takes a snapshot of it there, while it stays writable.
    async fn mirror(&mut self, working: &mut Target, node: &Conf) -> Result<VdiInfo> {
        let ctx = self.ctx;
        grow(ctx, working, node.info.virtual_size).await?;
        let (source, dp) = (&ctx.source, leaf::new_dp());
        let mirrored = async {
            // Without it the metadata phase would compare with nothing; xapi only warns here.
            let content_id = match source.vdi_stat(&ctx.dbg, &node.sr, &node.vdi).await {
                Ok(info) => info.content_id,
                Err(error) => {
                    tracing::warn!(%error, "no content id");
                    String::new()
                }
            };
            let copy_vm = &self.conf.copy_vm;
            source.vdi_attach3(&ctx.dbg, &dp, &node.sr, &node.vdi, copy_vm, false).await?;
            source.vdi_activate_readonly(&ctx.dbg, &dp, &node.sr, &node.vdi, copy_vm).await?;
            let from = (&node.sr, &node.vdi, copy_vm);
            let operation = leaf::start_mirror(ctx, from, &self.conf.mirror_vm, working, false).await?;
            leaf::wait_for_mirror(ctx, &node.sr, &node.vdi, &operation, Some(ctx.poll)).await?;
            self.release(node, &dp).await?;
            let snapshot = ctx.destination.vdi_snapshot(&ctx.dbg, &ctx.sr, &working.info).await?;
            ctx.destination.vdi_set_content_id(&ctx.dbg, &ctx.sr, &snapshot.vdi, &content_id).await?;
            // Its type is whatever the plugin answered, before the keys were set.
            Ok(VdiInfo { content_id, ..snapshot })
        }
        .await;
        match mirrored {
            Ok(snapshot) => {
                self.made.push(snapshot.vdi.clone());
                let copy = VdiInfo { ty: working.info.ty.clone(), ..snapshot.clone() };
                self.relations.push(Relation { source: node.vdi.clone(), copy });
                ctx.tell(Event::Arrived { source: node.vdi.clone(), destination: snapshot.vdi.clone() });
                Ok(snapshot)
            }
            Err(error) => {
                if let Err(error) = self.release(node, &dp).await {
                    tracing::warn!(%error, "clean-up of a source snapshot failed");
                }
                Err(error)
            }
        }
    }

    /// Detaches a source snapshot even if it cannot be deactivated.
    async fn release(&self, node: &Conf, dp: &crate::smapiv2::Dp) -> Result<()> {
        let (ctx, source) = (self.ctx, &self.ctx.source);
        let deactivated = source.vdi_deactivate(&ctx.dbg, dp).await;
        let detached = source.vdi_detach(&ctx.dbg, dp, &node.sr, &node.vdi, &self.conf.copy_vm).await;
        deactivated?;
        detached
    }
}

/// Makes a destination volume as large as what is mirrored into it next.
///
/// The published walk keeps one size throughout, which fails as soon as a disk was resized between two snapshots; this is
/// what the later engine does to a clone, around the same attach and activate.
async fn grow(ctx: &Ctx<'_>, target: &mut Target, size: i64) -> Result<()> {
    if target.info.virtual_size >= size {
        return Ok(());
    }
    let (host, sr, vdi) = (&ctx.destination, &ctx.sr, target.info.vdi.clone());
    host.vdi_deactivate(&ctx.dbg, &target.dp).await?;
    host.vdi_detach(&ctx.dbg, &target.dp, sr, &vdi, &target.vm).await?;
    let resized = host.vdi_resize(&ctx.dbg, sr, &vdi, size).await?;
    let info = VdiInfo { virtual_size: resized, ..target.info.clone() };
    *target = leaf::open_target(ctx, info, target.dp.clone(), &target.vm).await?;
    Ok(())
}
