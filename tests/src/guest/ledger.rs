//! What a guest remembers of each block: the last acknowledged record, and all that may be there instead.

use super::record::{self, BLOCK, Found};
use crate::plan::Extent;

/// What a command left in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// The record of this number.
    Record(u64),
    /// Zeroes.
    Zeroes,
    /// Zeroes, or what was there before.
    Trimmed,
}

/// Which writes must have survived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Every acknowledged one: after a migration, a suspension, an orderly stop.
    Acknowledged,
    /// Every one that a flush covered: after the storage daemon was killed.
    Flushed,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    mark: Mark,
    /// The how-manieth command it was.
    order: u64,
    /// The how-manieth acknowledged command it was; `None` while in flight, and for ever if it failed.
    acknowledged: Option<u64>,
}

impl Entry {
    /// What is there without any command of this guest.
    fn known(mark: Mark) -> Self {
        Self { mark, order: 0, acknowledged: Some(0) }
    }
}

/// The memory of one guest.
#[derive(Debug, Clone)]
pub struct Ledger {
    region: Extent,
    seed: u64,
    flushes: bool,
    blocks: Vec<Vec<Entry>>,
    /// Whether nothing is forgotten.
    keeps: bool,
    begun: u64,
    acknowledged: u64,
    /// Commands up to this how-manieth acknowledged one are covered by a flush.
    flushed: u64,
}

/// A block that does not hold what it must.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Where the block begins, in bytes.
    pub offset: u64,
    /// What it may hold.
    pub allowed: Vec<Mark>,
    /// What it holds.
    pub found: Found,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "block at {}: {:?} found, one of {:?} expected", self.offset, self.found, self.allowed)
    }
}

impl Ledger {
    /// A guest that has written nothing; without flushes what is older than an acknowledged command is forgotten at once.
    pub(super) fn new(region: Extent, seed: u64, flushes: bool) -> Self {
        let blocks = vec![Vec::new(); (region.length / BLOCK) as usize];
        Self { region, seed, flushes, blocks, keeps: false, begun: 0, acknowledged: 0, flushed: 0 }
    }

    /// The memory of a guest of blank disk: it knows of every block of the region that it is zero.
    pub fn blank(region: Extent, seed: u64) -> Self {
        let mut ledger = Self::new(Extent { length: 0, ..region }, seed, true);
        ledger.grow(region.length);
        ledger
    }

    /// Notes that the disk has grown, so that the region has this many bytes now; what is new is zero.
    pub fn grow(&mut self, length: u64) {
        self.region.length = length;
        self.blocks.resize((length / BLOCK) as usize, vec![Entry::known(Mark::Zeroes)]);
    }

    /// Has everything remembered from now on, or no more than is needed to judge the disk.
    pub(super) fn keep(&mut self, keeps: bool) {
        self.keeps = keeps;
    }

    /// What a snapshot holds that was taken when a guest remembered no less than `before` and no more than `after`, and
    /// forgot nothing in between.
    pub fn between(before: &Self, after: &Self) -> Self {
        let mut blocks = before.blocks.clone();
        for (entries, later) in blocks.iter_mut().zip(&after.blocks) {
            let base = base(entries, u64::MAX);
            entries.drain(..base.unwrap_or_default());
            entries.extend(later.iter().filter(|entry| entry.order > before.begun));
            for (index, entry) in entries.iter_mut().enumerate() {
                *entry = Entry { order: 0, acknowledged: (index == 0 && base.is_some()).then_some(0), ..*entry };
            }
        }
        Self { blocks, keeps: false, begun: 0, acknowledged: 0, flushed: 0, ..before.clone() }
    }

