//! What went over each connection, and how fast.

use std::fmt::Write as _;

use super::axis::{Axis, LEFT, RIGHT, TOP, drawing, path, thinned};
use super::markup::{count, ms, name, shortened};
use crate::draw::size;
use crate::story::{Mirror, Story};

/// How many connections are drawn, and how many are in the table.
const DRAWN: usize = 16;
const LISTED: usize = 120;
/// Those of one drawing, which is to fit on a sheet of paper.
const TOGETHER: usize = 8;
/// The height of one of them.
const STRIP: f64 = 46.0;
/// Rates are averages over at least this many milliseconds.
const AT_LEAST: f64 = 50.0;
/// How finely a line is drawn.
const COLUMNS: usize = 150;

/// The section about mirrors; nothing if there was none.
pub(super) fn section(story: &Story, axis: Axis) -> String {
    let mirrors = &story.mirrors;
    if mirrors.is_empty() {
        return "<section id=\"mirrors\"><h2>Mirrors</h2><p>No connection to the destination was ever opened.</p>\
                </section>\n"
            .to_owned();
    }
    let rates: Vec<Vec<(f64, f64)>> = mirrors.iter().map(rates).collect();
    let peak = rates.iter().flatten().map(|(_, rate)| *rate).fold(1.0, f64::max);
    let mut html = format!(
        "<section id=\"mirrors\"><h2>Mirrors</h2>\n<p class=\"note\">Filled: bytes a second, over at least {AT_LEAST} ms \
         each, all on one scale that ends at {}/s. Line: bytes sent so far, of what the mirror sent in all. Triangle: \
         xapi learns that the destination has everything.",
        size(peak as u64)
    );
    if mirrors.len() > DRAWN {
        let _ = write!(html, " The first {DRAWN} of {} are drawn.", count(mirrors.len() as u64));
    }
    html.push_str("</p>\n");
    let drawn: Vec<(&Mirror, &Vec<(f64, f64)>)> = mirrors.iter().zip(&rates).take(DRAWN).collect();
    for part in drawn.chunks(TOGETHER) {
        let height = part.len() as f64 * STRIP;
        let mut svg = axis.ground(height, Some(story));
        for (index, (mirror, rates)) in part.iter().enumerate() {
            svg.push_str(&strip(mirror, rates, peak, axis, TOP + index as f64 * STRIP));
        }
        let drawn = drawing(height, "Bytes and rate over time; the table below has the sums", "img", &svg);
        let _ = writeln!(html, "<figure>{drawn}</figure>");
    }
    html + &table(mirrors, &rates) + "</section>\n"
}

/// The rate over time in bytes a second, as steps: two points for each part of the time.
fn rates(mirror: &Mirror) -> Vec<(f64, f64)> {
    let mut marks = vec![(mirror.from, 0)];
    let mut pending = None;
    for sample in &mirror.samples {
        let mark = (sample.at, sample.bytes);
        if marks.last().is_none_or(|last| mark.0 - last.0 >= AT_LEAST) {
            marks.push(mark);
            pending = None;
        } else {
            pending = Some(mark);
        }
    }
    if let Some(end) = pending {
        // The end is too close to what was marked last, and becomes it.
        if marks.len() > 1 {
            marks.pop();
        }
        marks.push(end);
    }
    let steps = marks.windows(2).flat_map(|pair| {
        let ((from, before), (to, after)) = (pair[0], pair[1]);
        let rate = after.saturating_sub(before) as f64 / (to - from).max(0.1) * 1e3;
        [(from, rate), (to, rate)]
    });
    steps.collect()
}

