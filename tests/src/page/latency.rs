//! What guests felt: percentiles and the worst over time, and by phase.

use std::fmt::Write as _;

use super::axis::{Axis, LEFT, RIGHT, TOP, drawing, path, thinned};
use super::markup::{count, ms, name};
use crate::report::Report;
use crate::story::{Felt, Guest, Story};

/// How many guests are drawn.
const DRAWN: usize = 3;
const HEIGHT: f64 = 190.0;
/// How finely a line is drawn.
const COLUMNS: usize = 200;
/// A line is broken where nothing ended for so many milliseconds.
const GAP: f64 = 250.0;

/// What a line shows of a moment.
type Value = fn(&Felt) -> f64;

const LINES: [(&str, &str, Value); 3] =
    [("worst", "worst", |felt| felt.worst), ("p99", "99 of 100", |felt| felt.p99), ("p50", "half", |felt| felt.p50)];

/// The section about guests.
pub(super) fn section(report: &Report, story: &Story, axis: Axis) -> String {
    let written: Vec<&Guest> = story.guests.iter().filter(|guest| !guest.moments.is_empty()).collect();
    let mut html = "<section id=\"latency\"><h2>Guest latency</h2>\n".to_owned();
    if written.is_empty() {
        return html + "<p>No guest wrote.</p></section>\n";
    }
    html.push_str(
        "<p class=\"note\">How long the guest’s commands of 4 KiB took, by the tenth of a second in which they ended; the \
         scale is logarithmic. A line is broken where none ended.",
    );
    if written.len() > DRAWN {
        let _ = write!(html, " The first {DRAWN} of {} guests are shown.", count(written.len() as u64));
    }
    html.push_str("</p>\n");
    for guest in written.iter().take(DRAWN) {
        let caption = format!("Commands of the guest on {}", guest.disk);
        let drawn = drawing(HEIGHT, &caption, "img", &chart(guest, story, axis));
        let disk = name(&guest.disk);
        let _ = write!(
            html,
            "<figure><figcaption>Guest on {disk}</figcaption>\n{drawn}</figure>\n{}",
            table(guest, story)
        );
    }
    for account in &report.guests {
        let latency = &account.latency;
        let _ = writeln!(
            html,
            "<p>{} commands acknowledged in {:.1} s of writing, {} failed: half took up to {} ms, 99 of 100 up to {} ms, \
             999 of 1,000 up to {} ms, the longest {} ms.</p>",
            count(account.acknowledged),
            account.seconds,
            count(account.failed),
            ms(latency.p50_seconds * 1e3),
            ms(latency.p99_seconds * 1e3),
            ms(latency.p999_seconds * 1e3),
            ms(latency.max_seconds * 1e3),
        );
    }
    html + "</section>\n"
}

fn chart(guest: &Guest, story: &Story, axis: Axis) -> String {
    let mut svg = axis.ground(HEIGHT, Some(story));
    let moments: Vec<Felt> = guest.moments.iter().copied().filter(|felt| axis.has(felt.at)).collect();
    let values = moments.iter().flat_map(|felt| [felt.worst, felt.p50]).map(|value| value.max(0.01));
    let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v.log10()), high.max(v.log10())));
    let (low, high) = if low > high { (-1.0, 1.0) } else { (low.floor(), high.ceil().max(low.floor() + 1.0)) };
    let bottom = TOP + HEIGHT;
    let y = |value: f64| bottom - (value.max(0.01).log10() - low) / (high - low) * (HEIGHT - 8.0);
    for power in low as i32..=high as i32 {
        let value = 10f64.powi(power);
        let (place, number) = (y(value), if power < 0 { format!("{value}") } else { count(value as u64) });
        let _ = write!(
            svg,
            "<path class=\"grid\" d=\"M{LEFT} {place:.1}H{RIGHT}\"/><text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" \
             text-anchor=\"end\">{number} ms</text>",
            LEFT - 8.0,
            place + 4.0
        );
    }
    for (index, (class, label, value)) in LINES.into_iter().enumerate() {
        let points: Vec<(f64, f64)> = moments.iter().map(|felt| (felt.at, value(felt))).collect();
        for part in points.chunk_by(|one, other| other.0 - one.0 <= GAP) {
            // A moment alone is seen as a dot, which a line of one point would not be.
            let mut places: Vec<(f64, f64)> =
                thinned(part, COLUMNS).iter().map(|(at, v)| (axis.x(*at), y(*v))).collect();
            if let [(x, place)] = places[..] {
                places.push((x + 2.0, place));
            }
            let _ = write!(svg, "<path class=\"{class}\" d=\"{}\"/>", path(&places));
        }
        let (place, most) = (TOP + 16.0 + index as f64 * 34.0, points.iter().map(|(_, v)| *v).fold(0.0, f64::max));
        let (start, end) = (RIGHT + 8.0, RIGHT + 34.0);
        let _ = write!(
            svg,
            "<path class=\"{class}\" d=\"M{start:.1} {:.1}H{end:.1}\"/><text class=\"sum\" x=\"{:.1}\" y=\"{place:.1}\">\
             {label}</text><text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\">at most {} ms</text>",
            place - 4.0,
            end + 5.0,
            end + 5.0,
            place + 14.0,
            ms(most)
        );
    }
    svg
}

/// The guest by phase; a moment counts to the phase in which it began.
fn table(guest: &Guest, story: &Story) -> String {
    let mut html = "<table><thead><tr><th scope=\"col\">phase</th><th scope=\"col\" class=\"n\">commands</th>\
        <th scope=\"col\" class=\"n\">a second</th><th scope=\"col\" class=\"n\">worst p99, ms</th>\
        <th scope=\"col\" class=\"n\">worst, ms</th></tr></thead>\n<tbody>\n"
        .to_owned();
    let before = [("before the migration".to_owned(), f64::MIN, 0.0)].into_iter();
    let phases = story.phases.iter().map(|phase| (phase.name.clone(), phase.from, phase.to));
    for (phase, from, to) in before.chain(phases).chain([("after the migration".to_owned(), story.ended, f64::MAX)]) {
        let own: Vec<&Felt> = guest.moments.iter().filter(|felt| (from..to).contains(&felt.at)).collect();
        let commands: u64 = own.iter().map(|felt| felt.commands).sum();
        if commands == 0 && (from < 0.0 || to == f64::MAX) {
            continue;
        }
        let most = |value: Value| own.iter().map(|felt| value(felt)).fold(0.0, f64::max);
        // Moments last a tenth of a second.
        let pace = if own.is_empty() { 0 } else { commands * 10 / own.len() as u64 };
        let [p99, worst] = [most(|felt| felt.p99), most(|felt| felt.worst)]
            .map(|value| if commands == 0 { "—".to_owned() } else { ms(value) });
        let _ = writeln!(
            html,
            "<tr><td>{}<td class=\"n\">{}<td class=\"n\">{}<td class=\"n\">{p99}<td class=\"n\">{worst}",
            super::text(&phase),
            count(commands),
            count(pace),
        );
    }
    html + "</tbody></table>\n"
}
