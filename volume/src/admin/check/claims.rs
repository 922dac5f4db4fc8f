//! Who has a volume active: what the SR's records claim, held against what this host's daemons have open.

use plugin::activation;
use plugin::attachment::Attachment;
use plugin::error::{Error, Result};
use plugin::host::Host;
use plugin::id::VolumeKey;
use plugin::store::{Activation, Finding, LoadedTree, Mode, Severity, Sr, Volume};

/// Finds claims of this host that nothing stands behind, volumes that are open without one, and daemons that have
/// something else open than the record says.
pub fn examine(host: &Host, sr: &Sr, trees: &[LoadedTree], found: &mut Vec<Finding>) -> Result<()> {
    for loaded in trees {
        if examine_tree(host, loaded)?.is_empty() {
            continue;
        }
        // An operation may be under way: who holds the tree's lock sees none.
        let _lock = sr.lock_to_look(host, loaded.id)?;
        if let Ok(Some(now)) = sr.read_tree(loaded.id) {
            found.extend(examine_tree(host, &now)?);
        }
    }
    Ok(())
}

fn examine_tree(host: &Host, loaded: &LoadedTree) -> Result<Vec<Finding>> {
    let mut found = Vec::new();
    for (key, volume) in &loaded.tree.volumes {
        found.extend(examine_volume(host, loaded, *key, volume)?);
    }
    Ok(found)
}

fn examine_volume(host: &Host, loaded: &LoadedTree, key: VolumeKey, volume: &Volume) -> Result<Vec<Finding>> {
    let this = host.uuid()?;
    let record = loaded.directory.join("tree.json");
    let mut found = Vec::new();
    let writers = volume.active.iter().filter(|claim| claim.mode == Mode::ReadWrite).count();
    if writers > 0 && volume.active.len() > 1 {
        let what = format!("volume {key} is claimed by {} hosts, and one of them writes", volume.active.len());
        let remedy = "deactivate it on all hosts but one, at once";
        found.push(Finding::new(Severity::Error, &record, what, remedy));
    }
    // What cannot be read is found with the attachments.
    let Ok(seen) = Attachment::seen(host, key) else { return Ok(found) };
    let open = seen.and_then(|seen| seen.open);
    let claim = volume.active.iter().find(|claim| claim.host == this);
    found.extend(match (claim, &open) {
        (Some(claim), None) => Some(abandoned(host, &record, key, claim)?),
        (None, Some(_)) => {
            let what = format!(
                "volume {key} is open on this host, and the record does not say so: another host may open it too"
            );
            Some(Finding::repairable(Severity::Error, &record, what, "claimed, unless another host has it"))
        }
        (Some(claim), Some(open)) if claim.mode < open.mode => {
            let what = format!("volume {key} is open for writing on this host, and the record says for reading");
            Some(Finding::repairable(Severity::Error, &record, what, "claimed, unless another host has it"))
        }
        _ => None,
    });
    if let Some(open) = open.filter(|open| !open.is_changing && loaded.tree.intent.is_none()) {
        let scratch = loaded.tree.scratch.get(&key).and_then(|scratch| scratch.node);
        let expected = |top| loaded.tree.chain(top) == open.nodes;
        // A guest that only reads has the volume's own node, also while what another wrote is kept apart.
        if !expected(volume.node) && !scratch.is_some_and(expected) {
            let what = format!("the daemon of volume {key} has other images open than the record says");
            let remedy = "shut its VM down, so that the volume is closed; do not start it elsewhere before";
            found.push(Finding::new(Severity::Error, &host.volume_dir(key), what, remedy));
        }
    }
    Ok(found)
}

/// Describes a claim of this host without anything open behind it.
fn abandoned(host: &Host, record: &std::path::Path, key: VolumeKey, claim: &Activation) -> Result<Finding> {
    let what = if claim.boot_id == host.boot_id()? {
        format!("volume {key} is claimed by this host, and nothing has it open")
    } else {
        format!("volume {key} is claimed by this host since before it was booted")
    };
    Ok(Finding::repairable(Severity::Warning, record, what, "the claim is taken back"))
}

/// Makes this host's claims say what is open.
///
/// # Errors
///
/// The first that cannot be changed; the others are changed all the same.
pub fn repair(host: &Host, sr: &Sr) -> Result<()> {
    let mut done = Ok(());
    for id in sr.tree_ids()? {
        let Ok(Some(loaded)) = sr.read_tree(id) else { continue };
        for (key, volume) in &loaded.tree.volumes {
            if examine_volume(host, &loaded, *key, volume)?.iter().any(|finding| finding.is_repairable) {
                let claimed = match activation::reclaim(host, sr, *key) {
                    Err(Error::VolumeDoesNotExist(_)) => Ok(()),
                    result => result,
                };
                done = done.and(claimed);
            }
        }
    }
    done
}
