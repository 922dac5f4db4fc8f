//! What a mirror's progress says: whether its peer hangs, and whether the guest outruns the link.

use std::time::{Duration, Instant};

use plugin::mirror::Progress;
use plugin::qemu::graph::Pace;

/// How long what is left may fail to shrink before the guest is slowed.
const CONVERGENCE: Duration = Duration::from_secs(3);

/// What may be left to send when the guest is paused, in seconds of the link: the drain is part of the migration's
/// downtime.
const READY_REST_SECONDS: f64 = 2.0;

/// What may be left in any case, in bytes: requests under way.
const READY_REST_BYTES: f64 = (4 << 20) as f64;

/// What a guest may write in any case: with 32 requests at once none waits for more than a few seconds.
const LEAST: Pace = Pace { bytes: 256 << 10, requests: 8 };

/// The bytes that a mirror sends for the smallest write, QEMU's default granularity.
const MIRROR_BLOCK: f64 = (64 << 10) as f64;

/// How much of the link's speed, as it is kept, comes from the newest look.
const NEWEST: f64 = 0.2;

/// Watches a mirror's progress. Pure: time comes in with each look.
#[derive(Debug)]
pub struct Watch {
    silence: Duration,
    moved: Instant,
    last: (u64, u64, u64, u64),
    least: u64,
    shrunk: Instant,
    looked: Instant,
    bytes_per_second: f64,
    slowed: u32,
}

/// What the supervisor should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Fine,
    /// The guest outruns the link: it is to write no more than this from now on.
    Outrun(Pace),
    /// The peer owes an answer and has been silent for too long: cut it off.
    Silent,
}

impl Watch {
    /// Starts watching now, with the seconds that a peer may be silent.
    pub fn new(now: Instant, silence: Duration) -> Self {
        Self {
            silence,
            moved: now,
            last: (0, 0, 0, 0),
            least: u64::MAX,
            shrunk: now,
            looked: now,
            bytes_per_second: 0.0,
            slowed: 0,
        }
    }

    /// Takes a look at the progress. `answered` counts what moves without the peer; `draining` says that a flush is
    /// owed even when nothing is left to copy.
    pub fn look(&mut self, now: Instant, progress: &Progress, answered: u64, ready: bool, draining: bool) -> Verdict {
        let rest = progress.length.saturating_sub(progress.offset);
        let seen = (progress.sent, progress.received, progress.offset, answered);
        let elapsed = now.duration_since(self.looked).as_secs_f64();
        if elapsed > 0.0 {
            let newest = progress.sent.saturating_sub(self.last.0) as f64 / elapsed;
            // An idle link says nothing of its speed.
            if rest > 0 {
                self.bytes_per_second += (newest - self.bytes_per_second) * NEWEST;
            }
            self.looked = now;
        }
        let owed = rest > 0 || draining || (progress.offset == 0 && !ready);
        if seen != self.last || !owed {
            self.last = seen;
            self.moved = now;
        }
        if now.duration_since(self.moved) >= self.silence {
            return Verdict::Silent;
        }
        // Before the first byte is copied the target is being zeroed, which is not counted as progress.
        let allowed = if ready { (self.bytes_per_second * READY_REST_SECONDS).max(READY_REST_BYTES) } else { 0.0 };
        let at_rest = progress.offset == 0 || rest as f64 <= allowed;
        if rest < self.least || at_rest {
            self.least = if at_rest { u64::MAX } else { rest };
            self.shrunk = now;
        }
        // While nothing moves at all, it is not the guest that is too fast.
        if now.duration_since(self.shrunk) < CONVERGENCE || now.duration_since(self.moved) >= CONVERGENCE {
            return Verdict::Fine;
        }
        // What is left has this long to shrink under the new limits before they are made tighter.
        self.shrunk = now;
        self.least = rest;
        Verdict::Outrun(self.pace())
    }

