//! Blank qcow2 files: a header, one block of reference counts and one empty first-level table, written by ourselves.
//!
//! ```text
//!   cluster 0        1                2                     3 …
//!   header, names    refcount table   refcounts of these    first-level table, all zero
//! ```
//!
//! It is what `qemu-img create` makes, without the process that it takes, which is longer than all else that a call
//! does. What is zero is left out of the file. The format is QEMU's docs/interop/qcow2.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{Error, Result};
use crate::record;

/// What a file remembers of what was written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Clusters of 64 KiB, QEMU's own choice. Where a part of one is written, the rest is filled from what lies below at
    /// that time.
    Cluster,
    /// Sectors of 512 bytes: subclusters (QEMU's `extended_l2`), a 32nd of a cluster of 16 KiB.
    Sector,
}

/// A blank file that is to be made.
#[derive(Clone, Copy, Debug)]
pub struct Blank<'a> {
    /// The size that a guest sees, in bytes.
    pub virtual_size: u64,
    /// The backing string, the name of a qcow2 file in the same directory; that need not be there.
    pub backing: Option<&'a str>,
    /// What it remembers.
    pub unit: Unit,
}

/// The length of the header's fields.
const HEADER: u32 = 112;

/// The header extension that holds the backing file's format.
const BACKING_FORMAT: u32 = 0xE279_2ACA;

/// The incompatible feature of subclusters.
const EXTENDED_L2: u64 = 1 << 4;

/// Reference counts have 16 bits.
const REFCOUNT_ORDER: u32 = 4;