fn strip(mirror: &Mirror, rates: &[(f64, f64)], peak: f64, axis: Axis, top: f64) -> String {
    let (bottom, high) = (top + STRIP - 4.0, STRIP - 12.0);
    let mut svg = format!("<path class=\"base\" d=\"M{LEFT} {bottom:.1}H{RIGHT}\"/>");
    let places: Vec<(f64, f64)> =
        thinned(rates, COLUMNS).iter().map(|(at, rate)| (axis.x(*at), bottom - rate / peak * high)).collect();
    if let (Some(first), Some(last)) = (places.first(), places.last()) {
        let _ = write!(
            svg,
            "<path class=\"rate\" d=\"{}L{:.1} {bottom:.1}L{:.1} {bottom:.1}Z\"/>",
            path(&places),
            last.0,
            first.0
        );
    }
    let sent: Vec<(f64, f64)> = mirror.samples.iter().map(|sample| (sample.at, sample.bytes as f64)).collect();
    let so_far: Vec<(f64, f64)> = thinned(&sent, COLUMNS)
        .iter()
        .map(|(at, bytes)| (axis.x(*at), bottom - bytes / (mirror.sent.max(1) as f64) * high))
        .collect();
    let _ = write!(svg, "<path class=\"so-far\" d=\"{}\"/>", path(&so_far));
    if let Some(complete) = mirror.complete {
        let x = axis.x(complete);
        let _ = write!(
            svg,
            "<path class=\"mark\" d=\"M{x:.1} {:.1}l-5 9h10z\"><title>complete at {} ms</title></path>",
            bottom - 9.0,
            ms(complete)
        );
    }
    let fastest = rates.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
    let (label, small, end) = (top + 18.0, top + 33.0, RIGHT + 8.0);
    let _ = write!(
        svg,
        "<text class=\"label\" x=\"{before:.1}\" y=\"{label:.1}\" text-anchor=\"end\">{}</text>\
         <text class=\"tick\" x=\"{before:.1}\" y=\"{small:.1}\" text-anchor=\"end\">to {}</text>\
         <text class=\"sum\" x=\"{end:.1}\" y=\"{label:.1}\">{}</text>\
         <text class=\"tick\" x=\"{end:.1}\" y=\"{small:.1}\">at most {}/s</text>",
        shortened(&mirror.volume, 22),
        shortened(&mirror.destination, 20),
        size(mirror.sent),
        size(fastest as u64),
        before = LEFT - 8.0,
    );
    svg
}

fn table(mirrors: &[Mirror], rates: &[Vec<(f64, f64)>]) -> String {
    let mut html = "<table><thead><tr><th scope=\"col\">volume</th><th scope=\"col\">to</th>\
        <th scope=\"col\" class=\"n\">at ms</th><th scope=\"col\" class=\"n\">complete at ms</th>\
        <th scope=\"col\" class=\"n\">last byte at ms</th><th scope=\"col\" class=\"n\">sent</th>\
        <th scope=\"col\" class=\"n\">came back</th><th scope=\"col\" class=\"n\">at most</th></tr></thead>\n<tbody>\n"
        .to_owned();
    for (mirror, rates) in mirrors.iter().zip(rates).take(LISTED) {
        let fastest = rates.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
        let _ = writeln!(
            html,
            "<tr><td>{}<td>{}<td class=\"n\">{}<td class=\"n\">{}<td class=\"n\">{}<td class=\"n\">{}\
             <td class=\"n\">{}<td class=\"n\">{}/s",
            name(&mirror.volume),
            name(&mirror.destination),
            ms(mirror.from),
            mirror.complete.map_or_else(|| "never".to_owned(), ms),
            mirror.samples.last().map_or_else(|| "—".to_owned(), |last| ms(last.at)),
            size(mirror.sent),
            size(mirror.received),
            size(fastest as u64),
        );
    }
    html.push_str("</tbody></table>\n");
    if mirrors.len() > LISTED {
        let rest = mirrors[LISTED..].iter().map(|mirror| mirror.sent).sum();
        let _ = writeln!(
            html,
            "<p class=\"note\">{} more are not listed; they sent {}.</p>",
            count((mirrors.len() - LISTED) as u64),
            size(rest)
        );
    }
    html
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::story::Sent;

    #[test]
    fn rates_add_up_to_what_was_sent_however_close_the_samples_are() {
        let at = [(100.0, 0), (110.0, 1000), (230.0, 3000), (360.0, 3000), (480.0, 9000), (480.1, 9500)];
        let samples: Vec<Sent> = at.into_iter().map(|(at, bytes)| Sent { at, bytes }).collect();
        let mirror = Mirror {
            volume: "v".into(),
            destination: "d".into(),
            from: 100.0,
            complete: None,
            samples,
            sent: 9500,
            received: 0,
        };
        let rates = rates(&mirror);
        let bytes: f64 = rates.chunks(2).map(|step| (step[1].0 - step[0].0) / 1e3 * step[0].1).sum();
        assert!((bytes - 9500.0).abs() < 1e-6, "{rates:?}");
        assert!(rates.iter().all(|(_, rate)| *rate < 60_000.0), "{rates:?}");
    }
}
