//! Random choices that can be made again: every failure names the seed.

use std::sync::atomic::{AtomicU64, Ordering};

/// A stream of numbers, xorshift over a seed.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A stream from a seed.
    #[must_use]
    pub fn from_seed(seed: u64) -> Self {
        // Never zero, which would stay zero.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number below a bound.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % bound.max(1)
    }

    /// One of several.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

/// The seed that `CONFORMANCE_SEED` orders, else one that no check had before.
pub fn seed() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let ordered = std::env::var("CONFORMANCE_SEED").ok().and_then(|text| text.parse().ok());
    ordered.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        now.subsec_nanos() as u64 + NEXT.fetch_add(1, Ordering::Relaxed)
    })
}
