//! Records: JSON files with a format number, replaced as a whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// A kind of record, whose JSON is an object with a number `format`.
pub trait Record: Serialize + DeserializeOwned {
    /// The newest format that this program reads, and the one it writes.
    const FORMAT: u64;

    /// Whether people open the file, so that it has lines.
    const IS_FOR_PEOPLE: bool = false;
}

/// The prefix of a record's file until it is complete; one that is left over is garbage.
pub const TEMPORARY: &str = ".new-";

/// Whether a record must be there after a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// It is on the disk when the call returns: the commit point of an operation.
    Durable,
    /// After a power cut it is there, or the one before it, whole: an operation whose last step may be lost.
    Whole,
    /// It is about this boot only.
    UntilReboot,
}

/// Reads a record.
///
/// # Errors
///
/// [`Error::NewerFormat`] and [`Error::DamagedRecord`] name the file; a file that is not there is an
/// [`Error::Io`] with [`io::ErrorKind::NotFound`].
pub fn read<R: Record>(path: &Path) -> Result<R> {
    let bytes = fs::read(path).map_err(Error::on("reading", path))?;
    parse(path, &bytes)
}

/// Reads a record that may not be there.
///
/// # Errors
///
/// As [`read`], without the missing file.
pub fn read_if_present<R: Record>(path: &Path) -> Result<Option<R>> {
    match fs::read(path) {
        Ok(bytes) => parse(path, &bytes).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::on("reading", path)(error)),
    }
}

/// Decodes a record's bytes; `path` is for the error.
pub(crate) fn parse<R: Record>(path: &Path, bytes: &[u8]) -> Result<R> {
    #[derive(Deserialize)]
    struct Head {
        #[serde(default)]
        format: Value,
    }
    let damaged = |reason: String| Error::DamagedRecord { path: path.to_owned(), reason };
    // The format first, whatever else there is; a list has no fields, though one could be decoded as if it had.
    let head =
        if bytes.trim_ascii_start().starts_with(b"[") { Ok(None) } else { serde_json::from_slice(bytes).map(Some) };
    let head: Option<Head> = head.map_err(|error| damaged(error.to_string()))?;
    match head.and_then(|head| head.format.as_u64()) {
        None => return Err(damaged("it has no format number".to_owned())),
        Some(found) if found > R::FORMAT => {
            return Err(Error::NewerFormat { path: path.to_owned(), found, known: R::FORMAT });
        }
        Some(_) => {}
    }
    serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))
}

/// Removes a file; one that is not there is removed already.
///
/// # Errors
///
/// When it cannot be removed.
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::on("removing", path)(error)),
        _ => Ok(()),
    }
}

/// Removes a directory that was renamed away, with all that is in it; one that is not there is removed already.
///
/// # Errors
///
/// When it cannot be removed.
pub fn remove_directory(path: &Path) -> io::Result<()> {
    // Whoever looked for a file by the old name, to make it if need be, may have made it after the others had gone. By
    // now there is no such name, so that nobody else comes.
    const ATTEMPTS: u32 = 8;
    for _ in 1..ATTEMPTS {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => return result,
        }
    }
    fs::remove_dir_all(path)
}

/// Puts a record in the place of an older one, or of none: readers see one or the other, whatever is killed.
///
/// # Errors
///
/// When it cannot be written. The older record then still stands, but for a failure of the last step with
/// [`Durability::Durable`]: then either may be found after a power cut.
pub fn write<R: Record>(path: &Path, record: &R, durability: Durability) -> Result<()> {
    replace(path, &encode(record)?, durability)
}

