//! Calls put together: repeated ones to one row of the table, those too close to be told apart to one bar of a drawing.

use std::collections::BTreeSet;

use super::axis::Axis;
use crate::story::Call;

/// How many rows the table of calls has at most, and how many of these are kept for calls that failed.
pub(super) const ROWS: usize = 400;
const FAILED_ROWS: usize = 200;
/// How many bars a drawing has at most.
const BARS: usize = 250;
/// The smallest width of a bar.
const NARROWEST: f64 = 2.0;

/// One call, or several of one kind that came one after the other and were all answered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row<'a> {
    /// The first of them.
    pub call: &'a Call,
    /// The number of the first of them.
    pub number: usize,
    /// How many they are.
    pub count: usize,
    /// When the last of them ended.
    pub to: Option<f64>,
    /// How long the shortest and the longest took.
    pub took: (f64, f64),
}

/// What is told by a bar.
#[derive(Debug)]
pub(super) struct Bar<'a> {
    /// Where it begins and ends.
    pub x: (f64, f64),
    /// The row of its first call.
    pub row: Row<'a>,
}

fn took(call: &Call) -> f64 {
    call.to.map_or(0.0, |to| to - call.from)
}

/// Whether a call can stand for others of its kind.
fn is_plain(call: &Call) -> bool {
    !call.failed && call.fault.is_none() && call.to.is_some()
}

impl<'a> Row<'a> {
    fn of(number: usize, call: &'a Call) -> Self {
        Self { call, number, count: 1, to: call.to, took: (took(call), took(call)) }
    }

    /// Takes in another call.
    fn join(&mut self, call: &Call) {
        self.count += 1;
        self.to = self.to.into_iter().chain(call.to).max_by(f64::total_cmp);
        self.took = (self.took.0.min(took(call)), self.took.1.max(took(call)));
    }

    /// Whether it is about a call that failed, was made to, or was never answered.
    pub fn stands_out(&self) -> bool {
        !is_plain(self.call)
    }
}

/// Puts together what repeats. Calls that stand out stay alone.
pub(super) fn rows(calls: &[Call]) -> Vec<Row<'_>> {
    let mut rows: Vec<Row<'_>> = Vec::new();
    for (number, call) in calls.iter().enumerate() {
        let same = |row: &Row<'_>| {
            let one = row.call;
            (&one.host, &one.method, &one.volume) == (&call.host, &call.method, &call.volume) && is_plain(one)
        };
        match rows.last_mut() {
            Some(row) if same(row) && is_plain(call) => row.join(call),
            _ => rows.push(Row::of(number, call)),
        }
    }
    rows
}

/// Of too many rows those that stand out, and then those that took longest, in their order; and how many were left out.
pub(super) fn chosen(rows: Vec<Row<'_>>) -> (Vec<Row<'_>>, usize) {
    if rows.len() <= ROWS {
        return (rows, 0);
    }
    let all = rows.len();
    let mut kept: BTreeSet<usize> = (0..all).filter(|place| rows[*place].stands_out()).take(FAILED_ROWS).collect();
    let mut rest: Vec<usize> = (0..all).filter(|place| !rows[*place].stands_out()).collect();
    rest.sort_by(|one, other| rows[*other].took.1.total_cmp(&rows[*one].took.1));
    kept.extend(rest.into_iter().take(ROWS - kept.len()));
    let chosen: Vec<Row<'_>> = kept.into_iter().map(|place| rows[place]).collect();
    let left_out = all - chosen.len();
    (chosen, left_out)
}

/// The bars of several lines of calls, each in the order of their beginnings. Where they are too many, those that are
/// close to each other are one, if none of them stands out.
pub(super) fn bars<'a>(lines: &[Vec<(usize, &'a Call)>], axis: Axis) -> Vec<Vec<Bar<'a>>> {
    let mut gap = 0.5;
    loop {
        let bars: Vec<Vec<Bar<'a>>> = lines.iter().map(|line| line_of_bars(line, axis, gap)).collect();
        if bars.iter().map(Vec::len).sum::<usize>() <= BARS || gap > 1e4 {
            return bars;
        }
        gap *= 2.0;
    }
}

