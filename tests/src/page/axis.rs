//! The axis of time that all charts of a page share, and lines that keep their extremes when they are thinned.

use std::fmt::Write as _;

use super::markup::{ms, text};
use crate::story::Story;

/// The width of every drawing over time.
pub(super) const WIDTH: f64 = 1160.0;
/// Where its plot begins and ends; names stand before it, sums behind.
pub(super) const LEFT: f64 = 180.0;
pub(super) const RIGHT: f64 = 955.0;
/// The height of the strip of phases on top, and of the numbers below.
pub(super) const TOP: f64 = 24.0;
pub(super) const BOTTOM: f64 = 26.0;

/// A character's width in the small type of the charts, about.
const CHARACTER: f64 = 6.6;

/// A span of time, drawn from [`LEFT`] to [`RIGHT`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Axis {
    from: f64,
    to: f64,
}

impl Axis {
    /// From one millisecond to another; never empty.
    pub fn new(from: f64, to: f64) -> Self {
        Self { from, to: to.max(from + 1.0) }
    }

    /// Whether a moment is on it.
    pub fn has(self, at: f64) -> bool {
        (self.from..=self.to).contains(&at)
    }

    /// Where a moment is; one before or behind it is at its end.
    pub fn x(self, at: f64) -> f64 {
        LEFT + ((at - self.from) / (self.to - self.from)).clamp(0.0, 1.0) * (RIGHT - LEFT)
    }

    /// Round moments, about eight of them.
    fn ticks(self) -> Vec<f64> {
        let rough = (self.to - self.from) / 8.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|n| n * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
        let first = (self.from / step).ceil();
        (0..12).map(|n| (first + f64::from(n)) * step).take_while(|at| *at <= self.to).collect()
    }

    /// What lies behind a plot of some height: lines at round moments with their numbers, and what holds of all charts of
    /// the migration, if this is one: its phases, and the time in which the VM did not run.
    pub fn ground(self, height: f64, story: Option<&Story>) -> String {
        let mut svg = String::new();
        let bottom = TOP + height;
        for at in self.ticks() {
            let x = self.x(at);
            let _ = write!(
                svg,
                "<path class=\"grid\" d=\"M{x:.1} {TOP}V{bottom:.1}\"/><text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" \
                 text-anchor=\"middle\">{}</text>",
                bottom + 15.0,
                ms(at).trim_end_matches(".0")
            );
        }
        let _ = write!(svg, "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\">ms</text>", RIGHT + 26.0, bottom + 15.0);
        let Some(story) = story else { return svg };
        for (index, phase) in story.phases.iter().enumerate() {
            let (from, to) = (self.x(phase.from), self.x(phase.to));
            let name = text(&phase.name);
            let parity = index % 2;
            let _ = write!(
                svg,
                "<rect class=\"phase{parity}\" x=\"{from:.1}\" y=\"2\" width=\"{:.1}\" height=\"16\">\
                 <title>{name}, {} to {} ms</title></rect>",
                (to - from).max(0.5),
                ms(phase.from),
                ms(phase.to)
            );
            if (to - from) > phase.name.chars().count() as f64 * CHARACTER + 4.0 {
                let middle = f64::midpoint(from, to);
                let _ = write!(
                    svg,
                    "<text class=\"tick\" x=\"{middle:.1}\" y=\"14\" text-anchor=\"middle\">{name}</text>"
                );
            }
            let _ = write!(svg, "<path class=\"edge\" d=\"M{from:.1} 2V{bottom:.1}\"/>");
        }
        if let Some(pause) = story.pause {
            let judged = pause.to - pause.judged;
            for (from, to, pattern) in [(pause.from, judged, "down"), (judged, pause.to, "judged")] {
                let (x, end) = (self.x(from), self.x(to));
                if to > from {
                    let _ = write!(
                        svg,
                        "<rect class=\"{pattern}\" x=\"{x:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{height:.1}\" \
                         fill=\"url(#{pattern})\"/>",
                        (end - x).max(1.0)
                    );
                }
            }
        }
        svg
    }
}

/// A drawing over time, with what it is for those who do not see it.
pub(super) fn drawing(height: f64, label: &str, role: &str, content: &str) -> String {
    let height = TOP + height + BOTTOM;
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"{role}\" aria-label=\"{}\">{content}</svg>\n",
        text(label)
    )
}

/// Of all points of a line that fall into one of so many columns the first, the lowest, the highest and the last.
pub(super) fn thinned(points: &[(f64, f64)], columns: usize) -> Vec<(f64, f64)> {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return Vec::new() };
    if points.len() <= columns * 2 || last.0 <= first.0 {
        return points.to_vec();
    }
    let column = |point: &(f64, f64)| ((point.0 - first.0) / (last.0 - first.0) * columns as f64) as usize;
    let mut thin = Vec::new();
    for part in points.chunk_by(|one, other| column(one) == column(other)) {
        let mut kept = vec![0, part.len() - 1];
        let places = || part.iter().enumerate();
        kept.extend(places().min_by(|one, other| one.1.1.total_cmp(&other.1.1)).map(|(place, _)| place));
        kept.extend(places().max_by(|one, other| one.1.1.total_cmp(&other.1.1)).map(|(place, _)| place));
        kept.sort_unstable();
        kept.dedup();
        thin.extend(kept.into_iter().map(|place| part[place]));
    }
    thin
}

/// The points of a line as a path's data.
pub(super) fn path(points: &[(f64, f64)]) -> String {
    let mut data = String::new();
    for (index, (x, y)) in points.iter().enumerate() {
        let _ = write!(data, "{}{x:.1} {y:.1}", if index == 0 { "M" } else { "L" });
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thinned_line_keeps_its_extremes_its_ends_and_its_order() {
        let wave = |n: usize| (n as f64, if n == 70_001 { 9.0 } else { (n as f64 / 50.0).sin() });
        let line: Vec<(f64, f64)> = (0..100_000).map(wave).collect();
        let thin = thinned(&line, 200);
        assert!(thin.len() <= 804, "{}", thin.len());
        assert!(thin.contains(&line[0]) && thin.contains(&line[99_999]) && thin.contains(&line[70_001]));
        assert!(thin.is_sorted_by(|one, other| one.0 < other.0));
        assert_eq!(thinned(&line[..300], 200), line[..300]);
        assert!(thinned(&[], 9).is_empty());
    }

    #[test]
    fn ticks_are_round_and_on_the_axis() {
        assert_eq!(Axis::new(0.0, 7300.0).ticks(), [0.0, 1e3, 2e3, 3e3, 4e3, 5e3, 6e3, 7e3]);
        for axis in [Axis::new(0.0, 0.0), Axis::new(-531.0, -0.4), Axis::new(0.0, 9e6), Axis::new(90.0, 97.0)] {
            let ticks = axis.ticks();
            assert!((4..=11).contains(&ticks.len()) && ticks.iter().all(|at| axis.has(*at)), "{axis:?} {ticks:?}");
        }
    }
}
