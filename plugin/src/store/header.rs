//! The header of a qcow2 file, read to see that the file is what the records say before QEMU is given it.
//!
//! QEMU is told the driver and the backing of every layer, and never follows a header. The header's backing string
//! is a copy of the parent link; that the two agree shows that the file is the one that was meant. The format is
//! QEMU's docs/interop/qcow2.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::error::{Error, Result};

/// The largest part of a file that a header with its extensions and backing string may take: QEMU's largest cluster.
const MAX_CLUSTER_BITS: u32 = 21;

/// The length of a version 3 header without the fields that may follow.
const LENGTH: usize = 104;

/// The smallest clusters whose subclusters, of which there are 32, are not smaller than a sector.
const MIN_SUBCLUSTERED_BITS: u32 = 14;

/// Features without which the file cannot be read, by bit; QEMU 7.2 knows all that are allowed here.
mod incompatible {
    /// Reference counts may be wrong, which opening for writing repairs.
    pub const DIRTY: u64 = 1 << 0;
    /// Metadata were found damaged.
    pub const CORRUPT: u64 = 1 << 1;
    /// The data is in another file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// The compression type is in the header.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries have subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// What a node of an SR may have.
    pub const ALLOWED: u64 = DIRTY | COMPRESSION | EXTENDED_L2;
}

/// The extension that holds the backing file's format.
const EXTENSION_BACKING_FORMAT: u32 = 0xE279_2ACA;

/// What matters of a qcow2 header that was found acceptable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The size that a guest sees, in bytes.
    pub virtual_size: u64,
    /// The backing string, if there is one.
    pub backing: Option<Vec<u8>>,
}

impl Header {
    /// Reads and judges a file's header: version 3, no external data file, not encrypted, no incompatible feature
    /// that is not known, not marked corrupt, no internal snapshot.
    ///
    /// # Errors
    ///
    /// [`Error::Image`] when it is refused, [`Error::Io`] when it cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let refused = |reason: &str| Error::Image { path: path.to_owned(), reason: reason.to_owned() };
        // Neither a symlink nor a pipe is ever one of the store's files, and opening one must not wait.
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let opened = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path);
        let file = opened.map_err(|error| match Errno::from_io_error(&error) {
            Some(Errno::NOENT) => refused("the file does not exist"),
            Some(Errno::LOOP) => refused("it is a symbolic link"),
            _ => Error::on("opening", path)(error),
        })?;
        let metadata = file.metadata().map_err(Error::on("reading the state of", path))?;
        if !metadata.is_file() {
            return Err(refused("it is not a file"));
        }
        let head = read_at(&file, 0, LENGTH).map_err(Error::on("reading", path))?;
        let Some(head) = head else {
            return Err(refused("it is too short for a qcow2 header"));
        };
        judge(&head, |offset, length| read_at(&file, offset, length))
            .map_err(Error::on("reading", path))?
            .map_err(|reason| refused(&reason))
    }

    /// Checks that the backing string names `parent`, a file in the same directory, or that there is neither.
    ///
    /// # Errors
    ///
    /// Both names, in words.
    pub fn check_backing(&self, parent: Option<&str>) -> Result<(), String> {
        if self.backing.as_deref() == parent.map(str::as_bytes) {
            return Ok(());
        }
        let found = self.backing.as_deref().map(|name| OsStr::from_bytes(name).to_string_lossy());
        Err(format!(
            "its header names {}, the tree's record {}",
            found.as_deref().unwrap_or("no backing file"),
            parent.unwrap_or("none"),
        ))
    }
}

/// Makes a header name another backing file, whose name is as long as the old one's, or none; durable when this returns.
///
/// For a file that nobody writes to and somebody may read: QEMU's own tools would not write to it then.
///
/// # Errors
///
/// [`Error::Image`] when the old name is not as long; else the file cannot be written to.
pub(super) fn rename_backing(path: &Path, backing: Option<&str>) -> Result<()> {
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(OFlags::NOFOLLOW.bits().cast_signed()).open(path);
    let file = file.map_err(Error::on("opening", path))?;
    let head = read_at(&file, 0, LENGTH).map_err(Error::on("reading", path))?.unwrap_or_default();
    let (offset, length) = (u64_at(&head, 8), u32_at(&head, 16) as usize);
    let written = match backing {
        None => file.write_all_at(&[0; 12], 8),
        Some(name) if offset != 0 && name.len() == length => file.write_all_at(name.as_bytes(), offset),
        Some(name) => {
            let reason = format!("its header has no room for the backing file {name}");
            return Err(Error::Image { path: path.to_owned(), reason });
        }
    };
    written.and_then(|()| file.sync_all()).map_err(Error::on("writing", path))
}

