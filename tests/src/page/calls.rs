//! Every script call: a drawing a host with a line a method, and a table.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::axis::{Axis, LEFT, RIGHT, TOP, drawing};
use super::fold::{self, Bar, Row};
use super::markup::{beginning, count, ms, name, text};
use crate::story::{Call, Story};

/// The height of a method's line, and of a bar in it.
const LINE: f64 = 19.0;
const BAR: f64 = 11.0;
/// How much of a name is told of a bar, in characters, and of an answer.
const TOLD: usize = 48;
const ANSWER_TOLD: usize = 120;

/// The calls over time: those of the migration, and more briefly those before and after it.
pub(super) fn section(story: &Story, axis: Axis) -> String {
    let (rows, _) = fold::chosen(fold::rows(&story.calls));
    let mut html =
        "<section id=\"calls\"><h2>Calls over time</h2>\n<p class=\"note\">A line for each method; its calls \
        are bars, a failed one has a cross. At the end of a line: how many calls, how many of them failed (✗), and how long they took together. \
        Each bar leads to its row in the <a href=\"#every-call\">table</a>; arrow keys go from one to the next. "
            .to_owned();
    html.push_str(pause_note(story));
    html.push_str("</p>\n");
    for (host, sides) in lanes(story) {
        let during = |call: &&Call| call.host == host && axis.has(call.from);
        let content = lane(story, &rows, axis, Some(story), &|call| during(&call));
        html.push_str(&figure(&format!("Host {host}, {sides}, during the migration"), content));
    }
    for (when, from, to) in
        [("before the migration", f64::NEG_INFINITY, 0.0), ("after the migration", story.ended, f64::INFINITY)]
    {
        let within = |call: &&Call| (call.from < 0.0 && to <= 0.0) || (call.from > story.ended && from > 0.0);
        let own: Vec<&Call> = story.calls.iter().filter(within).collect();
        let ends = own.iter().map(|call| call.to.unwrap_or(call.from));
        let starts = own.iter().map(|call| call.from);
        let span = Axis::new(starts.fold(f64::MAX, f64::min), ends.fold(f64::MIN, f64::max));
        for (host, sides) in lanes(story) {
            if own.iter().any(|call| call.host == host) {
                let content = lane(story, &rows, span, None, &|call| call.host == host && within(&call));
                html.push_str(&figure(&format!("Host {host}, {sides}, {when}"), content));
            }
        }
    }
    html + "</section>\n"
}

/// What the hatched time in the charts is.
fn pause_note(story: &Story) -> &'static str {
    match story.pause {
        Some(pause) if pause.judged > 0.0 => {
            "Hatched: the VM does not run. Dotted: source and destination are held against each other, which no \
             migration does and which is not counted as downtime."
        }
        Some(_) => "Hatched: the VM does not run.",
        None => "",
    }
}

/// The hosts, and what they are in the migration.
fn lanes(story: &Story) -> Vec<(&str, &'static str)> {
    let (source, destination) = (story.hosts.0.as_str(), story.hosts.1.as_str());
    if source == destination {
        vec![(source, "source and destination")]
    } else {
        vec![(source, "the source"), (destination, "the destination")]
    }
}

fn figure(caption: &str, (height, svg): (f64, String)) -> String {
    let drawn = drawing(height, caption, "group", &svg);
    format!("<figure class=\"calls\"><figcaption>{}</figcaption>\n{drawn}</figure>\n", text(caption))
}

/// One host's calls: the drawing's height and content.
fn lane(
    story: &Story,
    rows: &[Row<'_>],
    axis: Axis,
    phases: Option<&Story>,
    wanted: &dyn Fn(&Call) -> bool,
) -> (f64, String) {
    let mut methods: BTreeMap<(usize, &str), Vec<(usize, &Call)>> = BTreeMap::new();
    for (number, call) in story.calls.iter().enumerate().filter(|(_, call)| wanted(call)) {
        methods.entry((family(&call.method), &call.method)).or_default().push((number, call));
    }
    let (names, lines): (Vec<_>, Vec<_>) = methods.into_iter().unzip();
    let height = lines.len().max(1) as f64 * LINE + 6.0;
    let mut svg = axis.ground(height, phases);
    let mut first = true;
    for (index, ((of, method), bars)) in names.iter().zip(fold::bars(&lines, axis)).enumerate() {
        let y = TOP + 4.0 + index as f64 * LINE;
        let calls = &lines[index];
        let sum: f64 = calls.iter().filter_map(|(_, call)| Some(call.to? - call.from)).sum();
        let failed = calls.iter().filter(|(_, call)| call.failed).count();
        let failed = if failed > 0 { format!(", {} ✗", count(failed as u64)) } else { String::new() };
        let (label, end) = (y + BAR - 1.0, RIGHT + 8.0);
        let _ = write!(
            svg,
            "<path class=\"grid\" d=\"M{LEFT} {line:.1}H{RIGHT}\"/>\
             <text class=\"label\" x=\"{:.1}\" y=\"{label:.1}\" text-anchor=\"end\">{}</text>\
             <text class=\"sum\" x=\"{end:.1}\" y=\"{label:.1}\">{} call{s}{failed}, {} ms</text>",
            LEFT - 8.0,
            text(method),
            count(calls.len() as u64),
            ms(sum),
            s = if calls.len() == 1 { "" } else { "s" },
            line = y + LINE - 4.0,
        );
        for bar in bars {
            svg.push_str(&draw_bar(&bar, rows, y, *of, std::mem::take(&mut first)));
        }
    }
    (height, svg)
}

/// Methods stand together with those of their kind, and share a colour.
fn family(method: &str) -> usize {
    match method.split('.').next() {
        Some("Volume") => 1,
        Some("Datapath") => 2,
        Some("Data") => 3,
        _ => 0,
    }
}

fn draw_bar(bar: &Bar<'_>, rows: &[Row<'_>], y: f64, family: usize, first: bool) -> String {
    let (x, end) = bar.x;
    let (call, width) = (bar.row.call, end - x);
    let class = if call.failed { "failed".to_owned() } else { format!("f{family}") };
    let cross = if call.failed {
        let (middle, centre) = (x + width / 2.0, y + BAR / 2.0);
        format!(
            "<path class=\"cross\" d=\"M{:.1} {:.1}l8 8m0 -8l-8 8\"/>",
            middle.clamp(LEFT, RIGHT) - 4.0,
            centre - 4.0
        )
    } else {
        String::new()
    };
    let shape = format!(
        "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR}\"/>{cross}\
         <title>{}</title>",
        text(&told(&bar.row))
    );
    // The row that has this call, if the table has it.
    let place = rows.partition_point(|row| row.number <= bar.row.number).checked_sub(1);
    let row = place.map(|place| &rows[place]).filter(|row| bar.row.number < row.number + row.count);
    let focus = if first { 0 } else { -1 };
    match row {
        Some(row) => format!("<a href=\"#c{}\" tabindex=\"{focus}\" data-c>{shape}</a>", row.number),
        None => format!("<g tabindex=\"{focus}\" data-c>{shape}</g>"),
    }
}

