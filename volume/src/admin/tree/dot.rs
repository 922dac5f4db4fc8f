//! Trees for graphviz: an arrow leads from each node to the one it lies on.

use std::fmt::Write;

use plugin::id::Shortened;
use plugin::size::bytes;
use plugin::status::remarks;
use plugin::status::trees::{Node, Picture};

/// Draws an SR's trees.
pub fn draw(picture: &Picture) -> String {
    let mut text = format!("digraph \"{}\" {{\n  rankdir=BT;\n  node [shape=box];\n", picture.sr);
    for tree in &picture.trees {
        // Writing to a string does not fail.
        let _ = writeln!(text, "  subgraph \"cluster_{}\" {{\n    label=\"{}\";", tree.tree, tree.tree);
        if let Some(problem) = &tree.problem {
            let _ = writeln!(text, "    \"{}\" [label=\"{}\", color=red];", tree.tree, escaped(problem));
        }
        for node in &tree.nodes {
            let style = if node.hidden { ", style=dashed" } else { "" };
            let colour = if node.problem.is_some() { ", color=red" } else { "" };
            let _ = writeln!(text, "    \"{}\" [label=\"{}\"{style}{colour}];", node.node, label(node));
            if let Some(parent) = node.parent {
                let _ = writeln!(text, "    \"{}\" -> \"{parent}\";", node.node);
            }
        }
        text.push_str("  }\n");
    }
    text.push_str("}\n");
    text
}

/// Describes a node, in lines.
fn label(node: &Node) -> String {
    let mut lines = Vec::new();
    match (&node.volume, &node.scratch_of) {
        (Some(volume), _) => {
            lines.push(format!("{:?}", Shortened(&volume.name)));
            lines.push(volume.volume.to_string());
        }
        (None, Some(key)) => lines.push(format!("scratch of {key}")),
        (None, None) => lines.push("hidden".to_owned()),
    }
    lines.push(format!("{}, {} on disk", bytes(node.virtual_size), bytes(node.physical_size)));
    lines.extend(node.volume.iter().flat_map(remarks));
    lines.extend(node.problem.clone());
    lines.iter().map(|line| escaped(line)).collect::<Vec<_>>().join("\\n")
}

/// Escapes what a quoted string of graphviz's cannot hold.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', " ")
}
