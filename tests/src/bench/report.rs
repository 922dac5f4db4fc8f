//! What a run found: as a table for people, as JSON with every sample, as charts.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use super::figure::{Bar, Figure, Samples, Unit, Verdict};
use super::machine::Machine;
use super::svg::{self, Bars, Block, Lines};

/// A whole run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What it was made on.
    pub machine: Machine,
    /// Its scale.
    pub scale: String,
    /// Seconds that it took.
    pub seconds: f64,
    /// The load averages at its end.
    pub load_at_end: String,
    /// What was measured, by group.
    pub groups: Vec<Measured>,
}

/// What was measured in a group.
#[derive(Debug, Default, Serialize)]
pub struct Measured {
    /// The group's name.
    pub group: String,
    /// Seconds that it took.
    pub seconds: f64,
    /// The figures.
    pub figures: Vec<Figure>,
    /// Why it ended early, if it did.
    pub failed: Option<String>,
    /// The charts, by the names of their files.
    #[serde(skip)]
    pub charts: Vec<(String, Chart)>,
}

/// A chart of either kind.
#[derive(Debug)]
pub enum Chart {
    /// Bars.
    Bars(Bars),
    /// Lines.
    Lines(Lines),
}

impl Measured {
    /// Adds a figure.
    pub(super) fn add(&mut self, figure: Figure) {
        self.figures.push(figure);
    }

    /// Adds a chart of the figures that are named, each beside its reference, in units of `scale`.
    pub(super) fn chart(&mut self, file: &str, title: &str, unit: (&str, f64), ids: &[&str]) {
        let shown =
            self.figures.iter().filter(|figure| ids.contains(&figure.id.as_str()) && !figure.samples.is_empty());
        let bar = |name: &str, samples: &Samples, colour, limit| svg::Bar {
            name: name.to_owned(),
            value: samples.median() / unit.1,
            spread: (samples.low() / unit.1, samples.high() / unit.1),
            limit,
            colour,
        };
        let block = |figure: &Figure| {
            let reference = figure.reference.median();
            let limit = figure.bar.map(|bar| match bar {
                Bar::Times(times) => times * reference,
                Bar::More(more) => more + reference,
                Bar::Value(value) => value,
            });
            let mut bars = vec![bar("measured", &figure.samples, 0, limit.map(|limit| limit / unit.1))];
            if !figure.reference.is_empty() {
                bars.push(bar("reference", &figure.reference, svg::REFERENCE, None));
            }
            let against =
                if figure.against.is_empty() { String::new() } else { format!(", against {}", figure.against) };
            Block { name: format!("{}{against}", figure.what), bars }
        };
        let blocks = shown.map(block).collect();
        let chart = Bars { title: title.to_owned(), unit: unit.0.to_owned(), blocks };
        self.charts.push((file.to_owned(), Chart::Bars(chart)));
    }
}

impl Chart {
    fn draw(&self) -> String {
        match self {
            Self::Bars(bars) => bars.draw(),
            Self::Lines(lines) => lines.draw(),
        }
    }
}

impl Report {
    /// All figures.
    pub fn figures(&self) -> impl Iterator<Item = &Figure> {
        self.groups.iter().flat_map(|group| &group.figures)
    }

    /// Whether every group could be measured to its end; that a bar was missed is no failure.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.groups.iter().all(|group| group.failed.is_none())
    }

    /// Writes the report as JSON.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, file: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
    }

    /// Draws every chart into a directory, and one of all bars.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn plot(&self, directory: &Path) -> Result<()> {
        std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        let write = |name: &str, text: String| {
            let file = directory.join(format!("{name}.svg"));
            std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
        };
        for (name, chart) in self.groups.iter().flat_map(|group| &group.charts) {
            write(name, chart.draw())?;
        }
        write("bars", self.all_bars().draw())
    }

    /// How much of what is allowed each figure takes.
    fn all_bars(&self) -> Bars {
        let bar = |figure: &Figure| {
            let value = figure.judged()?.max(0.0) / figure.bar?.limit().max(f64::MIN_POSITIVE);
            // A limit of nothing is kept or not.
            let value = value.min(4.0);
            Some(svg::Bar {
                name: figure.id.clone(),
                value,
                spread: (value, value),
                limit: Some(1.0),
                ..svg::Bar::default()
            })
        };
        let block = |group: &Measured| {
            let bars: Vec<_> = group.figures.iter().filter_map(bar).collect();
            (!bars.is_empty()).then(|| Block { name: group.group.clone(), bars })
        };
        Bars {
            title: "Each figure against its bar".to_owned(),
            unit: "share of what is allowed, at most 4".to_owned(),
            blocks: self.groups.iter().filter_map(block).collect(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machine = &self.machine;
        writeln!(f, "{}, {} cpus, {}, Linux {}", machine.cpu, machine.cpus, machine.system, machine.kernel)?;
        writeln!(f, "{}; {} ({})", machine.qemu_img, machine.place, machine.file_system)?;
        let build = if machine.optimised { "release build" } else { "DEBUG BUILD: the times mean nothing" };
        let (load, end, seconds) = (&machine.load, &self.load_at_end, self.seconds);
        writeln!(f, "{build}, scale {}, load {load} → {end}, {seconds:.0} s", self.scale)?;
        for group in &self.groups {
            writeln!(f, "\n{} ({:.0} s)", group.group, group.seconds)?;
            table(f, &group.figures)?;
            if let Some(why) = &group.failed {
                writeln!(f, "  ended early: {why}")?;
            }
        }
        let count = |verdict| self.figures().filter(|figure| figure.verdict() == verdict).count();
        let (reached, missed) = (count(Verdict::Reached), count(Verdict::Missed));
        write!(f, "\n{reached} reached, {missed} missed, {} not measured here", count(Verdict::Skipped))
    }
}

const HEAD: [&str; 5] = ["figure", "measured", "reference", "is", "bar"];

fn table(f: &mut fmt::Formatter<'_>, figures: &[Figure]) -> fmt::Result {
    let rows: Vec<[String; 5]> = figures.iter().map(row).collect();
    let mut widths = HEAD.map(|head| head.chars().count());
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |f: &mut fmt::Formatter<'_>, cells: &[String; 5]| {
        let mut text = String::new();
        for (cell, width) in cells.iter().zip(widths) {
            text.push_str(&format!("  {cell:width$}"));
        }
        writeln!(f, "{}", text.trim_end())
    };
    line(f, &HEAD.map(str::to_owned))?;
    for (row, figure) in rows.iter().zip(figures) {
        line(f, row)?;
        if !figure.against.is_empty() {
            writeln!(f, "    against {}", figure.against)?;
        }
        if let Some(why) = &figure.skipped {
            writeln!(f, "    not measured: {why}")?;
        }
        for note in &figure.notes {
            writeln!(f, "    {note}")?;
        }
    }
    Ok(())
}

