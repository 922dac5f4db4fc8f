//! Plugin.diagnostics: the state of this host's SRs and volumes, for people.

use std::fmt::Write;
use std::fs;

use plugin::attachment::Attachment;
use plugin::error::Result;
use plugin::gc;
use plugin::host::Host;
use plugin::id::Shortened;
use plugin::mirror::MirrorRecord;
use plugin::store::{LoadedTree, Sr};
use serde::Deserialize;

/// Nothing is asked.
#[derive(Debug, Deserialize)]
pub struct Parameters {}

/// Describes what there is, and what is wrong with it: this call does not fail for what it finds.
///
/// # Errors
///
/// None.
pub fn execute(host: &Host, _: Parameters) -> Result<String> {
    let mut text = format!("xapi-storage-qcow2 {}\n", env!("CARGO_PKG_VERSION"));
    line(&mut text, 0, "host", host.uuid());
    line(&mut text, 0, "boot", host.boot_id());
    match Sr::all_attached(host) {
        Ok(srs) => {
            for uuid in srs {
                line(&mut text, 0, "sr", Ok::<_, plugin::Error>(uuid));
                match Sr::attached(host, uuid) {
                    Ok(sr) => describe_sr(&mut text, host, &sr),
                    Err(error) => line::<&str>(&mut text, 2, "error", Err(error)),
                }
            }
        }
        Err(error) => line::<&str>(&mut text, 0, "error", Err(error)),
    }
    match Attachment::volumes(host) {
        Ok(volumes) => {
            for key in volumes {
                // As it stands in its file: taking its lock could wait for a daemon that hangs.
                let path = host.volume_dir(key).join("state.json");
                let state = fs::read_to_string(&path).map_err(plugin::Error::on("reading", &path));
                line(&mut text, 0, "attachment", state.map(|state| format!("{key} {}", state.trim_end())));
            }
        }
        Err(error) => line::<&str>(&mut text, 0, "error", Err(error)),
    }
    match MirrorRecord::all(host) {
        Ok(mirrors) => {
            for mirror in mirrors {
                let state = format!("{} of {}: {:?}", mirror.key, mirror.volume, mirror.phase);
                line(&mut text, 0, "mirror", Ok::<_, plugin::Error>(state));
            }
        }
        Err(error) => line::<&str>(&mut text, 0, "error", Err(error)),
    }
    Ok(text)
}

/// Writes one line: a value, or why there is none.
fn line<T: ToString>(text: &mut String, indent: usize, what: &str, value: Result<T>) {
    let value = value.map_or_else(|error| format!("({})", error.chain()), |value| value.to_string());
    // Writing to a string does not fail.
    let _ = writeln!(text, "{:indent$}{what}: {value}", "");
}

/// Describes an SR and its trees.
fn describe_sr(text: &mut String, host: &Host, sr: &Sr) {
    line(text, 2, "path", Ok::<_, plugin::Error>(sr.path.display()));
    describe_gc(text, host, sr);
    let space = sr.describe().map(|stat| format!("{} of {} bytes free", stat.free_space, stat.total_space));
    line(text, 2, "space", space);
    match sr.tree_ids() {
        Ok(ids) => {
            for id in ids {
                match sr.read_tree(id) {
                    Ok(Some(loaded)) => describe_tree(text, &loaded),
                    Ok(None) => {}
                    Err(error) => line::<&str>(text, 2, "error", Err(error)),
                }
            }
        }
        Err(error) => line::<&str>(text, 2, "error", Err(error)),
    }
}

/// Tells what is done to bring space back, and what could not be.
fn describe_gc(text: &mut String, host: &Host, sr: &Sr) {
    let state = match gc::State::load(host, sr.record.uuid) {
        Ok(Some(state)) => state,
        Ok(None) => return,
        Err(error) => return line::<&str>(text, 2, "gc", Err(error)),
    };
    let doing = match (state.doing_now(host), &state.doing) {
        (Some(doing), _) => format!("process {}: {doing}", state.worker.pid),
        (None, Some(doing)) => format!("was killed: {doing}"),
        (None, None) => "ended".to_owned(),
    };
    line(text, 2, "gc", Ok::<_, plugin::Error>(format!("{doing}, {} nodes merged", state.merged)));
    for undone in state.still_undone(sr) {
        let what = format!("{}: {}", undone.subject(), undone.reason);
        line(text, 4, undone.how(), Ok::<_, plugin::Error>(what));
    }
}

/// Describes a tree's nodes, each with its volume, parents before children.
fn describe_tree(text: &mut String, loaded: &LoadedTree) {
    let tree = &loaded.tree;
    line(text, 2, "tree", Ok::<_, plugin::Error>(loaded.id));
    let mut nodes: Vec<_> = tree.nodes.keys().map(|id| tree.chain(*id)).collect();
    for chain in &mut nodes {
        chain.reverse();
    }
    // A node's path from the root sorts right after its parent's.
    nodes.sort();
    for path in nodes {
        let Some(id) = path.last() else {
            continue;
        };
        let volume = tree.volumes.iter().find(|(_, volume)| volume.node == *id);
        let mut state = match volume {
            Some((key, volume)) => format!("{id} volume {key} {:?}", Shortened(&volume.name)),
            None => format!("{id} hidden"),
        };
        for active in volume.iter().flat_map(|(_, volume)| &volume.active) {
            let _ = write!(state, " active on {} {:?}", active.host, active.mode);
        }
        if let Err(error) = loaded.checked_image(*id) {
            let _ = write!(state, " ({})", error.chain());
        }
        line(text, 2 + 2 * path.len(), "node", Ok::<_, plugin::Error>(state));
    }
    if let Some(merge) = &tree.merge {
        line(text, 4, "merging", Ok::<_, plugin::Error>(format!("{merge:?}")));
    }
    if let Some(intent) = &tree.intent {
        line(text, 4, "unfinished", Ok::<_, plugin::Error>(format!("{intent:?}")));
    }
}
