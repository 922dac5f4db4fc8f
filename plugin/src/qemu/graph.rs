//! What a volume's daemon has open: a chain of nodes, and one export of its top.
//!
//! ```text
//!   export  <volume uuid>
//!      │
//!      ▼
//!   q<node>  qcow2 ── t<node>  throttle ── f<node>  file       the top; throttled where it is writable
//!      │ backing
//!      ▼
//!   q<node>  qcow2 ── f<node>  file       read-only
//!      ⋮
//! ```
//!
//! Nodes are added root first and removed top first. Node names come from the node's uuid, so whoever looks at a
//! daemon, after whatever crash, can tell what it has open.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::Image;
use super::devices::{self, decode};
use super::qmp::{Client, Events};
use crate::error::{Error, Result};
use crate::id::{ContentId, NodeId};
use crate::mirror::Announcement;
use crate::store::Mode;

/// How long a client may take to go before its export is taken away from under it: xapi's proxy closes its connection
/// about when it calls.
const CLIENT_GRACE: Duration = Duration::from_secs(1);

/// How often something is looked at that no event tells of.
const LOOK: Duration = Duration::from_millis(2);

/// The id of the one export of a daemon. QEMU's ids begin with a letter, so the volume's uuid would not do.
const EXPORT: &str = "volume";

/// How files are read and written.
const IO_URING: &str = "io_uring";

/// The command that lists exports.
const QUERY_EXPORTS: &str = "query-block-exports";

/// The throttle group of everything that a daemon writes to its volume. It has no limits but those of [`pace`].
pub(super) const PACE: &str = "pace";

/// Names the qcow2 node of a node: at most 31 characters, as QEMU demands.
pub fn node_name(node: NodeId) -> String {
    format!("q{}", &node.uuid().as_simple().to_string()[..30])
}

/// Names the file below it.
fn file_name(node: NodeId) -> String {
    format!("f{}", &node.uuid().as_simple().to_string()[..30])
}

/// Names the node between these two where it may be written to. It comes and goes with the upper one.
fn throttle_name(node: NodeId) -> String {
    format!("t{}", &node.uuid().as_simple().to_string()[..30])
}

/// The names of a file's two nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layer {
    /// The qcow2 node.
    pub format: String,
    /// The file below it.
    pub file: String,
}

impl Layer {
    /// Gives the names by which a node is known.
    pub(super) fn own(node: NodeId) -> Self {
        Self { format: node_name(node), file: file_name(node) }
    }

    /// Gives the names of a second pair of the same file, for a moment ([`super::exchange`]).
    pub(super) fn substitute(node: NodeId) -> Self {
        let digits = &node.uuid().as_simple().to_string()[..30];
        Self { format: format!("r{digits}"), file: format!("g{digits}") }
    }
}