/// A call, or several, in words.
fn told(row: &Row<'_>) -> String {
    let Call { host, method, volume, from, answer, fault, .. } = row.call;
    let volume = if volume.is_empty() { String::new() } else { format!(" {}", beginning(volume, TOLD)) };
    if row.count > 1 {
        let (shortest, longest) = row.took;
        let end = row.to.map_or_else(String::new, |to| format!(" to {}", ms(to)));
        return format!(
            "{} calls of {method} on host {host}, the first{volume}\n{}{end} ms, each took {} to {} ms\nall answered",
            count(row.count as u64),
            ms(*from),
            ms(shortest),
            ms(longest)
        );
    }
    let took = row.to.map_or_else(|| "never answered".to_owned(), |_| format!("took {} ms", ms(row.took.0)));
    let fault = fault.as_ref().map_or_else(String::new, |fault| format!("\nmade to fail: {fault}"));
    let answer = beginning(answer, ANSWER_TOLD);
    let outcome = if row.call.failed { "failed" } else { "answered" };
    format!("{method}{volume} on host {host}\nat {} ms, {took}\n{outcome}: {answer}{fault}", ms(*from))
}

/// Every call as a table, for paper and for those who listen.
pub(super) fn table(story: &Story) -> String {
    let all = fold::rows(&story.calls);
    let (rows, left_out) = fold::chosen(all);
    let mut html =
        "<section id=\"every-call\"><h2>Every call</h2>\n<p class=\"note\">Calls of one kind that came one \
        after the other and were all answered are one row."
            .to_owned();
    if left_out > 0 {
        let _ = write!(
            html,
            " There were too many for one page: these are the {} that failed first or took longest; {} rows are not here.",
            count(rows.len() as u64),
            count(left_out as u64)
        );
    }
    html.push_str(
        "</p>\n<table><thead><tr><th scope=\"col\" class=\"n\">at ms</th><th scope=\"col\">host</th>\
         <th scope=\"col\">method</th><th scope=\"col\">volume</th><th scope=\"col\" class=\"n\">times</th>\
         <th scope=\"col\" class=\"n\">took ms</th><th scope=\"col\">outcome</th></tr></thead>\n<tbody>\n",
    );
    let mut part = "";
    for row in &rows {
        let now = match row.call.from {
            from if from < 0.0 => "before the migration",
            from if from > story.ended => "after the migration",
            _ => "during the migration",
        };
        if now != part {
            let _ = writeln!(html, "<tr><th colspan=\"7\" scope=\"rowgroup\" class=\"part\">{now}</th></tr>");
            part = now;
        }
        let took = if row.count > 1 {
            format!("{} to {}", ms(row.took.0), ms(row.took.1))
        } else {
            row.to.map_or_else(|| "—".to_owned(), |_| ms(row.took.0))
        };
        let mut outcome = match (row.call.failed, row.to) {
            (true, _) => format!("✗ {}", text(&row.call.answer)),
            (false, None) => "✗ no answer".to_owned(),
            (false, Some(_)) => "answered".to_owned(),
        };
        if let Some(fault) = &row.call.fault {
            let _ = write!(outcome, " (made to fail: {})", text(fault));
        }
        let class = if row.stands_out() { " class=\"bad\"" } else { "" };
        let _ = writeln!(
            html,
            "<tr id=\"c{}\"{class}><td class=\"n\">{}<td>{}<td>{}<td>{}<td class=\"n\">{}<td class=\"n\">{took}\
             <td>{outcome}",
            row.number,
            ms(row.call.from),
            text(&row.call.host),
            text(&row.call.method),
            name(&row.call.volume),
            count(row.count as u64),
        );
    }
    html + "</tbody></table></section>\n"
}
