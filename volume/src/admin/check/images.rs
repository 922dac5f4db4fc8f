//! What is inside the images, which qemu-img looks into where nobody writes.

use std::collections::BTreeSet;
use std::path::Path;

use plugin::attachment::Attachment;
use plugin::error::Result;
use plugin::host::Host;
use plugin::id::NodeId;
use plugin::qemu::img;
use plugin::store::{Finding, LoadedTree, Mode, Severity, Sr};

use super::Findings;

/// What a finding of lost space says, by which it is known again.
const LEAKED: &str = "clusters are taken and not used";

/// Has each image checked that nobody writes to.
pub fn examine(host: &Host, sr: &Sr, trees: &[LoadedTree], found: &mut Findings) -> Result<()> {
    for loaded in trees {
        let written = written(host, loaded)?;
        found.passed_over += written.len();
        for node in loaded.tree.nodes.keys().filter(|node| !written.contains(node)) {
            // A header that is refused was found already.
            let Ok(image) = loaded.checked_image(*node) else { continue };
            found.images += 1;
            let finding = look(&image.path);
            if finding.is_none() {
                continue;
            }
            // It may have been opened for writing, or be gone, meanwhile.
            let is_same = match sr.read_tree(loaded.id) {
                Ok(Some(now)) => now.tree.nodes.contains_key(node) && !self::written(host, &now)?.contains(node),
                _ => false,
            };
            found.list.extend(finding.filter(|_| is_same));
        }
    }
    Ok(())
}

/// Finds the nodes that somebody may write to, by the claims of all hosts and the daemons of this one.
fn written(host: &Host, loaded: &LoadedTree) -> Result<BTreeSet<NodeId>> {
    let tree = &loaded.tree;
    let mut written: BTreeSet<NodeId> = tree.scratch.values().filter_map(|scratch| scratch.node).collect();
    for (key, volume) in &tree.volumes {
        let is_claimed = volume.active.iter().any(|claim| claim.mode == Mode::ReadWrite);
        let seen = Attachment::seen(host, *key).ok().flatten();
        let open = seen.and_then(|seen| seen.open).filter(|open| open.mode == Mode::ReadWrite);
        if is_claimed || open.is_some() {
            written.insert(volume.node);
        }
        written.extend(open.and_then(|open| open.nodes.first().copied()));
    }
    written.extend(tree.merge.iter().flat_map(|merge| [merge.lower, merge.upper]));
    // Which of them an operation that was begun writes to is not for this to know.
    if tree.intent.is_some() {
        written.extend(tree.nodes.keys());
    }
    written.retain(|node| tree.nodes.contains_key(node));
    Ok(written)
}

/// Has one image checked.
fn look(path: &Path) -> Option<Finding> {
    match img::check(path) {
        Ok(check) if check.corruptions > 0 || check.check_errors > 0 => {
            let what =
                format!("{} clusters are wrong and {} cannot be checked", check.corruptions, check.check_errors);
            let remedy =
                "do not write to it: copy what can be read (qemu-img convert), and put the volume back from a backup";
            Some(Finding::new(Severity::Error, path, what, remedy))
        }
        Ok(check) if check.leaks > 0 => {
            let what = format!("{} {LEAKED}", check.leaks);
            Some(Finding::repairable(Severity::Note, path, what, "freed by qemu-img"))
        }
        Ok(_) => None,
        Err(error) => {
            let remedy = "see whether another program has it open, and check again";
            Some(Finding::new(Severity::Error, path, error.chain(), remedy))
        }
    }
}

/// Gives back what images have taken and do not use.
///
/// # Errors
///
/// The first that fails; the others are done all the same.
pub fn repair(host: &Host, sr: &Sr, findings: &[Finding]) -> Result<()> {
    let leaking: BTreeSet<&Path> = findings
        .iter()
        .filter(|finding| finding.is_repairable && finding.what.ends_with(LEAKED))
        .map(|finding| finding.place.as_path())
        .collect();
    let mut done = Ok(());
    for id in sr.tree_ids()? {
        let Ok(Some(seen)) = sr.read_tree(id) else { continue };
        let is_leaking = |node: &NodeId| seen.image(*node).is_ok_and(|image| leaking.contains(image.path.as_path()));
        if !seen.tree.nodes.keys().any(is_leaking) {
            continue;
        }
        // Held so that nobody opens it meanwhile.
        let Some(lock) = sr.lock_to_look(host, id)? else { continue };
        let Ok(Some(loaded)) = sr.read_tree(id) else { continue };
        let open = open(host, &loaded)?;
        for node in loaded.tree.nodes.keys().filter(|node| is_leaking(node) && !open.contains(node)) {
            done = done.and(img::free_leaks(&loaded.checked_image(*node)?.path, Some(&lock)));
        }
    }
    done
}

/// Finds the nodes that somebody may have open, for reading too.
fn open(host: &Host, loaded: &LoadedTree) -> Result<BTreeSet<NodeId>> {
    let tree = &loaded.tree;
    let mut open = written(host, loaded)?;
    for (key, volume) in &tree.volumes {
        let seen = Attachment::seen(host, *key).ok().flatten().and_then(|seen| seen.open);
        if !volume.active.is_empty() || seen.is_some() {
            open.extend(tree.chain(volume.node));
            open.extend(seen.into_iter().flat_map(|seen| seen.nodes));
        }
    }
    Ok(open)
}
