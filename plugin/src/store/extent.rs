//! Where the used part of a qcow2 file ends, from its reference counts.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Error, Result};

/// Gives the end of the last cluster that is used, in bytes.
///
/// # Errors
///
/// [`Error::Image`] when the file's tables are impossible; else it cannot be read.
pub(super) fn used(path: &Path) -> Result<u64> {
    let file = File::open(path).map_err(Error::on("opening", path))?;
    let read = |offset: u64, length: usize| {
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, offset).map(|()| bytes).map_err(Error::on("reading", path))
    };
    let head = read(0, 104)?;
    let number = |at: usize| head[at..at + 4].iter().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
    let (cluster_bits, clusters, order) = (number(20), number(56), number(96));
    let table = number(48) << 32 | number(52);
    let impossible = |reason: &str| Error::Image { path: path.to_owned(), reason: reason.to_owned() };
    if !(9..=21).contains(&cluster_bits) || order > 6 || clusters > 1 << 12 {
        return Err(impossible("its reference counts cannot be read"));
    }
    let cluster = 1_usize << cluster_bits;
    let counted = (cluster as u64 * 8) >> order;
    let bytes = read(table, usize::try_from(clusters).unwrap_or(0) * cluster)?;
    for (index, entry) in bytes.as_chunks::<8>().0.iter().enumerate().rev() {
        let offset = u64::from_be_bytes(*entry);
        if offset == 0 {
            continue;
        }
        let counts = read(offset, cluster)?;
        if let Some(last) = counts.iter().rposition(|byte| *byte != 0) {
            // At most as many as the bits up to there can count.
            let within = ((last as u64 + 1) * 8).div_ceil(1 << order);
            return Ok((index as u64 * counted + within) << cluster_bits);
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::super::{Blank, Unit};
    use super::*;

    #[test]
    fn the_end_is_that_of_the_last_cluster_whatever_lies_behind() {
        let directory = tempfile::tempdir().unwrap();
        for unit in [Unit::Cluster, Unit::Sector] {
            let path = directory.path().join(format!("{unit:?}.qcow2"));
            Blank { virtual_size: 64 << 20, backing: None, unit }.create(&path).unwrap();
            let io = Command::new("qemu-io").args(["-f", "qcow2", "-c", "write 0 8M"]).arg(&path).output().unwrap();
            assert!(io.status.success());
            let written = std::fs::metadata(&path).unwrap().len();
            let found = used(&path).unwrap();
            assert!(found >= 8 << 20 && found <= written + (256 << 10), "{found} of {written}");
            File::options().write(true).open(&path).unwrap().set_len(1 << 30).unwrap();
            assert_eq!(used(&path).unwrap(), found);
        }
    }
}