/// Encodes a record as it stands in its file.
///
/// # Errors
///
/// [`Error::Internal`] when it cannot be JSON.
pub fn encode<R: Record>(record: &R) -> Result<Vec<u8>> {
    let encoded = if R::IS_FOR_PEOPLE { serde_json::to_vec_pretty(record) } else { serde_json::to_vec(record) };
    let mut bytes = encoded.map_err(|error| Error::Internal(format!("a record cannot be encoded: {error}")))?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Puts an encoded record in place, as [`write()`] does.
///
/// # Errors
///
/// As [`write()`].
pub fn replace(path: &Path, bytes: &[u8], durability: Durability) -> Result<()> {
    let directory = directory_of(path)?;
    let writing = |error: io::Error| Error::on("writing", path)(error);
    let mut file = tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(directory).map_err(writing)?;
    file.write_all(bytes).map_err(writing)?;
    if durability != Durability::UntilReboot {
        file.as_file().sync_all().map_err(writing)?;
    }
    file.persist(path).map_err(|error| writing(error.error))?;
    if durability == Durability::Durable {
        sync_directory(directory)?;
    }
    Ok(())
}

/// Sets blocks aside in a file at `spare`, for [`replace_with`]; a file that has as many is left as it is.
///
/// # Errors
///
/// When the blocks are not there to be had.
pub fn reserve(spare: &Path, bytes: u64) -> Result<()> {
    let reserving = |error: io::Error| Error::on("reserving space in", spare)(error);
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(spare).map_err(reserving)?;
    let before = file.metadata().map_err(reserving)?.len();
    if before >= bytes {
        return Ok(());
    }
    let reserved = match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes) {
        // NFS before 4.2 has no such call.
        Err(Errno::OPNOTSUPP) => io::copy(&mut io::repeat(0).take(bytes), &mut file).map(drop),
        result => result.map_err(io::Error::from),
    };
    reserved.map_err(|error| {
        // A part of what was asked for is not kept from others.
        drop(file.set_len(before));
        reserving(error)
    })
}

/// Puts an encoded record in place, durably, in the blocks that [`reserve`] set aside; the spare file is gone then.
/// For a full file system on which something is to be removed.
///
/// # Errors
///
/// When the spare file is not there or too small, or cannot be written. The older record still stands.
pub fn replace_with(spare: &Path, path: &Path, bytes: &[u8]) -> Result<()> {
    let writing = |error: io::Error| Error::on("writing", path)(error);
    let mut file = OpenOptions::new().write(true).open(spare).map_err(writing)?;
    let length = bytes.len() as u64;
    if file.metadata().map_err(writing)?.len() < length {
        return Err(writing(Errno::NOSPC.into()));
    }
    file.write_all(bytes).map_err(writing)?;
    file.set_len(length).map_err(writing)?;
    file.sync_all().map_err(writing)?;
    fs::rename(spare, path).map_err(writing)?;
    sync_directory(directory_of(path)?)
}

/// Gives the directory that a record is in.
fn directory_of(path: &Path) -> Result<&Path> {
    path.parent().ok_or_else(|| Error::Internal(format!("record {} has no directory", path.display())))
}

/// Makes the names in a directory durable.
///
/// # Errors
///
/// When the directory cannot be opened or synced.
pub fn sync_directory(directory: &Path) -> Result<()> {
    File::open(directory).and_then(|file| file.sync_all()).map_err(Error::on("syncing directory", directory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Sample {
        format: u64,
        text: String,
    }

    impl Record for Sample {
        const FORMAT: u64 = 2;
    }

    #[test]
    fn a_record_reads_back_and_leaves_no_other_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        assert_eq!(read_if_present::<Sample>(&path).unwrap(), None);
        for text in ["a", "b"] {
            let sample = Sample { format: 2, text: text.to_owned() };
            write(&path, &sample, Durability::Durable).unwrap();
            assert_eq!(read::<Sample>(&path).unwrap(), sample);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_record_cut_off_anywhere_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        let whole = br#"{"format":2,"text":"abc"}"#;
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let error = read::<Sample>(&path).unwrap_err();
            assert!(matches!(&error, Error::DamagedRecord { .. }) && error.to_string().contains("r.json"));
        }
    }

    #[test]
    fn a_record_can_take_the_blocks_that_were_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let (path, spare) = (dir.path().join("r.json"), dir.path().join("spare"));
        let sample = Sample { format: 2, text: "x".repeat(5000) };
        let bytes = encode(&sample).unwrap();
        assert!(replace_with(&spare, &path, &bytes).is_err());
        reserve(&spare, 4096).unwrap();
        assert_eq!(replace_with(&spare, &path, &bytes).unwrap_err().code().0, "SR_BACKEND_FAILURE_44");
        reserve(&spare, 8192).unwrap();
        replace_with(&spare, &path, &bytes).unwrap();
        assert_eq!(read::<Sample>(&path).unwrap(), sample);
        assert!(!spare.exists());
    }

    #[test]
    fn a_newer_format_is_refused_with_both_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        fs::write(&path, r#"{"format":3,"words":["x"]}"#).unwrap();
        let text = read::<Sample>(&path).unwrap_err().to_string();
        assert!(text.contains("format 3") && text.contains("up to 2"), "{text}");
    }
}