fn row(figure: &Figure) -> [String; 5] {
    let spread = |samples: &Samples| match samples.0.len() {
        0 => String::new(),
        1 => show(figure.unit, samples.median()),
        _ => {
            let (median, low, high) = (samples.median(), samples.low(), samples.high());
            format!("{} ({} – {})", show(figure.unit, median), show(figure.unit, low), show(figure.unit, high))
        }
    };
    let is = match (figure.bar, figure.judged()) {
        (Some(Bar::More(_)), Some(more)) => format!("{} more", show(figure.unit, more)),
        (Some(Bar::Value(_)), _) => String::new(),
        _ => figure.ratio().map_or_else(String::new, |ratio| format!("{ratio:.2} ×")),
    };
    let bar = match figure.bar {
        None => String::new(),
        Some(Bar::Times(times)) => format!("≤ {times} × "),
        Some(Bar::More(more)) => format!("≤ {} more ", show(figure.unit, more)),
        Some(Bar::Value(value)) => format!("≤ {} ", show(figure.unit, value)),
    };
    let verdict = match figure.verdict() {
        Verdict::Reached => "reached",
        Verdict::Missed => "MISSED",
        Verdict::Skipped => "not measured",
        Verdict::Told => "",
    };
    [figure.what.clone(), spread(&figure.samples), spread(&figure.reference), is, format!("{bar}{verdict}")]
}

fn show(unit: Unit, value: f64) -> String {
    let negative = if value < 0.0 { "-" } else { "" };
    let size = value.abs();
    let text = match unit {
        Unit::Seconds if size >= 1.0 => format!("{size:.2} s"),
        Unit::Seconds => format!("{:.2} ms", size * 1e3),
        Unit::Bytes => crate::draw::size(size as u64),
        Unit::Count => format!("{size}"),
    };
    format!("{negative}{text}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(figures: Vec<Figure>) -> Report {
        let group = Measured { group: "calls".into(), figures, ..Measured::default() };
        Report {
            machine: Machine::look(Path::new("/tmp")),
            scale: "small".into(),
            seconds: 1.0,
            load_at_end: String::new(),
            groups: vec![group],
        }
    }

    #[test]
    fn a_missed_bar_is_shown_as_missed_and_a_reached_one_as_reached() {
        let slow =
            Figure::new("slow", "a slow call", Unit::Seconds, vec![0.5, 0.7, 0.6]).against("a spawn", vec![0.1]);
        let text = report(vec![slow.clone().bar(Bar::Times(4.0))]).to_string();
        assert!(text.contains("600.00 ms (500.00 ms – 700.00 ms)") && text.contains("6.00 ×"), "{text}");
        assert!(
            text.contains("≤ 4 × MISSED") && text.ends_with("0 reached, 1 missed, 0 not measured here"),
            "{text}"
        );
        let text = report(vec![slow.clone().bar(Bar::Times(6.5))]).to_string();
        assert!(text.contains("≤ 6.5 × reached") && !text.contains("MISSED"), "{text}");
        let text = report(vec![slow.bar(Bar::More(0.45)).note("because")]).to_string();
        assert!(text.contains("500.00 ms more") && text.contains("MISSED") && text.contains("    because"), "{text}");
    }

    #[test]
    fn what_could_not_be_measured_says_why() {
        let skipped = Figure::skipped("x", "onto ext4", Unit::Seconds, Bar::Times(1.25), "not root".into());
        let report = report(vec![skipped]);
        assert!(report.to_string().contains("not measured: not root"), "{report}");
        assert!(report.complete());
    }
}
