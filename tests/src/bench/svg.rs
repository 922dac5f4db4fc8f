//! Bars and lines as SVG: small, self-contained, on a white ground.

use std::fmt::Write as _;

/// A chart of horizontal bars, in blocks of some bars each.
#[derive(Debug, Clone, Default)]
pub struct Bars {
    /// What it shows.
    pub title: String,
    /// What the numbers are.
    pub unit: String,
    /// The blocks, from top to bottom.
    pub blocks: Vec<Block>,
}

/// Some bars under one name.
#[derive(Debug, Clone, Default)]
pub struct Block {
    /// The name.
    pub name: String,
    /// The bars.
    pub bars: Vec<Bar>,
}

/// One bar, with the spread of its samples.
#[derive(Debug, Clone, Default)]
pub struct Bar {
    /// What it is.
    pub name: String,
    /// How long it is.
    pub value: f64,
    /// The smallest and the largest sample.
    pub spread: (f64, f64),
    /// What it may be at most, if it has a bar to reach; drawn as a mark.
    pub limit: Option<f64>,
    /// Which colour it has.
    pub colour: usize,
}

/// A chart of lines over a common axis.
#[derive(Debug, Clone, Default)]
pub struct Lines {
    /// What it shows.
    pub title: String,
    /// What the horizontal axis is.
    pub x: String,
    /// What the vertical axis is.
    pub y: String,
    /// Whether both axes are logarithmic.
    pub logarithmic: bool,
    /// Names and points.
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
}

const COLOURS: [&str; 6] = ["#3b7dd8", "#d9822b", "#2f9e6e", "#8a63c9", "#c9456b", "#a0a0a8"];
/// The colour of what something is held against.
pub(super) const REFERENCE: usize = 5;
const MISSED: &str = "#c9302c";
const WIDTH: f64 = 760.0;
const LEFT: f64 = 210.0;
const RIGHT: f64 = 90.0;
const BAR: f64 = 16.0;
const STYLE: &str = "text{font:12px sans-serif;fill:#444}.title{font-size:15px;font-weight:bold}.name{font-weight:bold}\
                     .grid{stroke:#ddd}.spread{stroke:#222;stroke-opacity:.6}.limit{stroke:#000;stroke-width:2}";

impl Bars {
    /// Draws it.
    #[must_use]
    pub fn draw(&self) -> String {
        let bars = self.blocks.iter().flat_map(|block| &block.bars);
        let most = bars.clone().map(|bar| bar.spread.1.max(bar.value).max(bar.limit.unwrap_or(0.0)));
        let most = most.fold(0.0, f64::max).max(f64::MIN_POSITIVE);
        let count = bars.count();
        let height = 70.0 + count as f64 * (BAR + 4.0) + self.blocks.len() as f64 * 30.0;
        let mut svg = Svg::new(WIDTH, height);
        svg.text(10.0, 22.0, "title", "start", &format!("{}, {}", self.title, self.unit));
        let at = |value: f64| LEFT + value / most * (WIDTH - LEFT - RIGHT);
        for step in 0..=4 {
            let value = most * f64::from(step) / 4.0;
            svg.line((at(value), 36.0), (at(value), height - 28.0), "grid");
            svg.text(at(value), height - 12.0, "tick", "middle", &number(value));
        }
        let mut y = 40.0;
        for block in &self.blocks {
            svg.text(10.0, y + 14.0, "name", "start", &block.name);
            y += 22.0;
            for bar in &block.bars {
                let missed = bar.limit.is_some_and(|limit| bar.value > limit);
                let colour = if missed { MISSED } else { COLOURS[bar.colour % COLOURS.len()] };
                svg.text(LEFT - 8.0, y + 12.0, "label", "end", &bar.name);
                svg.rectangle(LEFT, y, (at(bar.value) - LEFT).max(1.0), BAR, colour);
                let middle = y + BAR / 2.0;
                svg.line((at(bar.spread.0), middle), (at(bar.spread.1), middle), "spread");
                if let Some(limit) = bar.limit {
                    svg.line((at(limit), y - 2.0), (at(limit), y + BAR + 2.0), "limit");
                }
                svg.text(at(bar.spread.1.max(bar.value)) + 6.0, y + 12.0, "value", "start", &number(bar.value));
                y += BAR + 4.0;
            }
            y += 8.0;
        }
        svg.end()
    }
}

