//! A host's status as text: at a glance, with a bar for each mirror that goes on, or all that is known.

use std::cmp::Reverse;
use std::fmt::Write;

use super::trees::Tree;
use super::{MirrorStatus, SrStatus, Status, VolumeStatus, drawn};
use crate::attachment::Use;
use crate::clock;
use crate::failures::Failure;
use crate::id::Shortened;
use crate::size::bytes;
use crate::store::Mode;

/// How many characters a bar has.
const BAR: usize = 24;

/// How many nodes of an SR are drawn in full: enough for what is wrong, and little enough to be read.
const DRAWN: usize = 400;

/// How many mirrors are described in full, the newest.
const MIRRORS: usize = 50;

/// Describes a host at a glance.
pub fn draw(status: &Status) -> String {
    let mut text = format!("xapi-storage-qcow2 {}, {}\n", status.version, status.storage_daemon);
    section(&mut text, "what is wrong", &status.problems, |text, problem| line(text, 1, problem));
    section(&mut text, "SRs", &status.srs, draw_sr);
    section(&mut text, "volumes", &status.volumes, draw_volume);
    section(&mut text, "mirrors", &status.mirrors, draw_mirror);
    section(&mut text, "failed last", &status.failures, draw_failure);
    text
}

/// Describes a host with all that is known of it.
pub fn draw_all(status: &Status) -> String {
    let mut text = format!("xapi-storage-qcow2 {}\n", status.version);
    line(&mut text, 0, &format!("host {}, boot {}", status.host, status.boot));
    line(&mut text, 0, &format!("storage daemon {}", status.storage_daemon));
    section(&mut text, "what is wrong", &status.problems, |text, problem| line(text, 1, problem));
    section(&mut text, "QEMU", &status.programs, |text, program| {
        let can = match (&program.lacks, program.bounds_handshake) {
            (Some(lacks), _) => format!("cannot be used: {lacks}"),
            (None, true) => "can do all that is needed, ends handshakes that take too long".to_owned(),
            (None, false) => "can do all that is needed".to_owned(),
        };
        line(text, 1, &format!("{} {}: {can}", program.path.display(), program.version));
    });
    section(&mut text, "SRs", &status.srs, |text, sr| {
        draw_sr(text, sr);
        draw_trees(text, sr);
    });
    section(&mut text, "volumes", &status.volumes, |text, volume| {
        draw_volume(text, volume);
        let more = more_of(volume);
        if !more.is_empty() {
            line(text, 2, &more.join("; "));
        }
    });
    let older = status.mirrors.len().saturating_sub(MIRRORS);
    section(&mut text, "mirrors", &status.mirrors[older..], |text, mirror| {
        draw_mirror(text, mirror);
        line(text, 2, &format!("to {}", mirror.remote));
        if let Some(plan) = &mirror.plan {
            line(text, 2, plan);
        }
        let (started, updated) = (clock::for_people(mirror.started), clock::for_people(mirror.updated));
        let supervisor = mirror.supervisor.map(|pid| format!("; supervisor {pid}")).unwrap_or_default();
        line(text, 2, &format!("started {started}, last heard of {updated}{supervisor}"));
    });
    if older > 0 {
        line(&mut text, 1, &format!("and {older} older ones"));
    }
    section(&mut text, "failed last", &status.failures, |text, failure| {
        draw_failure(text, failure);
        let about = [("SR", failure.sr.as_deref()), ("volume", failure.volume.as_deref())];
        let mut about: Vec<String> =
            about.iter().filter_map(|(what, which)| which.map(|which| format!("{what} {which}"))).collect();
        if !failure.dbg.is_empty() {
            about.push(format!("task {}", failure.dbg));
        }
        if !about.is_empty() {
            line(text, 2, &about.join(", "));
        }
    });
    text
}

/// Writes a heading and what belongs below it, if there is something.
fn section<T>(text: &mut String, title: &str, all: &[T], draw: impl Fn(&mut String, &T)) {
    if !all.is_empty() {
        text.push('\n');
        line(text, 0, title);
        all.iter().for_each(|one| draw(text, one));
    }
}

