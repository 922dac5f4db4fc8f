//! The content of a whole chain: as a raw file, and as a number to remember it by.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use tempfile::TempPath;

use super::qemu_img;

const BLOCK: usize = 4096;

/// A raw copy of a disk, made by qemu-img and removed with this value.
#[derive(Debug)]
pub struct RawCopy {
    path: TempPath,
    size: u64,
}

/// What a disk holds, to compare with what another holds at another time.
///
/// Zeroes do not count, whether they are stored, unallocated, or missing because the disk is shorter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(u64);

impl RawCopy {
    /// Copies the content of an image and all that it is based on.
    ///
    /// # Errors
    /// If qemu-img cannot.
    pub fn of(image: &Path) -> Result<Self> {
        let path =
            tempfile::Builder::new().prefix("fx-raw-").tempfile().context("no temporary file")?.into_temp_path();
        qemu_img::to_raw(image, &path)?;
        let size = std::fs::metadata(&path)?.len();
        Ok(Self { path, size })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size in bytes, rounded up to a sector by qemu-img.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Calls back for every stretch of the file that is no hole, in pieces of at most 1 MiB that begin at whole blocks.
    ///
    /// # Errors
    /// If the file cannot be read, or the callback's own.
    pub fn each_piece(&self, mut callback: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        const PIECE: u64 = 1 << 20;
        let file = File::open(&self.path)?;
        let mut buffer = vec![0; PIECE as usize];
        let mut offset = 0;
        while let Some((start, end)) = next_data(&file, offset)? {
            let mut place = start - start % BLOCK as u64;
            while place < end {
                let length = PIECE.min(end - place);
                let part = &mut buffer[..length as usize];
                file.read_exact_at(part, place).with_context(|| format!("cannot read at {place}"))?;
                callback(place, part)?;
                place += length;
            }
            offset = end;
        }
        Ok(())
    }

    /// What it holds.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn fingerprint(&self) -> Result<Fingerprint> {
        let mut sum = 0u64;
        self.each_piece(|offset, data| {
            for (index, block) in data.chunks(BLOCK).enumerate() {
                sum = sum.wrapping_add(of_block(offset / BLOCK as u64 + index as u64, block));
            }
            Ok(())
        })?;
        Ok(Fingerprint(sum))
    }
}

impl Fingerprint {
    /// What an image and all that it is based on hold.
    ///
    /// # Errors
    /// If qemu-img cannot read it.
    pub fn of(image: &Path) -> Result<Self> {
        RawCopy::of(image)?.fingerprint()
    }
}

impl std::fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A block's share of the fingerprint: none if it is zero, else one that depends on its place.
fn of_block(index: u64, block: &[u8]) -> u64 {
    let (words, rest) = block.as_chunks::<8>();
    let mut sum = 0u64;
    let mut seen = 0u64;
    let mut take = |word: u64| {
        seen |= word;
        sum = (sum.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    };
    for word in words {
        take(u64::from_le_bytes(*word));
    }
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    take(u64::from_le_bytes(last));
    // A short last block counts like one that is filled up with zeroes.
    for _ in words.len() + 1..=BLOCK / 8 {
        take(0);
    }
    if seen == 0 { 0 } else { (sum ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0x94d0_49bb_1331_11eb) }
}

/// The next stretch of data from an offset on.
fn next_data(file: &File, offset: u64) -> Result<Option<(u64, u64)>> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    Ok(Some((start, rustix::fs::seek(file, SeekFrom::Hole(start))?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_counts_by_content_and_place_and_zeroes_do_not() {
        let block = [7; BLOCK];
        assert_eq!(of_block(3, &[0; BLOCK]), 0);
        assert_ne!(of_block(3, &block), of_block(4, &block));
        assert_ne!(of_block(3, &block), of_block(3, &[8; BLOCK]));
        let mut filled = [0; BLOCK];
        filled[..13].fill(7);
        assert_eq!(of_block(3, &filled), of_block(3, &[7; 13]));
    }
}
