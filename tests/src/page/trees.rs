//! The trees of nodes, drawn, and a table of the volumes.

use std::fmt::Write as _;

use super::markup::{count, name, shortened, text};
use crate::draw::size;
use crate::report::Report;
use crate::story::{Kind, Node, Story};

/// How many nodes of a side are drawn, how many of them in one drawing, which must fit on a sheet, and how many volumes are
/// in the table.
const DRAWN: usize = 75;
const TOGETHER: usize = 15;
const LISTED: usize = 200;

const WIDTH: f64 = 560.0;
const ROW: f64 = 38.0;
/// How far branches are apart, and how much room all of them have.
const STEP: f64 = 20.0;
const ROOM: f64 = 160.0;

/// Both sides.
pub(super) fn section(report: &Report, story: &Story) -> String {
    let mut html = "<section id=\"trees\"><h2>Trees</h2>\n<p class=\"note\">What stands below lies on what stands above. \
        Circle: what the VM writes to. Square: a snapshot. Dashed diamond: a node that no volume names. Triangle: a \
        volume that is not the VM’s. Each with its size, the data it has of its own, and what mirrors sent of it.</p>\n\
        <div class=\"sides\">\n"
        .to_owned();
    html.push_str(&side("The source before", &story.source_before));
    html.push_str(&side("The destination afterwards", &story.destination_after));
    html.push_str("</div>\n");
    if story.source_after.is_empty() {
        html.push_str("<p>The source has no volume and no node file afterwards.</p>\n");
    } else {
        let _ = writeln!(html, "<div class=\"sides\">{}</div>", side("The source afterwards", &story.source_after));
    }
    html + &table(report, story) + "</section>\n"
}

fn side(caption: &str, nodes: &[Node]) -> String {
    let mut html = format!("<figure class=\"tree\"><figcaption>{caption}</figcaption>\n");
    if nodes.is_empty() {
        html.push_str("<p class=\"empty\">nothing</p>\n");
    }
    let places = placed(nodes);
    let lanes = places.iter().map(|place| place.lane).max().unwrap_or(0);
    let step = STEP.min(ROOM / lanes.max(1) as f64);
    let edges: Vec<String> = places.iter().map(|place| edge(place, &places, step)).collect();
    let drawn = places.len().min(DRAWN);
    for from in (0..drawn).step_by(TOGETHER) {
        let to = (from + TOGETHER).min(drawn);
        let (top, height) = (from as f64 * ROW, (to - from) as f64 * ROW);
        let _ = write!(
            html,
            "<svg viewBox=\"0 {top:.0} {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{caption}, drawn\">"
        );
        for (place, edge) in places.iter().zip(&edges).take(drawn) {
            // A line from a node of an earlier drawing goes through this one.
            let above = place.above.map_or(place.row, |above| places[above].row);
            if above < to && place.row >= from {
                html.push_str(edge);
            }
        }
        for place in &places[from..to] {
            html.push_str(&node(place, step));
        }
        html.push_str("</svg>\n");
    }
    if places.len() > drawn {
        let _ = writeln!(html, "<p class=\"note\">{} more are not drawn.</p>", count((places.len() - drawn) as u64));
    }
    html + "</figure>\n"
}

/// Where a node is drawn.
struct Place<'a> {
    node: &'a Node,
    row: usize,
    lane: usize,
    /// The place of what it lies on.
    above: Option<usize>,
}

/// Puts nodes into rows, each after what it lies on. The last of those on a node stays in its lane, which is the one that
/// leads to what the VM writes to; the others go one lane to the right.
fn placed(nodes: &[Node]) -> Vec<Place<'_>> {
    let mut on: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
    let mut leads: Vec<bool> = nodes.iter().map(|node| node.kind == Kind::Leaf).collect();
    let mut roots = Vec::new();
    for (index, node) in nodes.iter().enumerate().rev() {
        // Parents come before their children in the list.
        match node.parent.filter(|parent| *parent < index) {
            Some(parent) => {
                on[parent].push(index);
                leads[parent] |= leads[index];
            }
            None => roots.push(index),
        }
    }
    // Both lists are last first by now, which is the order in which a stack wants them.
    for list in on.iter_mut().chain([&mut roots]) {
        list.sort_by_key(|index| (!leads[*index], std::cmp::Reverse(*index)));
    }
    let mut places: Vec<Place<'_>> = Vec::new();
    let mut next: Vec<(usize, usize, Option<usize>)> = roots.iter().map(|root| (*root, 0, None)).collect();
    while let Some((index, lane, above)) = next.pop() {
        let row = places.len();
        places.push(Place { node: &nodes[index], row, lane, above });
        for (place, child) in on[index].iter().enumerate() {
            next.push((*child, if place == 0 { lane } else { lane + 1 }, Some(row)));
        }
    }
    places
}

fn centre(place: &Place<'_>, step: f64) -> (f64, f64) {
    (14.0 + place.lane as f64 * step, place.row as f64 * ROW + ROW / 2.0)
}

