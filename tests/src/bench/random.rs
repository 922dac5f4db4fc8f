//! Numbers that look random and are the same on every run.

/// George Marsaglia's xorshift64.
pub(super) struct Random(u64);

impl Random {
    /// Begins where a seed says.
    pub(super) fn new(seed: u64) -> Self {
        // Neighbouring seeds begin far apart; never at zero, which would stay zero.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next one, below 2^56.
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 8
    }
}