    /// Gives what the guest may write, less each time: as many bytes as a half of the link carries, and as many requests,
    /// each of which makes a block of the mirror's be sent again.
    fn pace(&mut self) -> Pace {
        self.slowed += 1;
        let bytes = self.bytes_per_second / f64::from(1_u32 << self.slowed.min(31));
        Pace { bytes: (bytes as u64).max(LEAST.bytes), requests: ((bytes / MIRROR_BLOCK) as u64).max(LEAST.requests) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn watch(now: Instant) -> Watch {
        Watch::new(now, 30 * SECOND)
    }

    fn progress(offset: u64, length: u64, sent: u64) -> Progress {
        Progress { offset, length, sent, received: sent / 100, ..Progress::default() }
    }

    #[test]
    fn a_peer_that_moves_bytes_is_never_cut_off_however_slow() {
        let start = Instant::now();
        let mut watch = watch(start);
        for second in 0..1000 {
            let seen = progress(second + 1, 1 << 30, second);
            let now = start + SECOND * second as u32;
            assert_ne!(watch.look(now, &seen, 0, false, false), Verdict::Silent);
        }
    }

    #[test]
    fn a_silent_peer_is_cut_off_and_the_guest_is_not_slowed_for_it() {
        let start = Instant::now();
        let mut watch = watch(start);
        let seen = progress(10, 100, 1000);
        for second in 0..30 {
            assert_eq!(watch.look(start + SECOND * second, &seen, 0, false, false), Verdict::Fine, "{second}");
        }
        assert_eq!(watch.look(start + SECOND * 30, &seen, 0, false, false), Verdict::Silent);
    }

    #[test]
    fn a_peer_that_owes_nothing_may_be_silent_until_something_is_drained() {
        let start = Instant::now();
        let mut watch = watch(start);
        let seen = progress(100, 100, 1000);
        for second in 0..1000 {
            let now = start + SECOND * second;
            assert_eq!(watch.look(now, &seen, 0, true, false), Verdict::Fine);
        }
        let drain = start + SECOND * 999;
        watch.look(drain, &seen, 0, true, true);
        let verdict = watch.look(drain + SECOND * 31, &seen, 0, true, true);
        assert_eq!(verdict, Verdict::Silent);
    }

    #[test]
    fn an_empty_disk_that_is_ready_owes_nothing() {
        let start = Instant::now();
        let mut watch = watch(start);
        for second in 0..100 {
            let now = start + SECOND * second;
            assert_eq!(watch.look(now, &progress(0, 0, 100), 0, true, false), Verdict::Fine);
        }
    }

    #[test]
    fn a_guest_that_outruns_the_link_is_noticed_before_and_after_ready() {
        for (ready, rest) in [(false, 1 << 20), (true, 1 << 30)] {
            let start = Instant::now();
            let mut watch = watch(start);
            let mut verdict = Verdict::Fine;
            for second in 0..4_u64 {
                // What is copied grows, but so does what is to be copied.
                let seen = progress(1000 + second, 1000 + second + rest, second);
                verdict = watch.look(start + SECOND * second as u32, &seen, 0, ready, false);
            }
            assert!(matches!(verdict, Verdict::Outrun(_)), "{ready}");
        }
    }

    #[test]
    fn a_guest_that_still_outruns_the_link_is_slowed_more_and_never_stopped() {
        const LINK: u64 = 64 << 20;
        let start = Instant::now();
        let mut watch = watch(start);
        let mut paces = Vec::new();
        for second in 0..60 {
            let seen = progress(LINK * second, LINK * second + (1 << 30), LINK * second);
            if let Verdict::Outrun(pace) = watch.look(start + SECOND * second as u32, &seen, 0, false, false) {
                paces.push(pace);
            }
        }
        assert!(paces[0].bytes <= LINK / 2 && paces[0].requests <= LINK / 2 / (64 << 10), "{paces:?}");
        assert!(paces.windows(2).all(|two| two[1].bytes <= two[0].bytes && two[1].requests <= two[0].requests));
        assert_eq!(paces.last(), Some(&LEAST));
        // Each time it gets a while to take effect.
        assert!((15..=20).contains(&paces.len()), "{}", paces.len());
    }

    #[test]
    fn a_bulk_copy_that_shrinks_is_left_in_the_background() {
        let start = Instant::now();
        let mut watch = watch(start);
        for second in 0..100_u64 {
            let now = start + SECOND * second as u32;
            let seen = progress(second + 1, 1000, second);
            assert_eq!(watch.look(now, &seen, 0, false, false), Verdict::Fine);
        }
    }
}