impl Blank<'_> {
    /// Makes the file, which is durable, name and all, when the call returns.
    ///
    /// # Errors
    ///
    /// When there is a file already, which is not touched; [`Error::NoSpace`]; else what the file system says. Nothing
    /// is left behind.
    pub fn create(&self, path: &Path) -> Result<()> {
        let file = self.write(path)?;
        let synced = file.sync_all().map_err(Error::on("syncing", path)).and_then(|()| match path.parent() {
            Some(directory) => record::sync_directory(directory),
            None => Ok(()),
        });
        synced.inspect_err(|_| drop(fs::remove_file(path)))
    }

    /// Makes the file and gives it to be synced; otherwise as [`Self::create`].
    ///
    /// # Errors
    ///
    /// As [`Self::create`].
    pub(super) fn write(&self, path: &Path) -> Result<File> {
        let mut options = OpenOptions::new();
        let file =
            options.write(true).create_new(true).mode(0o600).open(path).map_err(Error::on("creating", path))?;
        self.fill(&file).map_err(Error::on("writing", path)).inspect_err(|_| drop(fs::remove_file(path)))?;
        Ok(file)
    }

    /// Writes what is not zero of an empty file.
    fn fill(&self, file: &File) -> std::io::Result<()> {
        let cluster = 1_u64 << self.cluster_bits();
        let clusters = 3 + (self.l1_size() * 8).div_ceil(cluster);
        // At most 32 MiB of first-level table: their counts fit into one block, whatever the clusters' size.
        let counts: Vec<u8> = (0..clusters).flat_map(|_| 1_u16.to_be_bytes()).collect();
        file.set_len(clusters * cluster)?;
        file.write_all_at(&self.header(), 0)?;
        file.write_all_at(&(2 * cluster).to_be_bytes(), cluster)?;
        file.write_all_at(&counts, 2 * cluster)
    }

    /// Gives the header with its extension and the backing string.
    fn header(&self) -> Vec<u8> {
        let cluster = 1_u64 << self.cluster_bits();
        let mut extensions = Vec::new();
        if self.backing.is_some() {
            extensions.extend_from_slice(&BACKING_FORMAT.to_be_bytes());
            extensions.extend_from_slice(&5_u32.to_be_bytes());
            extensions.extend_from_slice(b"qcow2\0\0\0");
        }
        extensions.extend_from_slice(&[0; 8]);
        let backing = self.backing.unwrap_or_default();
        let backing_offset = if backing.is_empty() { 0 } else { u64::from(HEADER) + extensions.len() as u64 };
        let incompatible = if self.unit == Unit::Sector { EXTENDED_L2 } else { 0 };
        let mut header = Vec::from(*b"QFI\xfb");
        header.extend_from_slice(&3_u32.to_be_bytes());
        header.extend_from_slice(&backing_offset.to_be_bytes());
        header.extend_from_slice(&(backing.len() as u32).to_be_bytes());
        header.extend_from_slice(&self.cluster_bits().to_be_bytes());
        header.extend_from_slice(&self.virtual_size.to_be_bytes());
        header.extend_from_slice(&0_u32.to_be_bytes()); // not encrypted
        header.extend_from_slice(&(self.l1_size() as u32).to_be_bytes());
        header.extend_from_slice(&(3 * cluster).to_be_bytes());
        header.extend_from_slice(&cluster.to_be_bytes());
        header.extend_from_slice(&1_u32.to_be_bytes()); // clusters of the refcount table
        header.extend_from_slice(&[0; 12]); // no snapshots
        header.extend_from_slice(&incompatible.to_be_bytes());
        header.extend_from_slice(&[0; 16]); // no other features
        header.extend_from_slice(&REFCOUNT_ORDER.to_be_bytes());
        header.extend_from_slice(&HEADER.to_be_bytes());
        header.extend_from_slice(&[0; 8]); // compression by zlib, as without the field
        header.extend_from_slice(&extensions);
        header.extend_from_slice(backing.as_bytes());
        header
    }

    fn cluster_bits(&self) -> u32 {
        match self.unit {
            Unit::Cluster => 16,
            Unit::Sector => 14,
        }
    }

    /// Gives the entries of the first-level table: one for each second-level table, which takes one cluster.
    fn l1_size(&self) -> u64 {
        let cluster = 1_u64 << self.cluster_bits();
        let entry = match self.unit {
            Unit::Cluster => 8,
            Unit::Sector => 16,
        };
        self.virtual_size.div_ceil(cluster / entry * cluster)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;

    use serde_json::Value;

    use super::super::Header;
    use super::*;
    use crate::qemu::img;

    const SIZES: [u64; 9] = [
        4096,
        65536,
        1 << 20,
        (512 << 20) - 4096,
        512 << 20,
        (512 << 20) + 4096,
        1 << 40,
        (64 << 40) - 4096,
        64 << 40,
    ];

    /// Gives what qemu-img says of an image, but for what is not the image's own.
    fn told(path: &Path) -> Value {
        let output =
            Command::new("qemu-img").args(["info", "--output=json", "-f", "qcow2"]).arg(path).output().unwrap();
        let mut info: Value = serde_json::from_slice(&output.stdout).unwrap();
        for name in ["filename", "full-backing-filename", "actual-size", "children"] {
            info.as_object_mut().unwrap().remove(name);
        }
        info
    }

    #[test]
    fn a_blank_file_is_what_qemu_img_makes_whatever_its_size() {
        let directory = tempfile::tempdir().unwrap();
        let base = Blank { virtual_size: 1 << 20, backing: None, unit: Unit::Cluster };
        base.create(&directory.path().join("base.qcow2")).unwrap();
        for (unit, options) in [
            (Unit::Cluster, "compat=1.1,lazy_refcounts=off,preallocation=off"),
            (Unit::Sector, "compat=1.1,lazy_refcounts=off,preallocation=off,cluster_size=16k,extended_l2=on"),
        ] {
            for virtual_size in SIZES {
                for backing in [None, Some("base.qcow2")] {
                    let ours = directory.path().join("ours.qcow2");
                    let theirs = directory.path().join("theirs.qcow2");
                    Blank { virtual_size, backing, unit }.create(&ours).unwrap();
                    let mut create = Command::new("qemu-img");
                    create.args(["create", "-q", "-f", "qcow2", "-o", options]);
                    if let Some(backing) = backing {
                        create.args(["-u", "-F", "qcow2", "-b", backing]);
                    }
                    assert!(create.arg(&theirs).arg(virtual_size.to_string()).status().unwrap().success());
                    assert_eq!(told(&ours), told(&theirs), "{virtual_size} {unit:?}");
                    assert_eq!(img::check(&ours).unwrap(), img::Check::default(), "{virtual_size} {unit:?}");
                    let header = Header::read(&ours).unwrap();
                    assert_eq!(header.virtual_size, virtual_size);
                    assert_eq!(header.check_backing(backing), Ok(()));
                    let (ours_is, theirs_is) = (fs::metadata(&ours).unwrap(), fs::metadata(&theirs).unwrap());
                    assert!(ours_is.blocks() <= theirs_is.blocks() && ours_is.blocks() * 512 <= 64 << 10);
                    fs::remove_file(&ours).unwrap();
                    fs::remove_file(&theirs).unwrap();
                }
            }
        }
    }

    #[test]
    fn a_blank_file_takes_what_is_written_to_it() {
        let directory = tempfile::tempdir().unwrap();
        for unit in [Unit::Cluster, Unit::Sector] {
            let (base, top) = (directory.path().join("base.qcow2"), directory.path().join("top.qcow2"));
            let virtual_size = 2 << 40;
            let base_file = Blank { virtual_size, backing: None, unit: Unit::Cluster };
            base_file.create(&base).unwrap();
            Blank { virtual_size, backing: Some("base.qcow2"), unit }.create(&top).unwrap();
            let qemu_io = |path: &Path, commands: &[&str]| {
                let mut command = Command::new("qemu-io");
                command.args(["-f", "qcow2"]).args(commands.iter().flat_map(|command| ["-c", command])).arg(path);
                let output = command.output().unwrap();
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                assert!(output.status.success() && !text.contains("failed"), "{text} {output:?}");
            };
            qemu_io(&base, &["write -P 1 0 1M", "write -P 1 1T 1M"]);
            qemu_io(&top, &["write -P 2 512 512", "write -P 2 2199022206976 1M", "write -z 1T 64k"]);
            qemu_io(&top, &["read -P 1 0 512", "read -P 2 512 512", "read -P 1 1024 1047552"]);
            qemu_io(&top, &["read -P 2 2199022206976 1M", "read -P 0 1T 64k", "read -P 0 1M 1M"]);
            img::resize(&top, virtual_size + (1 << 30), None).unwrap();
            for path in [&top, &base] {
                assert_eq!(img::check(path).unwrap(), img::Check::default());
                fs::remove_file(path).unwrap();
            }
        }
    }

    #[test]
    fn a_file_that_is_there_is_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.qcow2");
        fs::write(&path, "precious").unwrap();
        let blank = Blank { virtual_size: 1 << 20, backing: None, unit: Unit::Cluster };
        assert!(blank.create(&path).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
