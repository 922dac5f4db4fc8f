//! A host's status as text, with a bar for each mirror that goes on.

use std::fmt::Write;

use plugin::attachment::Use;
use plugin::clock;
use plugin::id::Shortened;
use plugin::size::bytes;
use plugin::store::Mode;

use super::model::{MirrorStatus, SrStatus, Status, VolumeStatus};

/// How many characters a bar has.
const BAR: usize = 24;

/// Describes a host.
pub fn draw(status: &Status) -> String {
    let mut text = format!("xapi-storage-qcow2 {}, {}\n", status.version, status.storage_daemon);
    section(&mut text, "SRs", &status.srs, draw_sr);
    section(&mut text, "volumes", &status.volumes, draw_volume);
    section(&mut text, "mirrors", &status.mirrors, draw_mirror);
    section(&mut text, "failed last", &status.failures, |text, failure| {
        let (when, code) = (clock::for_people(failure.time), &failure.code);
        line(text, 1, &format!("{when}  {} {code}: {}", failure.method, failure.message));
    });
    text
}

/// Writes a heading and what belongs below it, if there is something.
fn section<T>(text: &mut String, title: &str, all: &[T], draw: impl Fn(&mut String, &T)) {
    if !all.is_empty() {
        line(text, 0, &format!("\n{title}"));
        all.iter().for_each(|one| draw(text, one));
    }
}

fn line(text: &mut String, depth: usize, what: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "{:indent$}{what}", "", indent = 2 * depth);
}

fn draw_sr(text: &mut String, sr: &SrStatus) {
    line(text, 1, &format!("{} {:?} at {}", sr.sr, Shortened(&sr.name), sr.path));
    if let Some(problem) = &sr.problem {
        return line(text, 2, &format!("({problem})"));
    }
    let (free, total) = (bytes(sr.free), bytes(sr.total));
    let (trees, volumes, hidden, chain) = (sr.trees, sr.volumes, sr.hidden, sr.longest_chain);
    line(
        text,
        2,
        &format!(
            "{free} of {total} free; volumes {volumes}, trees {trees}, hidden nodes {hidden}, longest chain {chain}"
        ),
    );
    let Some(gc) = &sr.gc else { return };
    if let Some(doing) = &gc.doing {
        line(text, 2, &format!("brings space back: {doing}"));
    }
    for left in &gc.left {
        line(text, 2, &format!("space is not brought back yet: {left}"));
    }
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

fn draw_mirror(text: &mut String, mirror: &MirrorStatus) {
    let bar = if mirror.is_running { format!("{} ", bar(mirror.done)) } else { String::new() };
    let reason = mirror.reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
    // The words are the record's own, in which its reason may stand.
    let reason =
        if mirror.reason.as_ref().is_some_and(|reason| mirror.summary.contains(reason)) { "" } else { &reason };
    line(text, 1, &format!("{bar}{} of volume {}: {}{reason}", mirror.mirror, mirror.volume, mirror.summary));
}

/// Draws how much is done.
fn bar(done: f64) -> String {
    let full = ((done.clamp(0.0, 1.0) * BAR as f64) as usize).min(BAR);
    format!("[{}{}]", "#".repeat(full), "-".repeat(BAR - full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_full_when_all_is_done_and_not_before() {
        assert_eq!(bar(0.0), format!("[{}]", "-".repeat(BAR)));
        assert_eq!(bar(1.0), format!("[{}]", "#".repeat(BAR)));
        assert!(bar(0.999).contains('-'));
        assert_eq!(bar(f64::NAN), bar(0.0));
    }
}