impl Lines {
    /// Draws it. On logarithmic axes points that are not above zero are left out.
    #[must_use]
    pub fn draw(&self) -> String {
        const HEIGHT: f64 = 380.0;
        let (top, bottom, left, right) = (50.0, HEIGHT - 50.0, 70.0, WIDTH - 170.0);
        let scaled = |value: f64| if self.logarithmic { value.log10() } else { value };
        let drawn = |(x, y): &&(f64, f64)| !self.logarithmic || (*x > 0.0 && *y > 0.0);
        let points: Vec<_> = self.lines.iter().flat_map(|(_, points)| points.iter().filter(drawn)).collect();
        let range = |values: &mut dyn Iterator<Item = f64>| {
            let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
            let low = if self.logarithmic { low.floor() } else { 0.0 };
            let high = if self.logarithmic { high.ceil() } else { high };
            if high > low { (low, high) } else { (low, low + 1.0) }
        };
        let (x_low, x_high) = range(&mut points.iter().map(|point| scaled(point.0)));
        let (y_low, y_high) = range(&mut points.iter().map(|point| scaled(point.1)));
        let at = |(x, y): (f64, f64)| {
            let x = left + (scaled(x) - x_low) / (x_high - x_low) * (right - left);
            (x, bottom - (scaled(y) - y_low) / (y_high - y_low) * (bottom - top))
        };
        let mut svg = Svg::new(WIDTH, HEIGHT);
        svg.text(10.0, 22.0, "title", "start", &self.title);
        let back = |value: f64| if self.logarithmic { 10f64.powf(value) } else { value };
        for (low, high, vertical) in [(x_low, x_high, false), (y_low, y_high, true)] {
            let steps = if self.logarithmic { (high - low).round().clamp(1.0, 8.0) } else { 5.0 };
            for step in 0..=steps as u32 {
                let value = low + (high - low) * f64::from(step) / steps;
                let place = f64::from(step) / steps;
                if vertical {
                    let y = bottom - place * (bottom - top);
                    svg.line((left, y), (right, y), "grid");
                    svg.text(left - 8.0, y + 4.0, "tick", "end", &number(back(value)));
                } else {
                    let x = left + place * (right - left);
                    svg.line((x, top), (x, bottom), "grid");
                    svg.text(x, bottom + 18.0, "tick", "middle", &number(back(value)));
                }
            }
        }
        svg.text(f64::midpoint(left, right), HEIGHT - 10.0, "name", "middle", &self.x);
        svg.text(10.0, 42.0, "name", "start", &self.y);
        for (index, (name, points)) in self.lines.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let places: Vec<_> = points.iter().filter(drawn).map(|point| at(*point)).collect();
            svg.path(&places, colour);
            let y = top + 14.0 + index as f64 * 20.0;
            svg.rectangle(right + 16.0, y - 10.0, 12.0, 12.0, colour);
            svg.text(right + 34.0, y, "label", "start", name);
        }
        svg.end()
    }
}

/// The text of a drawing; writing to a text cannot fail.
struct Svg(String);

impl Svg {
    fn new(width: f64, height: f64) -> Self {
        let mut text = String::new();
        let _ = write!(
            text,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
             height=\"{height:.0}\">\n<style>{STYLE}</style>\n"
        );
        let mut svg = Self(text);
        svg.rectangle(0.0, 0.0, width, height, "#ffffff");
        svg
    }

