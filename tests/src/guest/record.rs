//! A record: one block that says which it is and proves that it is whole.

/// Bytes of a record.
pub const BLOCK: u64 = 4096;

const WORDS: usize = BLOCK as usize / 8;
const MAGIC: u64 = u64::from_le_bytes(*b"guestrec");

/// What a block was found to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// A whole record of this guest, for this place.
    Record(u64),
    /// Nothing but zeroes.
    Zeroes,
    /// A whole record that belongs elsewhere: another place or another guest.
    Stray {
        /// Its number.
        number: u64,
        /// The place it was written for.
        offset: u64,
    },
    /// Neither; a torn record among others.
    Other,
}

/// Makes the record of a number for a place.
pub fn make(number: u64, offset: u64, seed: u64) -> Vec<u8> {
    let mut block = Vec::with_capacity(BLOCK as usize);
    let mut sum = Checksum::new();
    let mut put = |word: u64| {
        sum.add(word);
        block.extend_from_slice(&word.to_le_bytes());
    };
    put(MAGIC);
    put(number);
    put(offset);
    put(seed);
    let mut word = number ^ offset.rotate_left(32) ^ seed;
    for _ in 0..WORDS - 5 {
        word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        put(word);
    }
    let total = sum.total();
    block.extend_from_slice(&total.to_le_bytes());
    block
}

/// Says what a block holds.
pub fn read(block: &[u8], offset: u64, seed: u64) -> Found {
    let Some(first) = word_at(block, 0) else { return Found::Other };
    if first == 0 && block.iter().all(|byte| *byte == 0) {
        return Found::Zeroes;
    }
    if first != MAGIC || block.len() != BLOCK as usize {
        return Found::Other;
    }
    let mut sum = Checksum::new();
    for chunk in block[..block.len() - 8].as_chunks().0 {
        sum.add(u64::from_le_bytes(*chunk));
    }
    match (word_at(block, WORDS - 1), word_at(block, 1), word_at(block, 2), word_at(block, 3)) {
        (Some(total), Some(number), Some(place), Some(owner)) if total == sum.total() => {
            if (place, owner) == (offset, seed) {
                Found::Record(number)
            } else {
                Found::Stray { number, offset: place }
            }
        }
        _ => Found::Other,
    }
}

fn word_at(block: &[u8], index: usize) -> Option<u64> {
    block.get(index * 8..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
}

/// Fowler, Noll and Vo's FNV-1a, over words.
struct Checksum(u64);

impl Checksum {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    }

    fn total(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_known_by_its_number_and_place() {
        let block = make(7, 8192, 3);
        assert_eq!(block.len() as u64, BLOCK);
        assert_eq!(read(&block, 8192, 3), Found::Record(7));
        assert_eq!(read(&block, 4096, 3), Found::Stray { number: 7, offset: 8192 });
        assert_eq!(read(&block, 8192, 4), Found::Stray { number: 7, offset: 8192 });
        assert_eq!(read(&[0; 4096], 8192, 3), Found::Zeroes);
    }

    #[test]
    fn a_torn_record_is_none() {
        let (old, new) = (make(7, 0, 3), make(8, 0, 3));
        for cut in [16, 512, 2048, 4088] {
            let torn = [&new[..cut], &old[cut..]].concat();
            assert_eq!(read(&torn, 0, 3), Found::Other, "torn at {cut}");
        }
        let mut bad = old;
        bad[1000] ^= 1;
        assert_eq!(read(&bad, 0, 3), Found::Other);
    }
}
