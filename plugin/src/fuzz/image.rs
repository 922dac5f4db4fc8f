//! A file in the place of a node's image: its header, and its tables.

use std::io::Write;
use std::path::Path;

use super::judge;
use crate::error::Error;
use crate::id::NodeId;
use crate::qemu::Image;
use crate::store::fuzzed::{Allocation, State};
use crate::store::{Header, MAX_VIRTUAL_SIZE};

/// Where the file is put: in memory where there is such a place.
const MEMORY: &str = "/dev/shm";

/// How many blocks are asked for at once.
const WINDOW: usize = 16;

/// Reads the input as an image.
pub(super) fn run(input: &[u8]) {
    let mut builder = tempfile::Builder::new();
    let builder = builder.prefix("fx-fuzz-");
    let file = if Path::new(MEMORY).is_dir() { builder.tempfile_in(MEMORY) } else { builder.tempfile() };
    let mut file = file.unwrap();
    file.write_all(input).unwrap();
    let path = file.path();
    let refused = |error: Error| {
        assert!(matches!(error, Error::Image { .. }), "{error:?}");
        judge(&error, &path.display().to_string());
    };
    let header = match Header::read(path) {
        Ok(header) => header,
        Err(error) => return refused(error),
    };
    check(&header, input);
    // A tree's record has no larger size, and the header has to have the same.
    if header.virtual_size > MAX_VIRTUAL_SIZE {
        return;
    }
    let image = Image { node: NodeId::random(), path: path.to_owned(), virtual_size: header.virtual_size };
    match Allocation::open(&image) {
        Ok(allocation) => read(&allocation, header.virtual_size).unwrap_or_else(refused),
        Err(error) => refused(error),
    }
}

/// Holds what was made of a header against its bytes.
fn check(header: &Header, input: &[u8]) {
    let number = |at: usize, length: usize| {
        input[at..at + length].iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
    };
    assert_eq!((number(0, 4), number(4, 4)), (0x5146_49fb, 3));
    let cluster_bits = number(20, 4);
    assert!((9..=21).contains(&cluster_bits), "{cluster_bits}");
    assert_eq!(number(24, 8), header.virtual_size);
    assert_eq!((number(32, 4), number(60, 4)), (0, 0), "encrypted, or with snapshots");
    assert_eq!(number(72, 8) & !0b11001, 0, "features");
    assert!(number(72, 8) & 0b10000 == 0 || cluster_bits >= 14, "subclusters of less than a sector");
    let length = number(100, 4);
    assert!((104..=1 << cluster_bits).contains(&length), "a header of {length} bytes");
    for table in [40, 48] {
        let offset = number(table, 8);
        assert!(offset.is_multiple_of(1 << cluster_bits) && offset < 1 << 63, "a table at {offset:#x}");
    }
    if let Some(backing) = &header.backing {
        let (at, count) = (number(8, 8), number(16, 4));
        assert!(length <= at && at + count <= 1 << cluster_bits && (1..=1023).contains(&count));
        let at = usize::try_from(at).unwrap();
        assert_eq!(&input[at..at + backing.len()], backing);
    }
}

/// Asks for blocks at the begin, around the middle and at the end; in parts they are the same.
fn read(allocation: &Allocation, virtual_size: u64) -> Result<(), Error> {
    let blocks = virtual_size.div_ceil(crate::store::BLOCK);
    let is_empty = allocation.is_empty()?;
    for first in [0, blocks / 2, blocks.saturating_sub(WINDOW as u64)] {
        let mut states = [State::Unset; WINDOW];
        allocation.fill(first, &mut states)?;
        for (block, state) in (first..).zip(states) {
            let mut one = [State::Unset];
            allocation.fill(block, &mut one)?;
            assert_eq!(one[0], state, "{block}");
            assert!(state == State::Unset || (block < blocks && allocation.has_tables(block, 1) && !is_empty));
        }
    }
    Ok(())
}
