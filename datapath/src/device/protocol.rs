//! FUSE, as much of it as one file needs (Linux `include/uapi/linux/fuse.h`): what the kernel asks, and the answers.

/// The most that is read or written by one request, in bytes: what a kernel allows since 4.20.
pub const MOST: usize = 1 << 20;

/// The length of a request's header.
const HEADER: usize = 40;

/// The length of an answer's header.
pub const ANSWER: usize = 16;

/// The length of what lies between a write request's header and its data.
const WRITE: usize = 40;

/// What has to be read at a time: the longest request.
pub const BUFFER: usize = MOST + HEADER + WRITE + 4096;

/// Where the data of a write request begins.
pub const DATA: usize = HEADER + WRITE;

/// The version of the protocol that is spoken; the kernel's may be older or newer.
const MAJOR: u32 = 7;
const MINOR: u32 = 31;

const ASYNC_READ: u32 = 1;
const BIG_WRITES: u32 = 1 << 5;
const ASYNC_DIO: u32 = 1 << 15;
const MAX_PAGES: u32 = 1 << 22;

/// FOPEN_DIRECT_IO and FOPEN_PARALLEL_DIRECT_WRITES: nothing of the file is kept in memory, and writes wait for no
/// other.
const OPENED: u32 = 1 | (1 << 6);

/// How many requests the kernel may have under way.
const UNDER_WAY: u16 = 256;

/// The one file's number.
const FILE: u64 = 1;

const PAGE: usize = 4096;

/// What the kernel asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// How this process speaks, with the flags that the kernel knows.
    Init { flags: u32 },
    /// What the file is.
    Attributes,
    /// To open it.
    Open,
    /// Bytes of it.
    Read { offset: u64, length: u32 },
    /// To take bytes, which begin at [`DATA`].
    Write { offset: u64, length: u32 },
    /// To make what was written durable.
    Flush,
    /// To make zeroes of a range, which need take no space.
    Zero { offset: u64, length: u64 },
    /// How much space there is.
    Space,
    /// Something that is granted without doing anything.
    Granted,
    /// Something that wants no answer.
    Nothing,
    /// Something that is not known here.
    Unknown,
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its number, for the answer.
    pub number: u64,
    /// What it asks.
    pub asked: Asked,
}

/// Takes a request apart; `None` when it is shorter than it says.
pub fn parse(bytes: &[u8]) -> Option<Request> {
    let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    if word(0)? as usize != bytes.len() {
        return None;
    }
    let asked = match word(4)? {
        2 | 36 | 42 => Asked::Nothing, // FORGET, INTERRUPT, BATCH_FORGET
        3 => Asked::Attributes,
        14 => Asked::Open,
        15 => Asked::Read { offset: long(HEADER + 8)?, length: word(HEADER + 16)? },
        16 => {
            let length = word(HEADER + 16)?;
            if bytes.len() != DATA + length as usize {
                return None;
            }
            Asked::Write { offset: long(HEADER + 8)?, length }
        }
        17 => Asked::Space,
        18 | 38 => Asked::Granted, // RELEASE, DESTROY
        20 => Asked::Flush,
        26 => Asked::Init { flags: word(HEADER + 12)? },
        43 => {
            let mode = word(HEADER + 24)?;
            // PUNCH_HOLE or ZERO_RANGE, and in either case KEEP_SIZE.
            match mode {
                0x3 | 0x11 => Asked::Zero { offset: long(HEADER + 8)?, length: long(HEADER + 16)? },
                _ => Asked::Unknown,
            }
        }
        _ => Asked::Unknown,
    };
    Some(Request { number: long(8)?, asked })
}

/// Makes an answer's header.
pub fn header(number: u64, length: usize, error: i32) -> [u8; ANSWER] {
    let mut bytes = [0; ANSWER];
    bytes[..4].copy_from_slice(&((ANSWER + length) as u32).to_ne_bytes());
    bytes[4..8].copy_from_slice(&(-error).to_ne_bytes());
    bytes[8..].copy_from_slice(&number.to_ne_bytes());
    bytes
}

