//! The verdict, the figures, what went wrong, the properties and the phases.

use std::fmt::Write as _;

use super::markup::{count, ms, name, text};
use crate::draw::size;
use crate::report::Report;
use crate::story::Story;

/// How many problems are listed.
const PROBLEMS: usize = 40;
/// Methods that change nothing.
const READERS: [&str; 4] = ["SR.stat", "SR.ls", "Volume.stat", "Data.stat"];

/// The verdict and the figures below it.
pub(super) fn verdict(report: &Report, story: &Story) -> String {
    let (class, sign, words) = match (&story.failure, report.ok) {
        (Some(failure), _) => ("bad", "✗", format!("The migration failed in the phase “{}”.", failure.phase)),
        (None, true) => ("good", "✓", "Everything holds.".to_owned()),
        (None, false) => ("bad", "✗", "The migration ended, but not everything holds.".to_owned()),
    };
    let downtime = match (report.downtime_seconds, story.pause) {
        (Some(seconds), _) => format!("{} ms", ms(seconds * 1e3)),
        (None, Some(_)) => "see below".to_owned(),
        (None, None) => "none".to_owned(),
    };
    let writes: u64 = report.guests.iter().map(|guest| guest.acknowledged).sum();
    let worst = report.guests.iter().map(|guest| guest.latency.max_seconds).fold(0.0, f64::max);
    let arrived = report.nodes.len();
    let mut figures = vec![
        ("migration", format!("{} ms", ms(story.ended))),
        ("downtime", downtime),
        ("sent to the destination", size(report.bytes_on_the_wire)),
        ("came back", size(report.bytes_back)),
        ("volumes that arrived", count(arrived as u64)),
        ("script calls", count(story.calls.len() as u64)),
    ];
    if report.physical_bytes > 0 {
        figures.push(("on disk at the destination", size(report.physical_bytes)));
        figures.push(("data at the source", size(report.unique_allocated_bytes)));
    }
    if writes > 0 {
        figures.push(("guest’s commands", count(writes)));
        figures.push(("longest of them", format!("{} ms", ms(worst * 1e3))));
    }
    let figures: String =
        figures.into_iter().map(|(name, value)| format!("<div><dt>{name}</dt><dd>{value}</dd></div>\n")).collect();
    format!(
        "<p class=\"verdict {class}\"><span aria-hidden=\"true\">{sign}</span> {}</p>\n<dl class=\"figures\">{figures}</dl>\n",
        text(&words)
    )
}

/// What went wrong, and what was done about it; nothing if nothing did.
pub(super) fn problems(report: &Report, story: &Story) -> String {
    if report.problems.is_empty() && story.failure.is_none() {
        return String::new();
    }
    let mut html = "<section id=\"problems\"><h2>What went wrong</h2>\n".to_owned();
    if let Some(failure) = &story.failure {
        let _ = writeln!(html, "<p><strong>{}</strong></p>", text(&failure.error));
        let failed = story.calls.iter().enumerate().filter(|(_, call)| call.failed && call.from >= 0.0);
        let failed: Vec<String> = failed
            .take(PROBLEMS)
            .map(|(number, call)| {
                let why = call.fault.as_ref().map_or("", |_| ", which was made to");
                format!(
                    "<li><a href=\"#c{number}\">{}</a> {} on host {} at {} ms{why}</li>\n",
                    text(&call.method),
                    name(&call.volume),
                    text(&call.host),
                    ms(call.from)
                )
            })
            .collect();
        if !failed.is_empty() {
            let _ = writeln!(html, "<h3>Calls that failed</h3>\n<ul>{}</ul>", failed.concat());
        }
        html.push_str("<h3>What was cleaned up</h3>\n");
        html.push_str(&calls_after(story));
        if failure.swept.is_empty() {
            html.push_str("<p>xapi’s own clean-up left nothing for anybody to destroy.</p>\n");
        } else {
            html.push_str("<p>xapi’s own clean-up left these volumes, which a user finds after a scan:</p>\n<ul>");
            for swept in failure.swept.iter().take(PROBLEMS) {
                let _ = writeln!(html, "<li>{}</li>", name(swept));
            }
            html.push_str("</ul>\n");
        }
        if failure.restarted {
            html.push_str("<p>The VM had been suspended, and was started again at the source.</p>\n");
        } else if story.pause.is_none() {
            html.push_str("<p>The VM went on at the source; it was never suspended.</p>\n");
        }
    }
    // The failure's own error is the first of the problems, and is told by then.
    let told = usize::from(story.failure.is_some());
    let rest = report.problems.iter().skip(told);
    let listed: String = rest.clone().take(PROBLEMS).map(|what| format!("<li>{}</li>\n", name(what))).collect();
    if !listed.is_empty() {
        let _ = writeln!(html, "<h3>What does not hold</h3>\n<ul>{listed}</ul>");
    }
    if rest.len() > PROBLEMS {
        let _ = writeln!(html, "<p>{} more of these are not listed.</p>", count((rest.len() - PROBLEMS) as u64));
    }
    html + "</section>\n"
}