    /// Notes what a block holds that nobody writes to any more: it may hold nothing else from now on.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn settle(&mut self, offset: u64, data: &[u8]) -> Result<(), Violation> {
        self.check(offset, data, Durability::Acknowledged)?;
        let mark = match record::read(data, offset, self.seed) {
            Found::Record(number) => Mark::Record(number),
            _ => Mark::Zeroes,
        };
        let place = offset.checked_sub(self.region.offset).map(|place| (place / BLOCK) as usize);
        if let Some(entries) =
            place.and_then(|place| self.blocks.get_mut(place)).filter(|entries| !entries.is_empty())
        {
            *entries = vec![Entry::known(mark)];
        }
        Ok(())
    }

    /// Notes that all is durable: the disk was closed in an orderly way.
    pub(super) fn closed(&mut self) {
        self.flushed = self.acknowledged;
    }

    /// The bytes that the guest writes to.
    pub fn region(&self) -> Extent {
        self.region
    }

    /// How many blocks the guest has touched.
    pub fn touched(&self) -> usize {
        self.blocks.iter().filter(|entries| !entries.is_empty()).count()
    }

    /// Whether the guest may have changed a byte.
    pub fn may_have_changed(&self, offset: u64) -> bool {
        let block = offset.checked_sub(self.region.offset).map(|place| (place / BLOCK) as usize);
        block.and_then(|block| self.blocks.get(block)).is_some_and(|entries| !entries.is_empty())
    }

    /// Notes a command before it is sent.
    pub(super) fn begin(&mut self, block: usize, mark: Mark) {
        let flushed = if self.flushes { self.flushed } else { u64::MAX };
        let entries = &mut self.blocks[block];
        if !self.keeps
            && let Some(base) = base(entries, flushed)
        {
            entries.drain(..base);
        }
        self.begun += 1;
        entries.push(Entry { mark, order: self.begun, acknowledged: None });
    }

    /// Notes that the block's last command was acknowledged.
    pub(super) fn acknowledge(&mut self, block: usize) {
        self.acknowledged += 1;
        if let Some(entry) = self.blocks[block].last_mut() {
            entry.acknowledged = Some(self.acknowledged);
        }
    }

    /// What a flush that is sent now will cover.
    pub(super) fn coverage(&self) -> u64 {
        self.acknowledged
    }

    /// Notes that a flush of that coverage was acknowledged.
    pub(super) fn flushed(&mut self, coverage: u64) {
        self.flushed = self.flushed.max(coverage);
    }

    /// Notes that what no flush covered may be lost: it counts as in flight for ever.
    pub(super) fn crashed(&mut self) {
        for entry in self.blocks.iter_mut().flatten() {
            entry.acknowledged = entry.acknowledged.filter(|ordinal| *ordinal <= self.flushed);
        }
    }

    /// Checks what a block holds; true if it had to hold anything in particular.
    ///
    /// # Errors
    /// If it holds something else.
    pub fn check(&self, offset: u64, data: &[u8], durability: Durability) -> Result<bool, Violation> {
        let Some(entries) = offset
            .checked_sub(self.region.offset)
            .and_then(|place| self.blocks.get((place / BLOCK) as usize))
            .filter(|entries| !entries.is_empty())
        else {
            return Ok(false);
        };
        let limit = match durability {
            Durability::Acknowledged => u64::MAX,
            Durability::Flushed => self.flushed,
        };
        // Nothing is known of a block that no command has surely reached: it may be as it was before the guest.
        let Some(base) = base(entries, limit) else { return Ok(false) };
        let found = record::read(data, offset, self.seed);
        let fits = |mark: &Mark| match (mark, found) {
            (Mark::Record(number), Found::Record(there)) => *number == there,
            (Mark::Zeroes | Mark::Trimmed, Found::Zeroes) => true,
            _ => false,
        };
        let allowed: Vec<Mark> = entries[base..].iter().map(|entry| entry.mark).collect();
        if allowed.iter().any(fits) { Ok(true) } else { Err(Violation { offset, allowed, found }) }
    }
}

