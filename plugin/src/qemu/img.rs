//! qemu-img, for images that no daemon has open for writing.
//!
//! Only its JSON is read, formats are always given, and no header is followed to another file.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::program::{self, Output};
use super::{Image, chain_filename};
use crate::error::{Error, Result};
use crate::lock::FileLock;
use crate::record::sync_directory;

/// How long qemu-img may take for what touches only metadata.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long qemu-img may take for what reads all of an image's metadata.
const LONG_PATIENCE: Duration = Duration::from_secs(3600);

/// How long qemu-img may take for what copies all of an image.
const COPY_PATIENCE: Duration = Duration::from_secs(7 * 24 * 3600);

/// How images are made: qcow2 version 3, and nothing that another reader of the chain might not know.
const CREATE_OPTIONS: &str = "compat=1.1,lazy_refcounts=off,preallocation=off";

/// How images are made that remember for each sector whether it was written: subclusters of 512 bytes, a 32nd of a
/// cluster.
const SECTOR_OPTIONS: &str = "compat=1.1,lazy_refcounts=off,preallocation=off,cluster_size=16k,extended_l2=on";

/// What qemu-img says of one image, its backing not opened.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Info {
    /// The size that a guest sees, in bytes.
    pub virtual_size: u64,
    /// What the file takes on the file system, in bytes.
    pub actual_size: u64,
    /// The size of a cluster, in bytes.
    pub cluster_size: u64,
    /// The backing string as it stands in the header.
    #[serde(default)]
    pub backing_filename: Option<String>,
    /// The format of the backing as it stands in the header.
    #[serde(default)]
    pub backing_filename_format: Option<String>,
    /// The names of internal snapshots, of which our images have none.
    #[serde(default)]
    pub snapshots: Vec<InternalSnapshot>,
    format_specific: FormatSpecific,
}

/// A snapshot inside an image.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct InternalSnapshot {
    /// Its name.
    pub name: String,
}

/// The wrapper around what only qcow2 has.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct FormatSpecific {
    data: Qcow2,
}

/// What only qcow2 has.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Qcow2 {
    /// The version: `1.1` for version 3.
    pub compat: String,
    /// Whether the image is marked corrupt.
    #[serde(default)]
    pub corrupt: bool,
    /// An external data file, of which our images have none.
    #[serde(default)]
    pub data_file: Option<String>,
    /// Whether clusters have subclusters.
    #[serde(default)]
    pub extended_l2: bool,
}

impl Info {
    /// Gives what only qcow2 has.
    pub fn qcow2(&self) -> &Qcow2 {
        &self.format_specific.data
    }
}

/// A stretch of a chain, as [`map`] gives it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Extent {
    /// Where it starts, in bytes.
    pub start: u64,
    /// How long it is, in bytes.
    pub length: u64,
    /// In which layer it is allocated, 0 for the top; one more than the deepest layer when in none.
    pub depth: u64,
    /// Whether a layer has it allocated.
    #[serde(default)]
    pub present: bool,
    /// Whether it reads as zeroes.
    pub zero: bool,
    /// Whether there is data for it in a file.
    pub data: bool,
}

/// What qemu-img found when it checked an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Check {
    /// Clusters that could not be checked.
    pub check_errors: u64,
    /// Clusters whose metadata is wrong.
    #[serde(default)]
    pub corruptions: u64,
    /// Clusters that are taken and not used.
    #[serde(default)]
    pub leaks: u64,
}

/// Makes an empty image that is durable, name and all, when the call returns.
///
/// A lock that is given is held until qemu-img has ended, even when this process is killed before: the next holder
/// must not meet it at work.
///
/// # Errors
///
/// When there is a file already, which is not touched; [`Error::NoSpace`]; else what qemu-img says. Nothing is
/// left behind.
pub fn create(path: &Path, virtual_size: u64, lock: Option<&FileLock>) -> Result<()> {
    create_with(path, virtual_size, CREATE_OPTIONS, None, lock)
}

/// Makes an empty overlay on an image in the same directory, known by its file name; otherwise as [`create`].
///
/// The backing image is not opened: its file name and format go into the header as they are.
///
/// # Errors
///
/// As [`create`].
pub fn create_overlay(path: &Path, backing_name: &str, virtual_size: u64, lock: Option<&FileLock>) -> Result<()> {
    create_with(path, virtual_size, CREATE_OPTIONS, Some(backing_name), lock)
}

/// Makes an empty overlay that remembers for each sector of 512 bytes whether it was written; otherwise as
/// [`create_overlay`].
///
/// Where a sector of another overlay is written, its whole cluster is filled from what lies below at that time.
///
/// # Errors
///
/// As [`create`].
pub fn create_sector_overlay(path: &Path, backing: &str, virtual_size: u64, lock: Option<&FileLock>) -> Result<()> {
    create_with(path, virtual_size, SECTOR_OPTIONS, Some(backing), lock)
}