fn line_of_bars<'a>(line: &[(usize, &'a Call)], axis: Axis, gap: f64) -> Vec<Bar<'a>> {
    let mut bars: Vec<Bar<'a>> = Vec::new();
    for (number, call) in line {
        let from = axis.x(call.from);
        // What was never answered lasts as long as can be seen.
        let to = axis.x(call.to.unwrap_or(f64::INFINITY)).max(from + NARROWEST);
        match bars.last_mut() {
            Some(bar) if is_plain(call) && !bar.row.stands_out() && from < bar.x.1 + gap => {
                bar.x.1 = bar.x.1.max(to);
                bar.row.join(call);
            }
            _ => bars.push(Bar { x: (from, to), row: Row::of(*number, call) }),
        }
    }
    // However many failed: the first and the last tell where.
    if gap > 64.0 && bars.len() > BARS / 8 {
        let last = bars.split_off(bars.len() - BARS / 16);
        bars.truncate(BARS / 16);
        bars.extend(last);
    }
    bars
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(method: &str, from: f64, failed: bool) -> Call {
        Call {
            host: "a".into(),
            method: method.into(),
            volume: String::new(),
            from,
            to: Some(from + 1.0),
            failed,
            answer: String::new(),
            fault: None,
        }
    }

    #[test]
    fn repeated_calls_are_one_row_and_one_that_failed_is_its_own() {
        let stat = |from, failed| call("Data.stat", from, failed);
        let calls =
            [stat(0.0, false), stat(5.0, false), stat(9.0, true), stat(12.0, false), call("SR.ls", 14.0, false)];
        let rows = rows(&calls);
        let told: Vec<(usize, usize)> = rows.iter().map(|row| (row.number, row.count)).collect();
        assert_eq!(told, [(0, 2), (2, 1), (3, 1), (4, 1)]);
        assert_eq!((rows[0].to, rows[0].took), (Some(6.0), (1.0, 1.0)));
        assert!(rows[1].stands_out() && !rows[0].stands_out());
    }

    #[test]
    fn of_too_many_rows_those_that_failed_and_the_longest_stay() {
        let mut calls: Vec<Call> = (0..2000)
            .map(|n| call(if n % 2 == 0 { "SR.ls" } else { "SR.stat" }, f64::from(n), n % 500 == 7))
            .collect();
        calls[1234].to = Some(5000.0);
        let (rows, left_out) = chosen(rows(&calls));
        assert_eq!((rows.len(), left_out), (ROWS, 1600));
        assert_eq!(rows.iter().filter(|row| row.call.failed).count(), 4);
        assert!(rows.iter().any(|row| row.number == 1234) && rows.is_sorted_by_key(|row| row.number));
    }

    #[test]
    fn bars_that_are_close_are_one_but_for_what_failed() {
        let calls: Vec<Call> = (0..5000).map(|n| call("Data.stat", f64::from(n), n == 2500)).collect();
        let line: Vec<(usize, &Call)> = calls.iter().enumerate().collect();
        let bars = bars(&[line], Axis::new(0.0, 5000.0)).remove(0);
        assert!(bars.len() <= BARS, "{}", bars.len());
        assert_eq!(bars.iter().map(|bar| bar.row.count).sum::<usize>(), 5000);
        assert!(bars.iter().any(|bar| bar.row.number == 2500 && bar.row.count == 1));
        let failed: Vec<Call> = (0..5000).map(|n| call("Data.stat", f64::from(n), true)).collect();
        let line: Vec<(usize, &Call)> = failed.iter().enumerate().collect();
        assert!(super::bars(&[line], Axis::new(0.0, 5000.0))[0].len() <= BARS);
    }
}