/// The last entry that surely replaced all before it, among those acknowledged up to a limit.
fn base(entries: &[Entry], limit: u64) -> Option<usize> {
    entries
        .iter()
        .rposition(|entry| entry.mark != Mark::Trimmed && entry.acknowledged.is_some_and(|ordinal| ordinal <= limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> Ledger {
        Ledger::new(Extent { offset: 8192, length: 4 * BLOCK }, 1, true)
    }

    fn holds(ledger: &Ledger, number: u64, durability: Durability) -> bool {
        ledger.check(8192, &record::make(number, 8192, 1), durability).is_ok()
    }

    #[test]
    fn an_acknowledged_record_must_be_there_and_one_in_flight_may() {
        let mut ledger = ledger();
        assert_eq!(ledger.check(8192, &[1; 4096], Durability::Acknowledged), Ok(false));
        ledger.begin(0, Mark::Record(1));
        assert_eq!(ledger.check(8192, &[1; 4096], Durability::Acknowledged), Ok(false));
        ledger.acknowledge(0);
        ledger.begin(0, Mark::Record(2));
        assert!(holds(&ledger, 1, Durability::Acknowledged) && holds(&ledger, 2, Durability::Acknowledged));
        assert!(ledger.check(8192, &[0; 4096], Durability::Acknowledged).is_err());
        ledger.acknowledge(0);
        assert!(!holds(&ledger, 1, Durability::Acknowledged) && holds(&ledger, 2, Durability::Acknowledged));
        assert!(ledger.may_have_changed(8192 + 4095) && !ledger.may_have_changed(8192 + 4096));
        assert!(!ledger.may_have_changed(0) && !ledger.may_have_changed(1 << 40));
    }

    #[test]
    fn a_crash_may_take_back_what_no_flush_covered() {
        let mut ledger = ledger();
        ledger.begin(0, Mark::Record(1));
        ledger.acknowledge(0);
        let coverage = ledger.coverage();
        ledger.begin(0, Mark::Record(2));
        ledger.acknowledge(0);
        ledger.flushed(coverage);
        ledger.begin(0, Mark::Record(3));
        for number in [1, 2, 3] {
            assert!(holds(&ledger, number, Durability::Flushed), "record {number}");
        }
        assert!(!holds(&ledger, 1, Durability::Acknowledged));
        ledger.flushed(ledger.coverage());
        assert!(!holds(&ledger, 1, Durability::Flushed) && holds(&ledger, 2, Durability::Flushed));
    }

    #[test]
    fn what_a_crash_may_have_taken_is_never_asked_for_again() {
        let mut ledger = ledger();
        for number in [1, 2] {
            ledger.begin(0, Mark::Record(number));
            ledger.acknowledge(0);
            if number == 1 {
                ledger.flushed(ledger.coverage());
            }
        }
        ledger.crashed();
        ledger.flushed(ledger.coverage());
        assert!(holds(&ledger, 1, Durability::Acknowledged) && holds(&ledger, 2, Durability::Acknowledged));
        ledger.begin(0, Mark::Record(3));
        ledger.acknowledge(0);
        assert!(!holds(&ledger, 1, Durability::Acknowledged) && holds(&ledger, 3, Durability::Acknowledged));
    }

    #[test]
    fn a_trimmed_block_holds_zeroes_or_what_was_there() {
        let mut ledger = ledger();
        ledger.begin(0, Mark::Record(1));
        ledger.acknowledge(0);
        ledger.begin(0, Mark::Trimmed);
        ledger.acknowledge(0);
        assert!(holds(&ledger, 1, Durability::Acknowledged));
        assert_eq!(ledger.check(8192, &[0; 4096], Durability::Acknowledged), Ok(true));
        assert!(!holds(&ledger, 2, Durability::Acknowledged));
    }

    #[test]
    fn a_snapshot_holds_what_was_there_at_one_moment_and_keeps_it() {
        let mut guest = Ledger::blank(Extent { offset: 8192, length: BLOCK }, 1);
        guest.begin(0, Mark::Record(1));
        guest.acknowledge(0);
        guest.keep(true);
        let before = guest.clone();
        for number in [2, 3] {
            guest.begin(0, Mark::Record(number));
            guest.acknowledge(0);
            guest.flushed(guest.coverage());
        }
        let mut snapshot = Ledger::between(&before, &guest);
        guest.begin(0, Mark::Record(4));
        assert!([1, 2, 3].iter().all(|number| holds(&snapshot, *number, Durability::Flushed)));
        assert!(!holds(&snapshot, 4, Durability::Acknowledged));
        assert!(snapshot.check(8192, &[0; 4096], Durability::Acknowledged).is_err());
        assert!(snapshot.settle(8192, &record::make(4, 8192, 1)).is_err());
        snapshot.settle(8192, &record::make(2, 8192, 1)).unwrap();
        assert!(holds(&snapshot, 2, Durability::Acknowledged) && !holds(&snapshot, 3, Durability::Acknowledged));
    }

    #[test]
    fn a_blank_disk_is_known_to_be_zero_also_where_it_grows() {
        let mut ledger = Ledger::blank(Extent { offset: 0, length: BLOCK }, 1);
        ledger.grow(2 * BLOCK);
        assert_eq!(ledger.check(4096, &[0; 4096], Durability::Flushed), Ok(true));
        assert!(ledger.check(4096, &[1; 4096], Durability::Flushed).is_err());
    }

    #[test]
    fn memory_stays_bounded_with_and_without_flushes() {
        for flushes in [true, false] {
            let mut ledger = Ledger::new(Extent { offset: 0, length: BLOCK }, 1, flushes);
            for number in 0..1000 {
                ledger.begin(0, Mark::Record(number));
                ledger.acknowledge(0);
                if flushes && number % 10 == 0 {
                    ledger.flushed(ledger.coverage());
                }
            }
            assert!(ledger.blocks[0].len() <= 12);
        }
    }
}
