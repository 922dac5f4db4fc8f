//! Trees as text.

use std::fmt::Write;

use super::trees::{Node, Picture, Tree, Volume};
use crate::id::{NodeId, Shortened};
use crate::size::bytes;
use crate::store::Mode;

/// Draws an SR's trees.
pub fn draw(picture: &Picture) -> String {
    let mut text = format!("SR {} {:?} at {}\n", picture.sr, Shortened(&picture.name), picture.path);
    for tree in &picture.trees {
        // Writing to a string does not fail.
        let _ = writeln!(text, "\ntree {}", tree.tree);
        draw_tree(&mut text, tree, "  ");
    }
    text
}

/// Draws one tree, each line behind an indent.
pub(super) fn draw_tree(text: &mut String, tree: &Tree, indent: &str) {
    if let Some(problem) = &tree.problem {
        let _ = writeln!(text, "{indent}({problem})");
    }
    if let Some(unfinished) = &tree.unfinished {
        let _ = writeln!(text, "{indent}begun and not ended: {unfinished}");
    }
    if let Some(merging) = &tree.merging {
        let _ = writeln!(text, "{indent}{merging}");
    }
    for root in tree.nodes.iter().filter(|node| node.parent.is_none()) {
        let _ = writeln!(text, "{indent}{}", line(root));
        branches(text, tree, root.node, indent);
    }
    for volume in &tree.destroyed {
        let _ = writeln!(text, "{indent}{}: its data was destroyed", title(volume));
    }
}

/// Draws what lies on a node.
fn branches(text: &mut String, tree: &Tree, parent: NodeId, indent: &str) {
    let children: Vec<&Node> = tree.nodes.iter().filter(|node| node.parent == Some(parent)).collect();
    for (at, child) in children.iter().enumerate() {
        let is_last = at + 1 == children.len();
        let _ = writeln!(text, "{indent}{} {}", if is_last { "└─" } else { "├─" }, line(child));
        branches(text, tree, child.node, &format!("{indent}{}", if is_last { "   " } else { "│  " }));
    }
}

/// Describes a node.
fn line(node: &Node) -> String {
    let what = match (&node.volume, &node.scratch_of) {
        (Some(volume), _) => title(volume),
        (None, Some(key)) => format!("what is written to {key} and thrown away"),
        (None, None) => "hidden".to_owned(),
    };
    let (size, physical) = (bytes(node.virtual_size), bytes(node.physical_size));
    let mut line = format!("{what}  node {}  {size}, {physical} on disk", node.node);
    for remark in node.volume.iter().flat_map(remarks) {
        let _ = write!(line, "  {remark}");
    }
    if let Some(problem) = &node.problem {
        let _ = write!(line, "  ({problem})");
    }
    line
}

/// Gives a volume's name and uuid.
fn title(volume: &Volume) -> String {
    format!("{:?} {}", Shortened(&volume.name), volume.volume)
}

/// Gives what there is to say of a volume.
pub fn remarks(volume: &Volume) -> Vec<String> {
    let mut remarks = Vec::new();
    for active in &volume.active {
        let mode = match active.mode {
            Mode::ReadOnly => "ro",
            Mode::ReadWrite => "rw",
        };
        let host = if active.here { "this host".to_owned() } else { format!("host {}", active.host) };
        remarks.push(format!("active {mode} on {host}"));
    }
    if !volume.domains.is_empty() {
        let domains: Vec<&str> = volume.domains.iter().map(|domain| domain.domain.as_str()).collect();
        remarks.push(format!("domains {}", domains.join(", ")));
    }
    remarks.extend(volume.mirrors.iter().map(|mirror| format!("mirrored: {:.1} %", mirror.done * 100.0)));
    remarks.extend(volume.cbt.then(|| "changed blocks tracked".to_owned()));
    remarks.extend(volume.scratch.then(|| "writes are thrown away".to_owned()));
    remarks
}