fn edge(place: &Place<'_>, places: &[Place<'_>], step: f64) -> String {
    let Some(above) = place.above else { return String::new() };
    let ((x, y), (from_x, from_y)) = (centre(place, step), centre(&places[above], step));
    if x > from_x {
        let turn = y - ROW / 2.0;
        format!("<path class=\"edge\" d=\"M{from_x:.1} {from_y:.1}V{turn:.1}Q{from_x:.1} {y:.1} {x:.1} {y:.1}\"/>")
    } else {
        format!("<path class=\"edge\" d=\"M{from_x:.1} {from_y:.1}V{y:.1}\"/>")
    }
}

fn words(kind: Kind) -> &'static str {
    match kind {
        Kind::Leaf => "the VM writes to it",
        Kind::Snapshot => "snapshot",
        Kind::Hidden => "hidden node",
        Kind::Other => "not the VM’s",
    }
}

fn node(place: &Place<'_>, step: f64) -> String {
    let Place { node, .. } = place;
    let (x, y) = centre(place, step);
    let shape = match node.kind {
        Kind::Leaf => format!("<circle class=\"leaf\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"7\"/>"),
        Kind::Snapshot => {
            format!("<rect class=\"snapshot\" x=\"{:.1}\" y=\"{:.1}\" width=\"12\" height=\"12\"/>", x - 6.0, y - 6.0)
        }
        Kind::Hidden => format!("<path class=\"hidden\" d=\"M{x:.1} {:.1}l7 7l-7 7l-7 -7z\"/>", y - 7.0),
        Kind::Other => format!("<path class=\"other\" d=\"M{x:.1} {:.1}l7 13h-14z\"/>", y - 7.0),
    };
    let (left, name) = (x + 16.0, text(&node.name));
    let columns = ((WIDTH - 130.0 - left) / 8.2) as usize;
    let right = match (node.sent, node.identical) {
        (Some(sent), _) => format!("sent {}", size(sent)),
        (None, Some(true)) => "✓ identical".to_owned(),
        (None, Some(false)) => "✗ different".to_owned(),
        (None, None) => String::new(),
    };
    let short = shortened(&node.name, columns);
    let whole = if short == name { String::new() } else { format!("<title>{name}</title>") };
    format!(
        "{shape}<text class=\"node\" x=\"{left:.1}\" y=\"{:.1}\">{short}{whole}</text>\
         <text class=\"tick\" x=\"{left:.1}\" y=\"{:.1}\">{}, {}, {} its own</text>\
         <text class=\"sum\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{right}</text>",
        y - 2.0,
        y + 14.0,
        words(node.kind),
        size(node.size),
        size(node.own),
        WIDTH - 4.0,
        y - 2.0,
    )
}

/// The volumes with their full names, and what they were based on.
fn table(report: &Report, story: &Story) -> String {
    let mut html = "<table><thead><tr><th scope=\"col\">volume at the source</th><th scope=\"col\">lies on</th>\
        <th scope=\"col\">what it is</th><th scope=\"col\" class=\"n\">size</th><th scope=\"col\" class=\"n\">its own</th>\
        <th scope=\"col\" class=\"n\">sent</th><th scope=\"col\">at the destination</th></tr></thead>\n<tbody>\n"
        .to_owned();
    let nodes = &story.source_before;
    for node in nodes.iter().take(LISTED) {
        let below = node.parent.and_then(|parent| nodes.get(parent)).map_or("nothing", |parent| parent.name.as_str());
        let arrived = match report.nodes.iter().find(|arrived| arrived.name == node.name) {
            Some(arrived) if arrived.identical => "✓ identical",
            Some(_) => "✗ different",
            None if node.kind == Kind::Hidden => "—",
            None => "✗ not there",
        };
        let _ = writeln!(
            html,
            "<tr><th scope=\"row\">{}</th><td>{}<td>{}<td class=\"n\">{}<td class=\"n\">{}<td class=\"n\">{}<td>{arrived}",
            name(&node.name),
            name(below),
            words(node.kind),
            size(node.size),
            size(node.own),
            node.sent.map_or_else(|| "—".to_owned(), size),
        );
    }
    html.push_str("</tbody></table>\n");
    if nodes.len() > LISTED {
        let _ = writeln!(html, "<p class=\"note\">{} more are not listed.</p>", count((nodes.len() - LISTED) as u64));
    }
    html
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leads_to_the_leaf_stays_in_one_lane() {
        let node = |name: &str, kind, parent| Node {
            name: name.into(),
            kind,
            parent,
            size: 1,
            own: 1,
            sent: None,
            identical: None,
        };
        let snapshot = |name: &str, parent| node(name, Kind::Snapshot, parent);
        let nodes = [
            snapshot("snap1", None),
            node("disk", Kind::Leaf, Some(0)),
            snapshot("snap2", Some(0)),
            snapshot("snap3", Some(2)),
            snapshot("alone", None),
        ];
        let places = placed(&nodes);
        let told: Vec<(&str, usize)> = places.iter().map(|place| (place.node.name.as_str(), place.lane)).collect();
        assert_eq!(told, [("alone", 0), ("snap1", 0), ("snap2", 1), ("snap3", 1), ("disk", 0)]);
        assert_eq!(places[4].above, Some(1));
    }
}
