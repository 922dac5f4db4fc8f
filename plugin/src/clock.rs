//! Times as they are written for people and in file names, all in UTC.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The months' names, as syslog has them.
const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

const SECONDS_A_DAY: u64 = 86_400;

/// A moment, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Moment {
    year: u64,
    /// From 1.
    month: u64,
    /// From 1.
    day: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Moment {
    /// Takes seconds since 1970 apart. Days are counted from a first of March, behind the day that leap years add (Howard
    /// Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days).
    fn of(seconds: u64) -> Self {
        let days = seconds / SECONDS_A_DAY + 719_468;
        let (era, of_era) = (days / 146_097, days % 146_097);
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let from_march = (5 * of_year + 2) / 153;
        let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
        let of_day = seconds % SECONDS_A_DAY;
        Self {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month,
            day: of_year - (153 * from_march + 2) / 5 + 1,
            hour: of_day / 3600,
            minute: of_day / 60 % 60,
            second: of_day % 60,
        }
    }
}

/// Writes seconds since 1970 for people: `2026-11-23 10:07:45 UTC`.
pub fn for_people(seconds: u64) -> String {
    let Moment { year, month, day, hour, minute, second } = Moment::of(seconds);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

/// Writes a moment as RFC 3339 has it, with microseconds: `2026-11-23T10:07:45.000017+00:00`.
pub fn rfc3339(time: SystemTime) -> String {
    let since = since_1970(time);
    let Moment { year, month, day, hour, minute, second } = Moment::of(since.as_secs());
    let micros = since.subsec_micros();
    format!("{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}+00:00")
}

/// Writes a moment as RFC 3164 has it: `Nov 23 10:07:45`.
pub(crate) fn rfc3164(time: SystemTime) -> String {
    let Moment { month, day, hour, minute, second, .. } = Moment::of(since_1970(time).as_secs());
    let month = usize::try_from(month - 1).ok().and_then(|month| MONTHS.get(month)).unwrap_or(&"Jan");
    format!("{month} {day:2} {hour:02}:{minute:02}:{second:02}")
}

/// Gives the time since 1970; none before that.
pub(crate) fn since_1970(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Writes a duration for people: `47 s`, `3 min 5 s`, `2 h 10 min`, `3 d 4 h`.
pub fn span_for_people(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..SECONDS_A_DAY => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / SECONDS_A_DAY, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_that_date_tells() {
        // date -u -d @<seconds>
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (951_868_799, "2000-02-29 23:59:59 UTC"),
            (1_709_251_199, "2024-02-29 23:59:59 UTC"),
            (1_735_689_599, "2024-12-31 23:59:59 UTC"),
            (1_795_428_465, "2026-11-23 10:07:45 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(for_people(seconds), text);
        }
        let time = UNIX_EPOCH + Duration::new(1_704_067_205, 17_000);
        assert_eq!(rfc3339(time), "2024-01-01T00:00:05.000017+00:00");
        assert_eq!(rfc3164(time), "Jan  1 00:00:05");
    }

    #[test]
    fn durations_are_told_in_two_units() {
        for (seconds, text) in
            [(0, "0 s"), (59, "59 s"), (185, "3 min 5 s"), (7800, "2 h 10 min"), (273_600, "3 d 4 h")]
        {
            assert_eq!(span_for_people(seconds), text);
        }
    }
}
