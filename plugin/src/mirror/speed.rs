//! How fast a mirror goes, and when it may be done.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::record::Progress;

/// How long what was seen counts: after so many seconds for a third.
const MEMORY: f64 = 3.0;

/// The least time between two looks.
const LEAST: Duration = Duration::from_millis(100);

/// How fast a mirror goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Speed {
    /// Bytes that are sent in a second.
    pub bytes_per_second: u64,
    /// Seconds until everything was sent once, if it goes on like this; nothing where it does not get on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<u64>,
}

/// Looks at a mirror's progress again and again. Pure: time comes in with each look.
#[derive(Clone, Copy, Debug)]
pub struct Speedometer {
    last: Option<(Instant, u64, f64)>,
    /// Bytes a second.
    bytes: f64,
    /// How much of the whole in a second.
    fraction: f64,
}

impl Default for Speedometer {
    fn default() -> Self {
        Self { last: None, bytes: f64::NAN, fraction: f64::NAN }
    }
}

impl Speedometer {
    /// Takes a look. Nothing is known at the first one.
    pub fn look(&mut self, now: Instant, progress: &Progress) -> Option<Speed> {
        let (sent, fraction) = (progress.sent, progress.fraction());
        match self.last {
            Some((at, bytes, done)) if now.duration_since(at) >= LEAST => {
                let elapsed = now.duration_since(at).as_secs_f64();
                let newest = 1.0 - (-elapsed / MEMORY).exp();
                let mean = |mean: f64, now: f64| if mean.is_nan() { now } else { mean + (now - mean) * newest };
                self.bytes = mean(self.bytes, sent.saturating_sub(bytes) as f64 / elapsed);
                self.fraction = mean(self.fraction, (fraction - done) / elapsed);
                self.last = Some((now, sent, fraction));
            }
            Some(_) => {}
            None => self.last = Some((now, sent, fraction)),
        }
        if self.bytes.is_nan() {
            return None;
        }
        let left = (1.0 - fraction) / self.fraction;
        let is_moving = self.fraction > 0.0 && left.is_finite();
        let seconds_left = if fraction >= 1.0 { Some(0) } else { is_moving.then(|| left.ceil() as u64) };
        Some(Speed { bytes_per_second: self.bytes as u64, seconds_left })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn progress(offset: u64) -> Progress {
        Progress { offset: offset * MIB, length: 1000 * MIB, sent: offset * MIB, ..Progress::default() }
    }

    #[test]
    fn an_even_speed_is_told_with_the_time_that_is_left() {
        let (mut meter, start) = (Speedometer::default(), Instant::now());
        assert_eq!(meter.look(start, &progress(0)), None);
        for second in 1..=60 {
            let speed = meter.look(start + Duration::from_secs(second), &progress(second * 10)).unwrap();
            assert_eq!(speed.bytes_per_second / MIB, 10);
            assert!(speed.seconds_left.unwrap().abs_diff(100 - second) <= 1, "{speed:?}");
        }
    }

    #[test]
    fn a_mirror_that_stands_still_has_no_time_left_to_tell() {
        let (mut meter, start) = (Speedometer::default(), Instant::now());
        meter.look(start, &progress(1));
        let speed = meter.look(start + Duration::from_secs(1), &progress(1)).unwrap();
        assert_eq!(speed, Speed { bytes_per_second: 0, seconds_left: None });
        // What a guest writes makes the rest longer.
        let more = Progress { length: 2000 * MIB, ..progress(1) };
        assert_eq!(meter.look(start + Duration::from_secs(2), &more).unwrap().seconds_left, None);
    }

    #[test]
    fn a_mirror_that_is_done_has_nothing_left() {
        let (mut meter, start) = (Speedometer::default(), Instant::now());
        meter.look(start, &progress(0));
        assert_eq!(meter.look(start + Duration::from_secs(1), &progress(1000)).unwrap().seconds_left, Some(0));
    }
}