/// Makes the answer to [`Asked::Init`].
pub fn init(flags: u32) -> Vec<u8> {
    let mut answer = Answer::default();
    answer.words(&[MAJOR, MINOR, MOST as u32]);
    answer.words(&[flags & (ASYNC_READ | BIG_WRITES | ASYNC_DIO | MAX_PAGES)]);
    answer.shorts(&[UNDER_WAY, UNDER_WAY * 3 / 4]);
    // The longest write; times of one nanosecond; the most pages a request.
    answer.words(&[MOST as u32, 1]);
    answer.shorts(&[(MOST / PAGE) as u16, 0]);
    answer.words(&[0; 8]);
    answer.0
}

/// Makes the answer to [`Asked::Attributes`] for a file of `size` bytes.
pub fn attributes(size: u64) -> Vec<u8> {
    let mut answer = Answer::default();
    // They hold for an hour: nothing changes them while the file is there.
    answer.longs(&[3600]);
    answer.words(&[0, 0]);
    answer.longs(&[FILE, size, size / 512, 0, 0, 0]);
    // Times; a regular file of root's for root; one link; root's; the size of a block.
    answer.words(&[0, 0, 0, 0o100_600, 1, 0, 0, 0, PAGE as u32, 0]);
    answer.0
}

/// Makes the answer to [`Asked::Open`].
pub fn opened() -> Vec<u8> {
    let mut answer = Answer::default();
    answer.longs(&[0]);
    answer.words(&[OPENED, 0]);
    answer.0
}

/// Makes the answer to [`Asked::Write`].
pub fn written(length: u32) -> Vec<u8> {
    let mut answer = Answer::default();
    answer.words(&[length, 0]);
    answer.0
}

/// Makes the answer to [`Asked::Space`]: a loop device takes the size of what it discards at a time from it.
pub fn space() -> Vec<u8> {
    let mut answer = Answer::default();
    answer.longs(&[0; 5]);
    answer.words(&[PAGE as u32, 255, PAGE as u32, 0, 0, 0, 0, 0, 0, 0]);
    answer.0
}

/// The fields of an answer, one after the other.
#[derive(Default)]
struct Answer(Vec<u8>);

impl Answer {
    fn shorts(&mut self, values: &[u16]) {
        self.0.extend(values.iter().flat_map(|value| value.to_ne_bytes()));
    }

    fn words(&mut self, values: &[u32]) {
        self.0.extend(values.iter().flat_map(|value| value.to_ne_bytes()));
    }

    fn longs(&mut self, values: &[u64]) {
        self.0.extend(values.iter().flat_map(|value| value.to_ne_bytes()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, rest: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER + rest.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(opcode.to_ne_bytes());
        bytes.extend(9_u64.to_ne_bytes());
        bytes.resize(HEADER, 0);
        bytes.extend(rest);
        bytes
    }

    #[test]
    fn answers_have_the_lengths_of_the_kernels_structures() {
        assert_eq!(
            [init(0).len(), attributes(1).len(), opened().len(), written(1).len(), space().len()],
            [64, 104, 16, 8, 80]
        );
    }

    #[test]
    fn a_write_is_understood_and_one_that_is_cut_off_anywhere_is_not() {
        let mut rest = 0_u64.to_ne_bytes().to_vec();
        rest.extend(4096_u64.to_ne_bytes());
        rest.extend(3_u32.to_ne_bytes());
        rest.resize(WRITE, 0);
        rest.extend(b"abc");
        let bytes = request(16, &rest);
        assert_eq!(parse(&bytes), Some(Request { number: 9, asked: Asked::Write { offset: 4096, length: 3 } }));
        assert_eq!(&bytes[DATA..], b"abc");
        for length in 0..bytes.len() {
            assert_eq!(parse(&bytes[..length]), None);
            let mut shorter = bytes[..length].to_vec();
            if length >= HEADER {
                shorter[..4].copy_from_slice(&(length as u32).to_ne_bytes());
                assert_eq!(parse(&shorter), None, "{length}");
            }
        }
    }

    #[test]
    fn only_what_keeps_the_size_makes_zeroes() {
        for (mode, zeroes) in [(3_u32, true), (0x11, true), (1, false), (0, false), (0x10, false), (8, false)] {
            let mut rest = [0_u64, 512, 1024].map(u64::to_ne_bytes).concat();
            rest.extend(mode.to_ne_bytes());
            rest.extend([0; 4]);
            let expected = if zeroes { Asked::Zero { offset: 512, length: 1024 } } else { Asked::Unknown };
            assert_eq!(parse(&request(43, &rest)).unwrap().asked, expected, "{mode:#x}");
        }
    }
}