    fn text(&mut self, x: f64, y: f64, class: &str, anchor: &str, text: &str) {
        let text = escaped(text);
        let _ = writeln!(
            self.0,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\" text-anchor=\"{anchor}\">{text}</text>"
        );
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), class: &str) {
        let ((x1, y1), (x2, y2)) = (from, to);
        let _ =
            writeln!(self.0, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" class=\"{class}\"/>");
    }

    fn rectangle(&mut self, x: f64, y: f64, width: f64, height: f64, colour: &str) {
        let _ = writeln!(
            self.0,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
        );
    }

    fn path(&mut self, places: &[(f64, f64)], colour: &str) {
        let points: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let points = points.join(" ");
        let _ =
            writeln!(self.0, "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>");
        for (x, y) in places {
            let _ = writeln!(self.0, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>");
        }
    }

    fn end(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// A number with three digits that mean something.
pub(super) fn number(value: f64) -> String {
    let text = match value.abs() {
        0.0 => return "0".to_owned(),
        v if v >= 100.0 => return format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 0.1 => format!("{value:.2}"),
        v if v >= 0.001 => format!("{value:.4}"),
        _ => return format!("{value:.1e}"),
    };
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Whether a drawing is well-formed XML, as far as these drawings use XML: tags that close each other in order,
/// attributes in double quotes, no bare `&` or `<`.
///
/// # Errors
/// What is wrong, and about where.
pub fn well_formed(svg: &str) -> Result<(), String> {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = svg;
    let (mut elements, mut roots) = (0, 0);
    while let Some(start) = rest.find('<') {
        plain(&rest[..start])?;
        let end = rest[start..].find('>').ok_or("a tag without end")? + start;
        let tag = &rest[start + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            let opened = open.pop();
            if opened != Some(name) {
                return Err(format!("</{name}> ends {opened:?}"));
            }
            continue;
        }
        let (tag, alone) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
        let (name, attributes) = tag.split_once(' ').unwrap_or((tag, ""));
        if name.is_empty() || !name.chars().all(char::is_alphanumeric) {
            return Err(format!("<{tag}> has no name"));
        }
        attributes_of(attributes).map_err(|wrong| format!("<{tag}>: {wrong}"))?;
        elements += 1;
        roots += u32::from(open.is_empty());
        if !alone {
            open.push(name);
        }
    }
    plain(rest)?;
    match (open.last(), elements, roots) {
        (Some(name), ..) => Err(format!("<{name}> is not closed")),
        (None, 0, _) => Err("there is nothing in it".to_owned()),
        (None, _, 1) => Ok(()),
        (None, ..) => Err("it has several roots".to_owned()),
    }
}

fn plain(text: &str) -> Result<(), String> {
    for (at, _) in text.match_indices('&') {
        if !["&amp;", "&lt;", "&gt;"].iter().any(|entity| text[at..].starts_with(entity)) {
            return Err(format!("a bare & in {text:?}"));
        }
    }
    Ok(())
}

fn attributes_of(mut text: &str) -> Result<(), String> {
    while !text.trim_start().is_empty() {
        let (name, rest) = text.trim_start().split_once("=\"").ok_or("an attribute without a value")?;
        if name.is_empty() || name.contains([' ', '"']) {
            return Err(format!("the attribute {name:?}"));
        }
        let (value, rest) = rest.split_once('"').ok_or("a value without an end")?;
        plain(value)?;
        if value.contains("NaN") || value.contains("inf") {
            return Err(format!("{name} is {value}"));
        }
        text = rest;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chart_is_well_formed_even_an_empty_one() {
        let bar = |value: f64| Bar { name: "a < b & c".into(), value, spread: (value, value), ..Bar::default() };
        let block = Block { name: "x".into(), bars: vec![bar(0.0), Bar { limit: Some(0.5), ..bar(1.0) }] };
        let bars = Bars { title: "t".into(), unit: "ms".into(), blocks: vec![block] };
        well_formed(&bars.draw()).unwrap();
        assert!(bars.draw().contains(MISSED) && bars.draw().contains("a &lt; b &amp; c"));
        well_formed(&Bars::default().draw()).unwrap();
        for logarithmic in [false, true] {
            let lines = vec![("l".to_owned(), vec![(10.0, 1.0), (0.0, 2.0), (1000.0, 0.5)])];
            let lines = Lines { logarithmic, lines, ..Lines::default() };
            well_formed(&lines.draw()).unwrap();
            well_formed(&Lines { lines: Vec::new(), ..lines }.draw()).unwrap();
        }
    }

    #[test]
    fn what_is_not_well_formed_is_noticed() {
        for wrong in [
            "",
            "<svg>",
            "<svg></a>",
            "<svg/><svg/>",
            "<svg>&</svg>",
            "<svg a=1/>",
            "<svg x=\"NaN\"/>",
            "<svg a=\"&\"/>",
        ] {
            assert!(well_formed(wrong).is_err(), "{wrong}");
        }
    }
}