/// What xapi called once the first call had failed, which is its clean-up.
fn calls_after(story: &Story) -> String {
    let since = story.calls.iter().filter(|call| (0.0..=story.ended).contains(&call.from));
    let mut since = since.skip_while(|call| !call.failed).skip(1).peekable();
    if since.peek().is_none() {
        return String::new();
    }
    // By method and host, in the order of their first calls.
    let mut groups: Vec<(&str, &str, Vec<&str>)> = Vec::new();
    for call in since.filter(|call| !READERS.contains(&call.method.as_str())) {
        let volume = call.volume.as_str();
        match groups.iter_mut().find(|(method, host, _)| (*method, *host) == (&call.method, &call.host)) {
            Some((_, _, volumes)) => volumes.push(volume),
            None => groups.push((&call.method, &call.host, vec![volume])),
        }
    }
    let told = groups.iter().map(|(method, host, volumes)| {
        let names: Vec<String> = volumes.iter().take(PROBLEMS).map(|volume| name(volume)).collect();
        format!("<li>{} on host {}: {}</li>\n", text(method), text(host), names.join(", "))
    });
    format!("<p>Then xapi called, apart from what only reads:</p>\n<ul>{}</ul>\n", told.collect::<String>())
}

/// The properties and whether they hold.
pub(super) fn properties(report: &Report, story: &Story) -> String {
    let failed = story.failure.is_some();
    let of = report.properties;
    let mut html =
        "<section id=\"properties\"><h2>Properties</h2>\n<table><thead><tr><th scope=\"col\">property</th>\
        <th scope=\"col\">outcome</th><th scope=\"col\">what was looked at</th></tr></thead>\n<tbody>\n"
            .to_owned();
    let clean_source =
        if failed { "the source is as it was, and nothing runs there" } else { "nothing is left at the source" };
    let clean_destination = if failed {
        "nothing is left at the destination"
    } else {
        "the destination has what was migrated, and nothing else"
    };
    for (property, holds, judged, what) in [
        ("topology", of.topology, !failed, "every volume lies on the copy of what it lay on"),
        ("content", of.content, !failed, "every volume reads as at the source, byte for byte, by qemu-img"),
        ("acknowledged writes", of.acknowledged_writes, true, "every write that the guest was told is done is there"),
        ("source clean", of.source_clean, true, clean_source),
        ("destination clean", of.destination_clean, true, clean_destination),
    ] {
        let (class, outcome) = match (judged, holds) {
            (false, _) => ("", "— not judged, as nothing was switched"),
            (true, true) => (" class=\"good\"", "✓ holds"),
            (true, false) => (" class=\"bad\"", "✗ does not hold"),
        };
        let _ = writeln!(html, "<tr><th scope=\"row\">{property}</th><td{class}>{outcome}<td>{what}");
    }
    html + "</tbody></table></section>\n"
}

/// The phases and how long they took.
pub(super) fn phases(story: &Story) -> String {
    let mut html = "<section id=\"phases\"><h2>Phases</h2>\n<table><thead><tr><th scope=\"col\">phase</th>\
        <th scope=\"col\" class=\"n\">from ms</th><th scope=\"col\" class=\"n\">to ms</th>\
        <th scope=\"col\" class=\"n\">took ms</th></tr></thead>\n<tbody>\n"
        .to_owned();
    let mut row = |what: &str, from: f64, to: f64| {
        let _ = writeln!(
            html,
            "<tr><td>{}<td class=\"n\">{}<td class=\"n\">{}<td class=\"n\">{}",
            text(what),
            ms(from),
            ms(to),
            ms(to - from)
        );
    };
    for phase in &story.phases {
        row(&phase.name, phase.from, phase.to);
    }
    if let Some(pause) = story.pause {
        row("of these, the VM did not run", pause.from, pause.to - pause.judged);
        if pause.judged > 0.0 {
            row("and was held back to judge both sides", pause.to - pause.judged, pause.to);
        }
    }
    html + "</tbody></table></section>\n"
}
