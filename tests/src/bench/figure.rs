//! A figure: what was measured, what it is held against, and the bar that it is to reach.

use serde::Serialize;
use serde::ser::{SerializeStruct, Serializer};

/// What a figure's numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// Seconds.
    Seconds,
    /// Bytes.
    Bytes,
    /// Things counted.
    Count,
}

/// What a figure is to reach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bar {
    /// At most so many times its reference, by their medians.
    Times(f64),
    /// At most so much more than its reference, by their medians.
    More(f64),
    /// At most this, by its median.
    Value(f64),
}

/// Whether a figure reaches its bar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It does.
    Reached,
    /// It does not.
    Missed,
    /// It could not be measured here.
    Skipped,
    /// It has no bar.
    Told,
}

/// Samples of one thing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Samples(pub Vec<f64>);

/// One line of the table.
#[derive(Debug, Clone)]
pub struct Figure {
    /// What it is called in files; unique.
    pub id: String,
    /// What was measured.
    pub what: String,
    /// What its numbers are.
    pub unit: Unit,
    /// The numbers.
    pub samples: Samples,
    /// What it is held against.
    pub against: String,
    /// The numbers of that, from the same run; a constant is one sample. Empty when there is nothing to hold it against.
    pub reference: Samples,
    /// What it is to reach.
    pub bar: Option<Bar>,
    /// Why it could not be measured.
    pub skipped: Option<String>,
    /// What else is to be known of it.
    pub notes: Vec<String>,
}

impl Samples {
    /// The median; zero without samples.
    #[must_use]
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// The smallest; zero without samples.
    #[must_use]
    pub fn low(&self) -> f64 {
        self.quantile(0.0)
    }

    /// The largest; zero without samples.
    #[must_use]
    pub fn high(&self) -> f64 {
        self.quantile(1.0)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value below which a share of the samples lies, between two of them by their distance.
    fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
        let place = share * last as f64;
        let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
        below + (above - below) * place.fract()
    }
}

impl Serialize for Samples {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("Samples", 5)?;
        out.serialize_field("median", &self.median())?;
        out.serialize_field("low", &self.low())?;
        out.serialize_field("high", &self.high())?;
        out.serialize_field("count", &self.0.len())?;
        out.serialize_field("samples", &self.0)?;
        out.end()
    }
}

impl Figure {
    /// A figure without reference and bar.
    pub fn new(id: impl Into<String>, what: impl Into<String>, unit: Unit, samples: Vec<f64>) -> Self {
        Self {
            id: id.into(),
            what: what.into(),
            unit,
            samples: Samples(samples),
            against: String::new(),
            reference: Samples::default(),
            bar: None,
            skipped: None,
            notes: Vec::new(),
        }
    }

    /// A figure that could not be measured here, and why.
    pub fn skipped(id: impl Into<String>, what: impl Into<String>, unit: Unit, bar: Bar, why: String) -> Self {
        Self { bar: Some(bar), skipped: Some(why), ..Self::new(id, what, unit, Vec::new()) }
    }

    /// The same, held against something.
    #[must_use]
    pub fn against(self, what: impl Into<String>, samples: Vec<f64>) -> Self {
        Self { against: what.into(), reference: Samples(samples), ..self }
    }

    /// The same with a bar.
    #[must_use]
    pub fn bar(self, bar: Bar) -> Self {
        Self { bar: Some(bar), ..self }
    }

    /// The same with a remark.
    #[must_use]
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    /// How many times the reference it is, by the medians; nothing without one.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        let reference = self.reference.median();
        (!self.samples.is_empty() && reference > 0.0).then(|| self.samples.median() / reference)
    }

    /// What is compared with the bar: a ratio, a difference or the value itself.
    #[must_use]
    pub fn judged(&self) -> Option<f64> {
        if self.samples.is_empty() {
            return None;
        }
        match self.bar? {
            Bar::Times(_) => self.ratio(),
            Bar::More(_) => (!self.reference.is_empty()).then(|| self.samples.median() - self.reference.median()),
            Bar::Value(_) => Some(self.samples.median()),
        }
    }

    /// Whether it reaches its bar.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        match (self.bar, self.judged()) {
            _ if self.skipped.is_some() => Verdict::Skipped,
            (None, _) => Verdict::Told,
            (Some(bar), Some(judged)) if judged <= bar.limit() => Verdict::Reached,
            (Some(_), _) => Verdict::Missed,
        }
    }
}

impl Bar {
    /// The largest value that reaches it.
    #[must_use]
    pub fn limit(self) -> f64 {
        match self {
            Self::Times(limit) | Self::More(limit) | Self::Value(limit) => limit,
        }
    }
}

impl Serialize for Figure {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("Figure", 12)?;
        out.serialize_field("id", &self.id)?;
        out.serialize_field("what", &self.what)?;
        out.serialize_field("unit", &self.unit)?;
        out.serialize_field("measured", &self.samples)?;
        out.serialize_field("against", &self.against)?;
        out.serialize_field("reference", &self.reference)?;
        out.serialize_field("ratio", &self.ratio())?;
        out.serialize_field("bar", &self.bar)?;
        out.serialize_field("judged", &self.judged())?;
        out.serialize_field("verdict", &self.verdict())?;
        out.serialize_field("skipped", &self.skipped)?;
        out.serialize_field("notes", &self.notes)?;
        out.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(samples: &[f64], reference: &[f64], bar: Bar) -> Figure {
        Figure::new("x", "x", Unit::Seconds, samples.to_vec()).against("y", reference.to_vec()).bar(bar)
    }

    #[test]
    fn medians_lie_between_the_samples_in_the_middle() {
        assert_eq!(Samples(vec![3.0, 1.0, 2.0]).median(), 2.0);
        let even = Samples(vec![4.0, 1.0, 2.0, 3.0]);
        assert_eq!((even.low(), even.median(), even.high()), (1.0, 2.5, 4.0));
        assert_eq!(Samples::default().median(), 0.0);
    }

    #[test]
    fn a_bar_is_reached_up_to_its_limit_and_missed_beyond() {
        for (bar, reached) in [
            (Bar::Times(2.0), true),
            (Bar::Times(1.99), false),
            (Bar::More(1.0), true),
            (Bar::More(0.99), false),
            (Bar::Value(2.0), true),
            (Bar::Value(1.99), false),
        ] {
            let verdict = figure(&[2.0, 9.0, 1.0], &[1.0], bar).verdict();
            assert_eq!(verdict == Verdict::Reached, reached, "{bar:?} {verdict:?}");
        }
    }

    #[test]
    fn what_has_no_samples_or_no_reference_never_reaches_a_bar() {
        assert_eq!(figure(&[], &[1.0], Bar::Times(2.0)).verdict(), Verdict::Missed);
        assert_eq!(figure(&[1.0], &[], Bar::Times(2.0)).verdict(), Verdict::Missed);
        assert_eq!(figure(&[1.0], &[], Bar::More(2.0)).verdict(), Verdict::Missed);
        assert_eq!(figure(&[], &[], Bar::Value(2.0)).verdict(), Verdict::Missed);
        let skipped = Figure::skipped("x", "x", Unit::Seconds, Bar::Value(1.0), "no root".into());
        assert_eq!(skipped.verdict(), Verdict::Skipped);
        assert_eq!(Figure::new("x", "x", Unit::Count, vec![1.0]).verdict(), Verdict::Told);
    }
}