/// Makes an image with or without a backing string.
fn create_with(
    path: &Path,
    virtual_size: u64,
    options: &str,
    backing: Option<&str>,
    lock: Option<&FileLock>,
) -> Result<()> {
    // qemu-img would empty an existing file, and would give a new one the caller's umask.
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(Error::on("creating", path))?;
    let made = fill_new(path, virtual_size, options, backing, lock);
    if made.is_err() {
        drop(fs::remove_file(path));
    }
    made
}

/// Makes an image in a file that is there and empty.
fn fill_new(
    path: &Path,
    virtual_size: u64,
    options: &str,
    backing: Option<&str>,
    lock: Option<&FileLock>,
) -> Result<()> {
    let mut command = qemu_img("create")?;
    command.args(["-q", "-f", "qcow2", "-o", options]);
    if let Some(name) = backing {
        command.args(["-u", "-F", "qcow2", "-b", name]);
    }
    command.arg("--").arg(path).arg(virtual_size.to_string());
    finish(&mut command, lock, "qemu-img create", path, PATIENCE)?;
    sync(path)?;
    match path.parent() {
        Some(directory) => sync_directory(directory),
        None => Ok(()),
    }
}

/// Gives an image that nobody has open a larger virtual size, durably; one that has it already is left alone. The
/// lock is held as in [`create`].
///
/// # Errors
///
/// When the image is larger, or in use; [`Error::NoSpace`]; else what qemu-img says.
pub fn resize(path: &Path, virtual_size: u64, lock: Option<&FileLock>) -> Result<()> {
    let mut command = qemu_img("resize")?;
    command.args(["-q", "-f", "qcow2", "--"]).arg(path).arg(virtual_size.to_string());
    finish(&mut command, lock, "qemu-img resize", path, PATIENCE)?;
    sync(path)
}