/// Tells whether a node is one of those that are added and removed here by themselves.
fn is_ours(name: &str) -> bool {
    let digits = name.strip_prefix(['q', 'f', 'r', 'g']);
    digits.is_some_and(|digits| digits.len() == 30 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// How a chain's top is exported over NBD.
#[derive(Clone, Copy, Debug)]
pub struct Export<'a> {
    /// The export's name: the volume's uuid.
    pub name: &'a str,
    /// Whether clients may write.
    pub mode: Mode,
    /// What NBD clients are told of it; whether anything was written since is then known ([`is_unwritten`]).
    pub announces: Option<Announcement>,
}

/// Opens a chain, given top first, and exports its top. The daemon has nothing open before.
///
/// # Errors
///
/// When a node or the export cannot be added; what was added stays, and [`close`] removes it.
pub async fn open(client: &Client, images: &[Image], export: &Export<'_>) -> Result<()> {
    let mut commands = Vec::new();
    let mut backing = None;
    for (depth, image) in images.iter().enumerate().rev() {
        let mode = if depth == 0 { export.mode } else { Mode::ReadOnly };
        commands.extend(image_commands(image, mode, backing)?);
        backing = Some(image.node);
    }
    let top = backing.ok_or_else(|| Error::Internal("a chain without images".to_owned()))?;
    commands.extend(export_commands(top, export));
    carry_out(client, commands).await
}

/// Exports a node.
///
/// # Errors
///
/// When it cannot be exported.
pub async fn add_export(client: &Client, node: NodeId, export: &Export<'_>) -> Result<()> {
    carry_out(client, export_commands(node, export)).await
}

fn export_commands(node: NodeId, export: &Export<'_>) -> Vec<(&'static str, Value)> {
    let mut arguments = json!({
        "type": "nbd", "id": EXPORT, "name": export.name, "node-name": node_name(node),
        "writable": export.mode == Mode::ReadWrite,
    });
    let mut commands = Vec::new();
    if let Some(announces) = &export.announces {
        arguments["description"] = announces.to_string().into();
        // Whether something is written is asked, not where. Refused where it is there and goes on; without it everything
        // counts as written.
        let name = announces.session.to_string();
        let bitmap = json!({"node": node_name(node), "name": name, "persistent": false, "granularity": 64 << 20});
        commands.push(("block-dirty-bitmap-add", bitmap));
    }
    commands.push(("block-export-add", arguments));
    commands
}

/// Has commands executed of which each needs those before, all sent at once. What is refused, because it needs what a
/// kernel, a QEMU or an older version's daemon does not have, or because of what was refused before it, is tried once more
/// without that, or with it.
///
/// # Errors
///
/// When the last one cannot be executed: the first refusal of the second time.
pub(super) async fn carry_out(client: &Client, mut commands: Vec<(&'static str, Value)>) -> Result<()> {
    let mut has_group = false;
    loop {
        let answers = client.execute_all(&commands).await?;
        if answers.last().is_none_or(Result::is_ok) {
            return Ok(());
        }
        let mut refused = Vec::new();
        let mut reason = None;
        for (command, answer) in commands.into_iter().zip(answers) {
            if let Err(error) = answer {
                reason = reason.or(Some(error));
                refused.push(command);
            }
        }
        // A kernel or a QEMU without io_uring. Another reason will be given again.
        let without = refused.iter_mut().filter(|(_, arguments)| arguments["aio"] == IO_URING);
        let mut changed = without.map(|(_, arguments)| arguments["aio"] = "threads".into()).count();
        // A daemon that an older version has started.
        if !has_group && matches!(&reason, Some(Error::Qmp { desc, .. }) if desc.contains("Throttle group")) {
            has_group = true;
            changed += 1;
            refused.insert(0, ("object-add", json!({"qom-type": "throttle-group", "id": PACE})));
        }
        match reason {
            Some(error) if changed == 0 => return Err(error),
            _ => commands = refused,
        }
    }
}

/// Removes the export. With `force` a client that does not go by itself is cut off; all requests that were taken are
/// completed either way.
///
/// # Errors
///
/// [`Error::Qmp`] when a client stays and may not be cut off; [`Error::Timeout`] when the export does not go.
pub async fn remove_export(client: &Client, force: bool) -> Result<()> {
    let deadline = Instant::now() + CLIENT_GRACE;
    let mut events = client.events();
    loop {
        // "safe" is refused while a client is connected.
        let refusal = match try_remove_export(client, "safe").await? {
            Removal::Gone => return Ok(()),
            Removal::Begun => break,
            Removal::Refused(error) => error,
        };
        if Instant::now() < deadline {
            sleep(LOOK).await;
        } else if force {
            match try_remove_export(client, "hard").await? {
                Removal::Gone => return Ok(()),
                Removal::Begun => break,
                Removal::Refused(error) => return Err(error),
            }
        } else {
            return Err(refusal);
        }
    }
    gone(client, &mut events).await
}

/// What came of an attempt to remove the export.
enum Removal {
    /// There is none any more, or there was none.
    Gone,
    /// It will be gone once its requests are completed.
    Begun,
    /// It stays.
    Refused(Error),
}

/// Tries to remove the export, and looks whether it is there in the same turn.
async fn try_remove_export(client: &Client, mode: &str) -> Result<Removal> {
    let commands = [("block-export-del", json!({"id": EXPORT, "mode": mode})), (QUERY_EXPORTS, Value::Null)];
    let mut answers = client.execute_all(&commands).await?.into_iter();
    let (removed, exports) = (answers.next(), answers.next());
    Ok(match (export_in(exports)?, removed) {
        (None, _) => Removal::Gone,
        (Some(_), Some(Err(refusal))) => Removal::Refused(refusal),
        (Some(_), _) => Removal::Begun,
    })
}

/// Waits until an export that is being removed is gone: its requests are then completed.
async fn gone(client: &Client, events: &mut Events) -> Result<()> {
    let patience = client.patience();
    let wait = async {
        while exported(client).await?.is_some() {
            // An event tells; that it might be of something else, or lost, does not matter.
            if let Ok(event) = timeout(LOOK, events.next()).await {
                event?;
            }
        }
        Ok(())
    };
    timeout_at(Instant::now() + patience, wait).await.unwrap_or_else(|_| {
        Err(Error::Timeout { doing: "removing the export".to_owned(), seconds: patience.as_secs() })
    })
}

/// Gives the name of the node that the export reads; `None` when there is no export.
///
/// # Errors
///
/// When the daemon does not answer.
pub async fn exported(client: &Client) -> Result<Option<String>> {
    Ok(export_in(Some(client.execute(QUERY_EXPORTS, ()).await))?.map(|export| export.node_name))
}

/// Tells whether there is an export. One that is just going is waited for.
///
/// # Errors
///
/// When the daemon does not answer, or the export does not go.
pub async fn is_exported(client: &Client) -> Result<bool> {
    match export_in(Some(client.execute(QUERY_EXPORTS, ()).await))? {
        Some(export) if export.shutting_down => gone(client, &mut client.events()).await.map(|()| false),
        found => Ok(found.is_some()),
    }
}

/// An export as [`QUERY_EXPORTS`] describes it.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockExport {
    id: String,
    node_name: String,
    shutting_down: bool,
}

/// Takes the volume's export from the answer to [`QUERY_EXPORTS`].
fn export_in(answer: Option<Result<Value>>) -> Result<Option<BlockExport>> {
    let exports: Vec<BlockExport> = decode(QUERY_EXPORTS, answer)?;
    Ok(exports.into_iter().find(|export| export.id == EXPORT))
}

/// Lists the names of the nodes of chains, the last one added first.
pub(super) async fn nodes(client: &Client) -> Result<Vec<String>> {
    let names = devices::devices(client).await?.into_iter().filter_map(|device| device.name);
    Ok(names.filter(|name| is_ours(name)).collect())
}

/// Tells whether a node that was opened without a backing has one, as [`snapshot`] gives it.
///
/// # Errors
///
/// When the daemon does not answer.
pub async fn has_backing(client: &Client, node: NodeId) -> Result<bool> {
    let device = devices::device(client, &node_name(node)).await?;
    Ok(device.is_some_and(|device| device.backing_file.is_some()))
}

/// Tells whether nothing at all was written to a node since an export was added that announces a session.
///
/// # Errors
///
/// When the daemon does not answer.
pub async fn is_unwritten(client: &Client, node: NodeId, session: ContentId) -> Result<bool> {
    let device = devices::device(client, &node_name(node)).await?;
    Ok(device.and_then(|device| device.bitmap(&session.to_string()).map(|bitmap| bitmap.bytes)) == Some(0))
}

/// No longer looks whether a node is written to in a session, where that was done.
///
/// # Errors
///
/// When the daemon does not answer.
pub async fn forget_writes(client: &Client, node: NodeId, session: ContentId) -> Result<()> {
    let arguments = json!({"node": node_name(node), "name": session.to_string()});
    match client.execute("block-dirty-bitmap-remove", arguments).await {
        Ok(_) | Err(Error::Qmp { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Closes what is open, without flushing it first: removes the export, cutting off its clients, and all nodes.
///
/// # Errors
///
/// When something cannot be removed.
pub async fn close(client: &Client) -> Result<()> {
    remove_export(client, true).await?;
    remove_nodes(client, &[]).await
}

/// Removes all nodes; no export may be left. Where those that are known to be there, top first, can be removed, no
/// others are looked for.
///
/// # Errors
///
/// When one cannot be removed.
pub async fn remove_nodes(client: &Client, known: &[NodeId]) -> Result<()> {
    let names: Vec<String> = known.iter().flat_map(|node| [node_name(*node), file_name(*node)]).collect();
    if !names.is_empty() && delete(client, &names).await?.iter().all(Result::is_ok) {
        return Ok(());
    }
    let mut left = nodes(client).await?;
    while !left.is_empty() {
        // A node that another uses is refused; it is free after the other. Newest first is nearly always right.
        let deleted = delete(client, &left).await?;
        let none = deleted.iter().all(Result::is_err);
        match deleted.into_iter().find_map(Result::err) {
            Some(refusal) if none => return Err(refusal),
            Some(_) => left = nodes(client).await?,
            None => break,
        }
    }
    Ok(())
}

/// Deletes nodes, and tells which could be.
async fn delete(client: &Client, names: &[String]) -> Result<Vec<Result<Value>>> {
    let commands: Vec<_> = names.iter().map(|name| ("blockdev-del", json!({"node-name": name}))).collect();
    client.execute_all(&commands).await
}

/// Writes everything that is not yet in the top's file, and stops writing to it. No export may be left.
///
/// Removing a node flushes as well, but nobody is told when that fails.
///
/// # Errors
///
/// When the flush fails: writes that were acknowledged may be lost. A second attempt may then succeed without
/// having written anything, and is worth nothing.
pub async fn flush_and_freeze(client: &Client, top: NodeId, backing: Option<NodeId>) -> Result<()> {
    reopen(client, top, backing, Mode::ReadOnly).await
}

/// Writes everything that is not yet in the file of a top that is open for writing; clients do not notice.
///
/// # Errors
///
/// When the flush fails.
pub async fn flush(client: &Client, top: NodeId, backing: Option<NodeId>) -> Result<()> {
    // QEMU flushes whatever it reopens, and has no other command for it.
    reopen(client, top, backing, Mode::ReadWrite).await
}

/// Opens the top anew as it is, for a mode.
async fn reopen(client: &Client, top: NodeId, backing: Option<NodeId>, mode: Mode) -> Result<()> {
    let reopen_over = async |file: String| {
        let mut options = format_options(&node_name(top), file.into(), mode);
        options["backing"] = backing.map_or(Value::Null, |node| node_name(node).into());
        client.execute("blockdev-reopen", json!({"options": [options]})).await.map(drop)
    };
    // Only what was opened for writing is ever reopened.
    let throttle = throttle_name(top);
    match reopen_over(throttle.clone()).await {
        // An older version has opened it, with nothing between the two. QEMU flushes before it looks for the node, so that a
        // flush that failed does not come to this.
        Err(Error::Qmp { desc, .. }) if desc.contains(&format!("node-name='{throttle}'")) => {
            reopen_over(file_name(top)).await
        }
        reopened => reopened,
    }
}

/// Puts an overlay on the top of an exported chain; clients do not notice. The overlay's file is there and empty.
///
/// # Errors
///
/// When it cannot be opened or put there; what was added for it is removed again.
pub async fn snapshot(client: &Client, top: NodeId, overlay: &Image, mode: Mode) -> Result<()> {
    let mut commands = image_commands(overlay, mode, None)?.to_vec();
    let arguments = json!({"node": node_name(top), "overlay": node_name(overlay.node)});
    commands.push(("blockdev-snapshot", arguments));
    match carry_out(client, commands).await {
        Ok(()) => Ok(()),
        // Refused, so nothing was switched. After any other error that is not known.
        Err(first) if first.is_refusal() => Err(first.undone(remove_overlay(client, overlay.node).await)),
        Err(error) => Err(error),
    }
}

/// Removes an overlay's nodes that [`snapshot`] left unused; without any it does nothing.
///
/// # Errors
///
/// When the overlay is in use.
pub async fn remove_overlay(client: &Client, overlay: NodeId) -> Result<()> {
    let present = nodes(client).await?;
    for name in [node_name(overlay), file_name(overlay)] {
        if present.contains(&name) {
            client.execute("blockdev-del", json!({"node-name": name})).await?;
        }
    }
    Ok(())
}

/// How much may be written to a volume in a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pace {
    /// Bytes a second.
    pub bytes: u64,
    /// Requests a second.
    pub requests: u64,
}

/// Limits what is written to the volume that a daemon has open, by whoever writes; without a pace it is unlimited again.
/// Reading is not limited. Done again it replaces the limits.
///
/// # Errors
///
/// When the daemon refuses.
pub async fn pace(client: &Client, pace: Option<Pace>) -> Result<()> {
    let Pace { bytes, requests } = pace.unwrap_or(Pace { bytes: 0, requests: 0 });
    let limits = json!({"bps-write": bytes, "iops-write": requests});
    let arguments = json!({"path": format!("/objects/{PACE}"), "property": "limits", "value": limits});
    match client.execute("qom-set", arguments).await {
        // An older version has started the daemon, which has no such group and cannot be given a limit.
        Err(Error::Qmp { class, .. }) if class == "DeviceNotFound" => {
            if bytes != 0 || requests != 0 {
                tracing::warn!("the guest is not slowed: its daemon is of an older version");
            }
            Ok(())
        }
        limited => limited.map(drop),
    }
}

/// Gives the top a larger virtual size. No export may be there: it would not allow it.
///
/// # Errors
///
/// When the daemon refuses.
pub async fn resize(client: &Client, top: NodeId, bytes: u64) -> Result<()> {
    client.execute("block_resize", json!({"node-name": node_name(top), "size": bytes})).await.map(drop)
}

/// Opens the file of a chain's inner node a second time, for reading, over the node that its parent has already: a
/// root, as a job's source must be. The two nodes get the names given, the upper one's first.
///
/// # Errors
///
/// When it cannot be opened; one of the two nodes may then be there.
pub async fn add_root(client: &Client, image: &Image, parent: NodeId, names: [&str; 2]) -> Result<()> {
    let [name, file_name] = names;
    let commands = node_commands(image, Mode::ReadOnly, name, file_name, file_name.into(), Some(parent))?;
    carry_out(client, commands.to_vec()).await
}

/// Gives the commands that add an image's nodes. `backing` is a node that is there already; never what a header says.
fn image_commands(image: &Image, mode: Mode, backing: Option<NodeId>) -> Result<[(&'static str, Value); 2]> {
    let file_name = file_name(image.node);
    let below = match mode {
        Mode::ReadOnly => file_name.clone().into(),
        Mode::ReadWrite => json!({
            "driver": "throttle", "node-name": throttle_name(image.node), "throttle-group": PACE, "file": file_name,
            "read-only": false, "auto-read-only": false, "discard": "unmap",
        }),
    };
    node_commands(image, mode, &node_name(image.node), &file_name, below, backing)
}

/// Gives the commands that add a file that is only read, under the names given.
pub(super) fn layer_commands(
    image: &Image,
    layer: &Layer,
    backing: Option<NodeId>,
) -> Result<[(&'static str, Value); 2]> {
    node_commands(image, Mode::ReadOnly, &layer.format, &layer.file, layer.file.clone().into(), backing)
}

/// Removes a file's two nodes, as far as they are there.
///
/// # Errors
///
/// When one is in use.
pub(super) async fn remove_layer(client: &Client, layer: &Layer) -> Result<()> {
    let present = nodes(client).await?;
    for name in [&layer.format, &layer.file] {
        if present.contains(name) {
            client.execute("blockdev-del", json!({"node-name": name})).await?;
        }
    }
    Ok(())
}

/// Lays a node onto another one that reads as the one below it does; clients do not notice. What is written to it is
/// flushed first.
///
/// # Errors
///
/// When the daemon refuses.
pub(super) async fn relink(client: &Client, node: NodeId, mode: Mode, backing: Option<&str>) -> Result<()> {
    let throttle = throttle_name(node);
    // One that was written to until an overlay was put on it has it still.
    let is_throttled = devices::device(client, &throttle).await?.is_some();
    let file = if is_throttled { throttle } else { file_name(node) };
    let mut options = format_options(&node_name(node), file.into(), mode);
    options["backing"] = backing.map_or(Value::Null, Value::from);
    client.execute("blockdev-reopen", json!({"options": [options]})).await.map(drop)
}

/// Makes the header of a top that is written to name another backing file. The daemon has the header in memory, and writes
/// it again when it likes.
///
/// # Errors
///
/// When the daemon refuses.
pub async fn name_backing(client: &Client, top: NodeId, backing: &str) -> Result<()> {
    let name = node_name(top);
    let arguments = json!({"device": name, "image-node-name": name, "backing-file": backing});
    client.execute("change-backing-file", arguments).await.map(drop)
}

/// Gives the commands that add an image's nodes as they are, for a job that copies what is there: nothing between the two,
/// and nothing made of what is written. Without QEMU's lock a file can be written to that another daemon reads.
pub(super) fn plain_commands(
    image: &Image,
    mode: Mode,
    backing: Option<NodeId>,
    is_locked: bool,
) -> Result<[(&'static str, Value); 2]> {
    let file_name = file_name(image.node);
    let [mut file, _] = node_commands(image, mode, "", &file_name, Value::Null, None)?;
    if !is_locked {
        file.1["locking"] = "off".into();
    }
    Ok([file, ("blockdev-add", plain_options(image, mode, backing))])
}

/// Gives the options of the upper one of these nodes.
pub(super) fn plain_options(image: &Image, mode: Mode, backing: Option<NodeId>) -> Value {
    let mut options = format_options(&node_name(image.node), file_name(image.node).into(), mode);
    options["detect-zeroes"] = "off".into();
    options["backing"] = backing.map_or(Value::Null, |node| node_name(node).into());
    options
}

/// Gives the commands that add an image's nodes under the names given, with what lies below the upper one.
fn node_commands(
    image: &Image,
    mode: Mode,
    name: &str,
    file_name: &str,
    below: Value,
    backing: Option<NodeId>,
) -> Result<[(&'static str, Value); 2]> {
    let file = json!({
        "driver": "file", "node-name": file_name, "filename": image.filename()?,
        "read-only": mode == Mode::ReadOnly, "auto-read-only": false, "discard": "unmap",
        "cache": {"direct": allows_direct(&image.path)}, "aio": IO_URING,
    });
    let mut options = format_options(name, below, mode);
    options["backing"] = backing.map_or(Value::Null, |node| node_name(node).into());
    Ok([("blockdev-add", file), ("blockdev-add", options)])
}

/// Gives the options of a qcow2 node, without its backing. The file is a node's name, or the options of one.
fn format_options(name: &str, file: Value, mode: Mode) -> Value {
    json!({
        "driver": "qcow2", "node-name": name, "file": file,
        "read-only": mode == Mode::ReadOnly, "auto-read-only": false, "discard": "unmap",
        // Zeroes that a guest writes take no space.
        "detect-zeroes": if mode == Mode::ReadWrite { "unmap" } else { "off" },
    })
}

/// Tells whether a file can be read and written around the page cache, which is both faster and kinder to the host's
/// memory; tmpfs before Linux 6.6 is among what cannot.
fn allows_direct(path: &Path) -> bool {
    let direct = OFlags::DIRECT.bits().cast_signed();
    OpenOptions::new().read(true).custom_flags(direct).open(path).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_names_are_short_enough_and_recognised() {
        let node = NodeId::random();
        let Layer { format, file } = Layer::substitute(node);
        for name in [node_name(node), file_name(node), format, file] {
            assert_eq!(name.len(), 31);
            assert!(is_ours(&name));
        }
        assert!(!is_ours("mirror-target") && !is_ours("#block123"));
    }
}