/// Writes a line. What programs have said may have several, and may not speak to a terminal.
fn line(text: &mut String, depth: usize, what: &str) {
    text.extend(std::iter::repeat_n("  ", depth));
    text.extend(what.chars().map(|character| if character.is_control() { ' ' } else { character }));
    text.push('\n');
}

fn draw_failure(text: &mut String, failure: &Failure) {
    let (when, code) = (clock::for_people(failure.time), &failure.code);
    line(text, 1, &format!("{when}  {} {code}: {}", failure.method, failure.message));
}

fn draw_sr(text: &mut String, sr: &SrStatus) {
    line(text, 1, &format!("{} {:?} at {}", sr.sr, Shortened(&sr.name), sr.path));
    if let Some(problem) = &sr.problem {
        return line(text, 2, &format!("({problem})"));
    }
    let (free, total) = (bytes(sr.free), bytes(sr.total));
    let (trees, volumes, hidden, chain) = (sr.trees, sr.volumes, sr.hidden, sr.longest_chain);
    let counted = format!("volumes {volumes}, trees {trees}, hidden nodes {hidden}, longest chain {chain}");
    line(text, 2, &format!("{free} of {total} free; {counted}"));
    for unreadable in &sr.unreadable {
        line(text, 2, &format!("({unreadable})"));
    }
    let Some(gc) = &sr.gc else { return };
    let merged = if gc.merged > 0 { format!(", {} nodes merged so far", gc.merged) } else { String::new() };
    if let Some(doing) = &gc.doing {
        let process = gc.process.map(|pid| format!(", process {pid}")).unwrap_or_default();
        line(text, 2, &format!("brings space back: {doing}{merged}{process}"));
    }
    if let Some(killed) = &gc.killed {
        line(text, 2, &format!("what brought space back was killed: {killed}{merged}"));
    }
    for left in &gc.left {
        line(text, 2, &format!("space is not brought back yet: {left}"));
    }
}

/// Draws an SR's trees, those first of which there is most to say, until it is enough.
fn draw_trees(text: &mut String, sr: &SrStatus) {
    let mut trees: Vec<&Tree> = sr.drawn.iter().collect();
    trees.sort_by_key(|tree| Reverse(weight(tree)));
    let (mut nodes, mut left_out) = (0, 0);
    for tree in trees {
        if nodes > 0 && nodes + tree.nodes.len() > DRAWN {
            left_out += 1;
            continue;
        }
        nodes += tree.nodes.len();
        let hidden = tree.nodes.iter().filter(|node| node.hidden).count();
        line(
            text,
            2,
            &format!("tree {}  nodes {}, hidden {hidden}, depth {}", tree.tree, tree.nodes.len(), tree.depth),
        );
        drawn::draw_tree(text, tree, "      ");
    }
    if left_out > 0 {
        line(text, 2, &format!("and {left_out} trees more: 'xapi-storage-qcow2 tree {}' draws all", sr.sr));
    }
}

/// Says how much a reader may want to see a tree.
fn weight(tree: &Tree) -> (bool, bool, usize) {
    let is_wrong = tree.problem.is_some() || tree.nodes.iter().any(|node| node.problem.is_some());
    let is_used = tree.nodes.iter().filter_map(|node| node.volume.as_ref()).any(|volume| !volume.active.is_empty());
    let is_changing = tree.unfinished.is_some() || tree.merging.is_some();
    (is_wrong || is_changing, is_used, tree.depth)
}

fn draw_volume(text: &mut String, volume: &VolumeStatus) {
    let mut what = format!("{}", volume.volume);
    if let Some(pid) = volume.daemon {
        let _ = write!(what, "  daemon {pid}, {}", bytes(volume.memory));
    }
    if let Some(mode) = volume.open {
        let mode = if mode == Mode::ReadWrite { "rw" } else { "ro" };
        let _ = write!(what, "  open {mode}, {} images", volume.nodes);
    }
    if let Some(clients) = volume.clients.filter(|clients| *clients > 0) {
        let _ = write!(what, "  clients {clients}");
    }
    for (domain, usage) in &volume.domains {
        let usage = match usage {
            Use::Attached => "attached",
            Use::ReadOnly => "ro",
            Use::ReadWrite => "rw",
        };
        let _ = write!(what, "  domain {domain} {usage}");
    }
    if let Some(problem) = &volume.problem {
        let _ = write!(what, "  ({problem})");
    }
    line(text, 1, &what);
}