/// Gives an image that nobody has open another backing string, durably; its data is left as it is, and neither its old
/// backing nor the new one is opened. The lock is held as in [`create`].
///
/// # Errors
///
/// When the image is in use; else what qemu-img says. Done again, it ends what was interrupted.
pub fn rebase(path: &Path, backing_name: &str, lock: Option<&FileLock>) -> Result<()> {
    let mut command = qemu_img("rebase")?;
    command.args(["-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing_name, "--"]).arg(path);
    finish(&mut command, lock, "qemu-img rebase", path, PATIENCE)?;
    sync(path)
}

/// Copies all that an NBD server exports at a Unix socket into an image that is there, empty and as large; zeroes and
/// what the server says is unallocated are left out. Durable when it returns. The lock is held as in [`create`].
///
/// # Errors
///
/// When the export cannot be read; [`Error::NoSpace`]; else what qemu-img says.
pub fn copy_export(socket: &Path, export: &str, path: &Path, lock: Option<&FileLock>) -> Result<()> {
    let Some(socket) = socket.to_str() else {
        return Err(Error::BadRequest(format!("the path {} is not UTF-8", socket.display())));
    };
    let server = json!({"type": "unix", "path": socket});
    let source = json!({"driver": "raw", "file": {"driver": "nbd", "server": server, "export": export}});
    let mut command = qemu_img("convert")?;
    command.args(["-q", "-n", "--target-is-zero", "-O", "qcow2", "--"]).arg(format!("json:{source}")).arg(path);
    finish(&mut command, lock, "qemu-img convert to", path, COPY_PATIENCE)?;
    sync(path)
}

/// Reads what one image's header says. Works while the image is in use.
///
/// # Errors
///
/// When the file is not a qcow2 image or cannot be read.
pub fn info(path: &Path) -> Result<Info> {
    let mut command = qemu_img("info")?;
    command.args(["-U", "--output=json", "-f", "qcow2", "--"]).arg(path);
    let output = finish(&mut command, None, "qemu-img info", path, PATIENCE)?;
    decode("qemu-img info", path, &output.stdout)
}

/// Reads where the data of a chain is, top first. Works while the images are in use.
///
/// # Errors
///
/// When an image cannot be read.
pub fn map(images: &[Image]) -> Result<Vec<Extent>> {
    let top = images.first().ok_or_else(|| Error::Internal("a chain without images".to_owned()))?;
    let mut command = qemu_img("map")?;
    command.args(["-U", "--output=json", "--"]).arg(chain_filename(images)?);
    let output = finish(&mut command, None, "qemu-img map", &top.path, LONG_PATIENCE)?;
    decode("qemu-img map", &top.path, &output.stdout)
}

/// Checks one image's metadata and repairs nothing.
///
/// # Errors
///
/// When the image cannot be read at all. What is wrong with it is in the answer.
pub fn check(path: &Path) -> Result<Check> {
    const CORRUPTIONS_FOUND: i32 = 2;
    const LEAKS_FOUND: i32 = 3;
    let doing = format!("qemu-img check {}", path.display());
    let mut command = qemu_img("check")?;
    command.args(["-U", "--output=json", "-f", "qcow2", "--"]).arg(path);
    let output = program::run(&mut command, &doing, LONG_PATIENCE)?;
    match output.status.code() {
        Some(0 | CORRUPTIONS_FOUND | LEAKS_FOUND) => decode("qemu-img check", path, &output.stdout),
        _ => Err(program::failure(&doing, &output)),
    }
}

/// Starts a command line.
fn qemu_img(subcommand: &str) -> Result<Command> {
    let mut command = Command::new(program::find("qemu-img")?);
    command.arg(subcommand);
    Ok(command)
}

/// Runs a command line that must succeed.
fn finish(
    command: &mut Command,
    lock: Option<&FileLock>,
    doing: &str,
    path: &Path,
    patience: Duration,
) -> Result<Output> {
    let doing = format!("{doing} {}", path.display());
    let output = program::run_holding(command, lock, &doing, patience)?;
    if output.status.success() { Ok(output) } else { Err(program::failure(&doing, &output)) }
}

/// Decodes qemu-img's JSON.
fn decode<T: DeserializeOwned>(doing: &str, path: &Path, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| Error::Qemu {
        doing: format!("{doing} {}", path.display()),
        reason: format!("its answer cannot be read: {error}"),
    })
}

/// Makes a file's content durable: qemu-img leaves it in the page cache.
fn sync(path: &Path) -> Result<()> {
    fs::File::open(path).and_then(|file| file.sync_all()).map_err(Error::on("syncing", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::NodeId;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_new_image_has_the_size_and_the_format_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a, b:c=d.qcow2");
        create(&path, 3 * MIB, None).unwrap();
        let info = info(&path).unwrap();
        assert_eq!((info.virtual_size, info.qcow2().compat.as_str()), (3 * MIB, "1.1"));
        assert_eq!((info.backing_filename, info.snapshots.len()), (None, 0));
        assert_eq!(check(&path).unwrap(), Check::default());
    }

    #[test]
    fn a_file_that_is_there_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        fs::write(&path, "precious").unwrap();
        assert!(create(&path, MIB, None).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn an_overlay_names_its_backing_which_need_not_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("top.qcow2");
        create_overlay(&path, "base.qcow2", MIB, None).unwrap();
        let info = info(&path).unwrap();
        assert_eq!(info.backing_filename.as_deref(), Some("base.qcow2"));
        assert_eq!(info.backing_filename_format.as_deref(), Some("qcow2"));
    }

    #[test]
    fn an_image_grows_and_does_not_shrink() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        create(&path, MIB, None).unwrap();
        for _ in 0..2 {
            resize(&path, 5 * MIB, None).unwrap();
            assert_eq!(info(&path).unwrap().virtual_size, 5 * MIB);
        }
        assert!(matches!(resize(&path, MIB, None), Err(Error::Qemu { .. })));
        assert_eq!(info(&path).unwrap().virtual_size, 5 * MIB);
    }

    #[test]
    fn a_map_is_of_the_chain_given_whatever_the_headers_say() {
        let dir = tempfile::tempdir().unwrap();
        let image = |name: &str| Image {
            node: NodeId::random(),
            path: dir.path().join(format!("{name}.qcow2")),
            virtual_size: MIB,
        };
        let (top, base) = (image("top"), image("base"));
        create(&base.path, MIB, None).unwrap();
        create_overlay(&top.path, "nowhere.qcow2", MIB, None).unwrap();
        let extents = map(&[top, base]).unwrap();
        assert_eq!(extents.iter().map(|extent| extent.length).sum::<u64>(), MIB);
        assert!(extents.iter().all(|extent| extent.zero && !extent.data && !extent.present));
    }

    #[test]
    fn a_rebased_image_names_its_new_backing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        create_overlay(&path, "nowhere.qcow2", MIB, None).unwrap();
        rebase(&path, "elsewhere.qcow2", None).unwrap();
        assert_eq!(info(&path).unwrap().backing_filename.as_deref(), Some("elsewhere.qcow2"));
    }

    #[test]
    fn what_qemu_img_says_is_in_the_error_with_the_files_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        fs::write(&path, "no image").unwrap();
        let text = info(&path).unwrap_err().to_string();
        assert!(text.contains("a.qcow2") && text.contains("format"), "{text}");
    }
}
