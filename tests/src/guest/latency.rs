//! How long a guest's commands took: longest, percentiles and a series over time.

use std::time::Duration;

use serde::Serialize;

/// Buckets a power of two; a percentile is told to a sixteenth of its value.
const FINENESS: u64 = 16;
/// The length of one moment of the series.
const MOMENT: Duration = Duration::from_millis(100);

/// Latencies, summed up.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Latency {
    /// The longest, in seconds.
    pub max_seconds: f64,
    /// Half were as short as this, in seconds.
    pub p50_seconds: f64,
    /// 99 of 100 were.
    pub p99_seconds: f64,
    /// 999 of 1,000 were.
    pub p999_seconds: f64,
    /// Tenths of a second in which any command ended.
    #[serde(skip)]
    pub series: Vec<Moment>,
}

/// A tenth of a second of a guest's life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Moment {
    /// Seconds from the guest's first start to its beginning.
    pub at_seconds: f64,
    /// Commands that ended in it.
    pub commands: u64,
    /// The longest that any of them took, in seconds.
    pub max_seconds: f64,
    /// Half of them were as short as this, in seconds.
    pub p50_seconds: f64,
    /// 99 of 100 of them were.
    pub p99_seconds: f64,
}

/// How many commands took how long.
#[derive(Debug, Default)]
struct Counts {
    buckets: Vec<u64>,
    count: u64,
    max: Duration,
}

/// Collects latencies in a few kilobytes, however many there are.
#[derive(Debug, Default)]
pub struct Histogram {
    all: Counts,
    /// Those of the last moment.
    last: Counts,
    series: Vec<(u64, Moment)>,
}

impl Counts {
    fn add(&mut self, took: Duration) {
        let bucket = bucket_of(took.as_micros() as u64);
        if self.buckets.len() <= bucket {
            self.buckets.resize(bucket + 1, 0);
        }
        self.buckets[bucket] += 1;
        self.count += 1;
        self.max = self.max.max(took);
    }

    fn percentile(&self, share: f64) -> f64 {
        let wanted = (self.count as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted && seen > 0 {
                return (top_of(bucket) as f64 / 1e6).min(self.max.as_secs_f64());
            }
        }
        0.0
    }

    /// A moment that began at so many seconds and has these commands.
    fn moment(&self, at_seconds: f64) -> Moment {
        Moment {
            at_seconds,
            commands: self.count,
            max_seconds: self.max.as_secs_f64(),
            p50_seconds: self.percentile(0.5),
            p99_seconds: self.percentile(0.99),
        }
    }
}

impl Histogram {
    /// Takes in one command: when it ended, since the first start, and how long it took.
    pub fn add(&mut self, at: Duration, took: Duration) {
        self.all.add(took);
        let index = (at.as_millis() / MOMENT.as_millis()) as u64;
        // Commands end in the order of time but for the moment when two writers race for the lock.
        if self.series.last().is_none_or(|(last, _)| *last < index) {
            let ended = std::mem::take(&mut self.last);
            if let Some((_, moment)) = self.series.last_mut() {
                *moment = ended.moment(moment.at_seconds);
            }
            let at_seconds = index as f64 * MOMENT.as_secs_f64();
            self.series.push((index, Moment { at_seconds, ..Moment::default() }));
        }
        self.last.add(took);
    }

    /// Sums up; `waiting` is how long the oldest unfinished command has waited.
    pub fn summary(&self, waiting: Duration) -> Latency {
        let mut series: Vec<Moment> = self.series.iter().map(|(_, moment)| *moment).collect();
        if let Some(moment) = series.last_mut() {
            *moment = self.last.moment(moment.at_seconds);
        }
        Latency {
            max_seconds: self.all.max.max(waiting).as_secs_f64(),
            p50_seconds: self.all.percentile(0.5),
            p99_seconds: self.all.percentile(0.99),
            p999_seconds: self.all.percentile(0.999),
            series,
        }
    }
}

fn bucket_of(micros: u64) -> usize {
    if micros < FINENESS {
        return micros as usize;
    }
    let shift = micros.ilog2() - FINENESS.ilog2();
    (u64::from(shift) * FINENESS + (micros >> shift)) as usize
}

/// The largest number of microseconds in a bucket.
fn top_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < 2 * FINENESS {
        return bucket;
    }
    let shift = bucket / FINENESS - 1;
    ((bucket % FINENESS + FINENESS + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bucket_ends_where_the_next_begins() {
        for micros in (0..5000).chain([1 << 20, (1 << 30) + 12345, u64::from(u32::MAX)]) {
            let bucket = bucket_of(micros);
            assert!(micros <= top_of(bucket), "{micros}");
            assert!(bucket == 0 || micros > top_of(bucket - 1), "{micros}");
        }
    }

    #[test]
    fn percentiles_and_the_longest_are_told() {
        let mut histogram = Histogram::default();
        for micros in 1..=1000u64 {
            histogram.add(Duration::from_millis(micros), Duration::from_micros(micros));
        }
        let latency = histogram.summary(Duration::ZERO);
        assert_eq!(latency.max_seconds, 0.001);
        assert!((0.0005..0.00054).contains(&latency.p50_seconds), "{latency:?}");
        assert!((0.00099..=0.001).contains(&latency.p99_seconds), "{latency:?}");
        assert_eq!(latency.series.len(), 11);
        assert_eq!(latency.series.iter().map(|moment| moment.commands).sum::<u64>(), 1000);
        let worst: Vec<f64> = latency.series.iter().map(|moment| moment.max_seconds).collect();
        assert!((worst[0] - 0.000_099).abs() < 1e-9 && worst.is_sorted() && worst[10] == 0.001, "{worst:?}");
        let in_order = |m: &Moment| m.p50_seconds <= m.p99_seconds && m.p99_seconds <= m.max_seconds;
        assert!(latency.series.iter().all(in_order), "{latency:?}");
        assert!((0.000_95..=0.000_99).contains(&latency.series[9].p50_seconds), "{latency:?}");
        assert_eq!(histogram.summary(Duration::from_secs(3)).max_seconds, 3.0);
        assert_eq!(Histogram::default().summary(Duration::ZERO), Latency::default());
    }
}