/// Reads exactly `length` bytes, or `None` past the end of the file.
fn read_at(file: &File, offset: u64, length: usize) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; length];
    match file.read_exact_at(&mut bytes, offset) {
        Ok(()) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// Gives the big-endian number at `offset`; a field is always inside the bytes that were read for it.
fn number<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes.get(offset..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_be_bytes(number(bytes, offset))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_be_bytes(number(bytes, offset))
}

/// Judges a header's first bytes; more is read where they point to it.
fn judge(
    head: &[u8],
    read: impl Fn(u64, usize) -> io::Result<Option<Vec<u8>>>,
) -> io::Result<Result<Header, String>> {
    if !head.starts_with(b"QFI\xfb") {
        return Ok(Err("it is not a qcow2 file".to_owned()));
    }
    let version = u32_at(head, 4);
    if version != 3 {
        return Ok(Err(format!("it has qcow2 version {version} instead of 3")));
    }
    let cluster_bits = u32_at(head, 20);
    if !(9..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
        return Ok(Err(format!("its cluster size of 2^{cluster_bits} bytes is impossible")));
    }
    let header_length = u64::from(u32_at(head, 100));
    if !(LENGTH as u64..=1 << cluster_bits).contains(&header_length) {
        return Ok(Err(format!("its header of {header_length} bytes is impossible")));
    }
    let features = u64_at(head, 72);
    for (bit, reason) in [
        (incompatible::CORRUPT, "it is marked as corrupt".to_owned()),
        (incompatible::DATA_FILE, "its data is in another file".to_owned()),
        (!incompatible::ALLOWED, format!("it has unknown features ({features:#x})")),
    ] {
        if features & bit != 0 {
            return Ok(Err(reason));
        }
    }
    if features & incompatible::EXTENDED_L2 != 0 && cluster_bits < MIN_SUBCLUSTERED_BITS {
        return Ok(Err(format!("its subclusters in clusters of 2^{cluster_bits} bytes are impossible")));
    }
    // The tables of data and of reference counts.
    if [40, 48].iter().any(|at| !u64_at(head, *at).is_multiple_of(1 << cluster_bits) || u64_at(head, *at) >> 63 != 0)
    {
        return Ok(Err("its tables are out of place".to_owned()));
    }
    if u32_at(head, 32) != 0 {
        return Ok(Err("it is encrypted".to_owned()));
    }
    if u32_at(head, 60) != 0 {
        return Ok(Err("it has internal snapshots".to_owned()));
    }
    let virtual_size = u64_at(head, 24);
    let (backing_at, backing_length) = (u64_at(head, 8), u32_at(head, 16));
    if backing_at == 0 {
        return Ok(Ok(Header { virtual_size, backing: None }));
    }
    let end = backing_at.saturating_add(u64::from(backing_length));
    if backing_length == 0 || backing_length > 1023 || end > 1 << cluster_bits || backing_at < header_length {
        return Ok(Err("its backing string is out of place".to_owned()));
    }
    let Some(start) = usize::try_from(end).ok().map(|length| read(0, length)).transpose()?.flatten() else {
        return Ok(Err("it ends within its header".to_owned()));
    };
    let (before, backing) = start.split_at(start.len().saturating_sub(backing_length as usize));
    Ok(check_extensions(before, header_length).map(|()| Header { virtual_size, backing: Some(backing.to_owned()) }))
}

/// Walks the header's extensions: a backing format, where one is given, must be qcow2.
fn check_extensions(bytes: &[u8], header_length: u64) -> Result<(), String> {
    let mut rest = usize::try_from(header_length).ok().and_then(|start| bytes.get(start..)).unwrap_or_default();
    while let Some((kind, after)) = rest.split_first_chunk::<4>() {
        let kind = u32::from_be_bytes(*kind);
        let Some((length, after)) = after.split_first_chunk::<4>().filter(|_| kind != 0) else {
            break;
        };
        let length = u32::from_be_bytes(*length) as usize;
        let Some(data) = after.get(..length) else {
            return Err("an extension runs out of its header".to_owned());
        };
        if kind == EXTENSION_BACKING_FORMAT && data != b"qcow2" {
            return Err("its backing file is not qcow2".to_owned());
        }
        rest = after.get(length.next_multiple_of(8)..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::store::{Blank, Unit};

    fn blank(backing: Option<&str>) -> Blank<'_> {
        Blank { virtual_size: 1 << 20, backing, unit: Unit::Cluster }
    }

    /// Makes an overlay named `top` on a name `base`, and gives its bytes.
    fn overlay(directory: &Path) -> (std::path::PathBuf, Vec<u8>) {
        let path = directory.join("top.qcow2");
        blank(Some("base.qcow2")).create(&path).unwrap();
        let bytes = fs::read(&path).unwrap();
        (path, bytes)
    }

    /// Reads the header after bytes were put at an offset of a sound file.
    fn changed(offset: usize, patch: &[u8]) -> Result<Header> {
        let directory = tempfile::tempdir().unwrap();
        let (path, mut bytes) = overlay(directory.path());
        bytes[offset..offset + patch.len()].copy_from_slice(patch);
        fs::write(&path, bytes).unwrap();
        Header::read(&path)
    }

    #[test]
    fn what_qemu_img_makes_is_read_as_it_was_made() {
        let directory = tempfile::tempdir().unwrap();
        let (path, _) = overlay(directory.path());
        let header = Header::read(&path).unwrap();
        assert_eq!(header, Header { virtual_size: 1 << 20, backing: Some(b"base.qcow2".to_vec()) });
        assert_eq!(header.check_backing(Some("base.qcow2")), Ok(()));
        for other in [None, Some("base.qcow"), Some("other.qcow2")] {
            assert!(header.check_backing(other).unwrap_err().contains("base.qcow2"));
        }
        let root = directory.path().join("root.qcow2");
        blank(None).create(&root).unwrap();
        assert_eq!(Header::read(&root).unwrap().check_backing(None), Ok(()));
    }

    #[test]
    fn a_header_names_another_backing_file_as_long_as_the_old_one_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let (path, _) = overlay(dir.path());
        let old = Header::read(&path).unwrap().backing.unwrap();
        let new = "x".repeat(old.len());
        rename_backing(&path, Some(&new)).unwrap();
        assert_eq!(Header::read(&path).unwrap().check_backing(Some(&new)), Ok(()));
        assert!(rename_backing(&path, Some("short")).is_err());
        assert_eq!(crate::qemu::img::info(&path).unwrap().backing_filename, Some(new));
        rename_backing(&path, None).unwrap();
        assert_eq!(Header::read(&path).unwrap().backing, None);
        assert_eq!(crate::qemu::img::info(&path).unwrap().backing_filename, None);
        assert!(rename_backing(&path, Some("x")).is_err());
    }

    #[test]
    fn what_cannot_be_trusted_is_refused() {
        for (offset, patch, words) in [
            (0, &b"QFI\xfa"[..], "not a qcow2 file"),
            (4, &2_u32.to_be_bytes(), "version 2"),
            (8, &u64::MAX.to_be_bytes(), "out of place"),
            (16, &5000_u32.to_be_bytes(), "out of place"),
            (20, &40_u32.to_be_bytes(), "cluster size"),
            (32, &1_u32.to_be_bytes(), "encrypted"),
            (40, &1_u64.to_be_bytes(), "tables are out of place"),
            (40, &(1_u64 << 63).to_be_bytes(), "tables are out of place"),
            (48, &512_u64.to_be_bytes(), "tables are out of place"),
            (60, &1_u32.to_be_bytes(), "internal snapshots"),
            (72, &2_u64.to_be_bytes(), "corrupt"),
            (72, &4_u64.to_be_bytes(), "another file"),
            (72, &32_u64.to_be_bytes(), "unknown features"),
            (100, &103_u32.to_be_bytes(), "header of 103 bytes"),
            (100, &u32::MAX.to_be_bytes(), "header of 4294967295 bytes"),
        ] {
            let error = changed(offset, patch).unwrap_err();
            assert!(matches!(error, Error::Image { .. }) && error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn a_backing_format_other_than_qcow2_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (path, mut bytes) = overlay(directory.path());
        let at = bytes.windows(4).position(|window| window == EXTENSION_BACKING_FORMAT.to_be_bytes()).unwrap();
        bytes[at + 8..at + 13].copy_from_slice(b"raw\0\0");
        fs::write(&path, bytes).unwrap();
        assert!(Header::read(&path).unwrap_err().to_string().contains("backing file is not qcow2"));
    }

    #[test]
    fn no_damage_makes_reading_fail_in_another_way() {
        let directory = tempfile::tempdir().unwrap();
        let (path, bytes) = overlay(directory.path());
        for length in (0..200).chain([bytes.len()]) {
            fs::write(&path, &bytes[..length]).unwrap();
            assert!(matches!(Header::read(&path), Ok(_) | Err(Error::Image { .. })), "{length}");
        }
        for bit in 0..400 * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, damaged).unwrap();
            assert!(matches!(Header::read(&path), Ok(_) | Err(Error::Image { .. })), "{bit}");
        }
    }

    #[test]
    fn only_a_plain_file_is_opened() {
        let directory = tempfile::tempdir().unwrap();
        let (path, _) = overlay(directory.path());
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let pipe = directory.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
        for wrong in [&link, &pipe, &directory.path().to_path_buf(), &directory.path().join("none")] {
            assert!(matches!(Header::read(wrong), Err(Error::Image { .. })), "{}", wrong.display());
        }
    }
}