/// Says what else is known of a volume.
fn more_of(volume: &VolumeStatus) -> Vec<String> {
    let mut more = Vec::new();
    more.extend(volume.sr.map(|sr| format!("of SR {sr}")));
    more.extend(
        volume.is_changing.then(|| "a call is at work on what is open, or was when it was killed".to_owned()),
    );
    more.extend(volume.announced.as_ref().map(|announced| format!("announced as \"{announced}\"")));
    more.extend(volume.device.as_ref().map(|device| format!("block device {}", device.display())));
    more.extend(volume.import.as_ref().map(|domain| format!("import for domain {domain}")));
    more.extend(volume.unflushed.iter().map(|domain| format!("the last writes of domain {domain} were not flushed")));
    more
}

fn draw_mirror(text: &mut String, mirror: &MirrorStatus) {
    let bar = if mirror.is_running { format!("{} ", bar(mirror.done)) } else { String::new() };
    let reason = mirror.reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
    // The words are the record's own, in which its reason may stand.
    let reason =
        if mirror.reason.as_ref().is_some_and(|reason| mirror.summary.contains(reason)) { "" } else { &reason };
    let what = if mirror.is_copy { "blocks of volume" } else { "volume" };
    line(text, 1, &format!("{bar}{} of {what} {}: {}{reason}", mirror.mirror, mirror.volume, mirror.summary));
}

/// Draws how much is done.
fn bar(done: f64) -> String {
    let full = ((done.clamp(0.0, 1.0) * BAR as f64) as usize).min(BAR);
    format!("[{}{}]", "#".repeat(full), "-".repeat(BAR - full))
}

#[cfg(test)]
mod tests {
    use super::super::trees::Node;
    use super::*;
    use crate::id::{NodeId, TreeId};

    fn tree(nodes: usize, problem: Option<&str>) -> Tree {
        let node = || Node {
            node: NodeId::random(),
            parent: None,
            virtual_size: 0,
            physical_size: 0,
            hidden: true,
            scratch_of: None,
            volume: None,
            problem: problem.map(str::to_owned),
        };
        Tree {
            tree: TreeId::random(),
            problem: None,
            unfinished: None,
            merging: None,
            depth: nodes,
            nodes: (0..nodes).map(|_| node()).collect(),
            destroyed: Vec::new(),
        }
    }

    #[test]
    fn of_many_trees_those_with_something_wrong_are_drawn_and_the_rest_is_counted() {
        let drawn = (0..1000).map(|n| tree(1, (n == 999).then_some("its header is odd"))).collect();
        let sr = SrStatus { sr: "s1".to_owned(), drawn, ..SrStatus::default() };
        let mut text = String::new();
        draw_trees(&mut text, &sr);
        assert!(text.contains("(its header is odd)") && text.contains("and 600 trees more"), "{text}");
        assert_eq!(text.matches("hidden 1, depth 1").count(), DRAWN);
        // One that is too large alone is drawn all the same.
        let sr = SrStatus { drawn: vec![tree(DRAWN + 1, None)], ..SrStatus::default() };
        let mut text = String::new();
        draw_trees(&mut text, &sr);
        assert!(!text.contains("trees more"));
    }

    #[test]
    fn what_others_have_said_stays_on_its_line() {
        let mut text = String::new();
        line(&mut text, 1, "a\nb\u{1b}[2J");
        assert_eq!(text, "  a b [2J\n");
    }

    #[test]
    fn a_bar_is_full_when_all_is_done_and_not_before() {
        assert_eq!(bar(0.0), format!("[{}]", "-".repeat(BAR)));
        assert_eq!(bar(1.0), format!("[{}]", "#".repeat(BAR)));
        assert!(bar(0.999).contains('-'));
        assert_eq!(bar(f64::NAN), bar(0.0));
    }
}
