//! A disk held against what a guest remembers.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::ledger::{Durability, Ledger, Violation};
use super::record::BLOCK;
use crate::nbd::Client;

/// How much is read at once, in bytes.
const CHUNK: u64 = 1 << 20;
/// How many violations are kept word for word.
const VIOLATIONS_KEPT: usize = 16;

/// What came of verifying.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Blocks that had to hold something in particular.
    pub checked: u64,
    /// Blocks that did not hold it.
    pub wrong: u64,
    /// The first of them.
    pub violations: Vec<Violation>,
}

impl Verdict {
    /// Whether every block holds what it must.
    pub fn holds(&self) -> bool {
        self.wrong == 0
    }
}

/// Checks the blocks of a guest's region as they are fed to it.
#[derive(Debug)]
pub struct Verifier<'a> {
    ledger: &'a Ledger,
    durability: Durability,
    verdict: Verdict,
}

impl<'a> Verifier<'a> {
    /// Nothing checked yet.
    pub fn new(ledger: &'a Ledger, durability: Durability) -> Self {
        Self { ledger, durability, verdict: Verdict::default() }
    }

    /// Checks whole blocks that begin at an offset.
    pub fn feed(&mut self, offset: u64, data: &[u8]) {
        for (index, block) in data.chunks(BLOCK as usize).enumerate() {
            match self.ledger.check(offset + index as u64 * BLOCK, block, self.durability) {
                Ok(checked) => self.verdict.checked += u64::from(checked),
                Err(violation) => {
                    self.verdict.checked += 1;
                    self.verdict.wrong += 1;
                    if self.verdict.violations.len() < VIOLATIONS_KEPT {
                        self.verdict.violations.push(violation);
                    }
                }
            }
        }
    }

    /// What came of it.
    pub fn finish(self) -> Verdict {
        self.verdict
    }
}

/// Verifies a disk that is exported.
///
/// # Errors
/// If it cannot be read; what it holds is in the verdict.
pub async fn verify_export(ledger: &Ledger, client: &Client, durability: Durability) -> Result<Verdict> {
    let mut verifier = Verifier::new(ledger, durability);
    let size = client.export().size;
    ensure!(ledger.region().end() <= size, "the disk of {size} bytes is too small for the guest's region");
    for (offset, length) in chunks(ledger) {
        verifier.feed(offset, &client.read(offset, length as u32).await?);
    }
    Ok(verifier.finish())
}

/// Verifies a raw image, such as QEMU's own tools make of any other.
///
/// # Errors
/// If it cannot be read; what it holds is in the verdict.
pub fn verify_raw(ledger: &Ledger, image: &Path, durability: Durability) -> Result<Verdict> {
    let file = File::open(image).with_context(|| format!("cannot open {}", image.display()))?;
    let mut verifier = Verifier::new(ledger, durability);
    let mut buffer = vec![0; CHUNK as usize];
    for (offset, length) in chunks(ledger) {
        let part = &mut buffer[..length as usize];
        file.read_exact_at(part, offset).with_context(|| format!("cannot read {} at {offset}", image.display()))?;
        verifier.feed(offset, part);
    }
    Ok(verifier.finish())
}

fn chunks(ledger: &Ledger) -> impl Iterator<Item = (u64, u64)> + use<> {
    let region = ledger.region();
    (0..region.length.div_ceil(CHUNK)).map(move |index| {
        let offset = region.offset + index * CHUNK;
        (offset, CHUNK.min(region.end() - offset))
    })
}
