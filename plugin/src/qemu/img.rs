//! qemu-img, for images that no daemon has open for writing.
//!
//! Only its JSON is read, formats are always given, and no header is followed to another file.

use std::fs;
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

/// How long qemu-img may take for what touches only metadata.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long qemu-img may take for what reads all of an image's metadata.
const LONG_PATIENCE: Duration = Duration::from_secs(3600);

/// How long qemu-img may take for what copies all of an image.
const COPY_PATIENCE: Duration = Duration::from_secs(7 * 24 * 3600);

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

/// Gives an image that nobody has open a larger virtual size, durably; one that has it already is left alone.
///
/// A lock that is given is held until qemu-img has ended, even when this process is killed before: the next holder
/// must not meet it at work.
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

/// Gives an image that nobody has open another backing string, durably, or with an empty one none; its data is left as it
/// is, and neither its old backing nor the new one is opened. The lock is held as in [`resize`].
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
/// what the server says is unallocated are left out. Durable when it returns. The lock is held as in [`resize`].
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

/// Gives back what an image that nobody has open has taken and does not use, durably; nothing else is changed. The lock is
/// held as in [`resize`].
///
/// # Errors
///
/// When the image is in use, or is damaged; else what qemu-img says.
pub fn free_leaks(path: &Path, lock: Option<&FileLock>) -> Result<()> {
    free_leaks_in(alone(path, true)?, path, lock)
}

/// Does that for an image under the name given.
fn free_leaks_in(name: String, path: &Path, lock: Option<&FileLock>) -> Result<()> {
    let mut command = qemu_img("check")?;
    command.args(["-q", "-r", "leaks", "--"]).arg(name);
    finish(&mut command, lock, "qemu-img check -r leaks", path, LONG_PATIENCE)?;
    sync(path)
}

/// Names an image so that its header is followed to no other; without QEMU's lock others may have it open.
fn alone(path: &Path, is_locked: bool) -> Result<String> {
    let name = path.to_str().ok_or_else(|| Error::BadRequest(format!("the path {} is not UTF-8", path.display())))?;
    let mut file = json!({"driver": "file", "filename": name});
    if !is_locked {
        file["locking"] = "off".into();
    }
    Ok(format!("json:{}", json!({"driver": "qcow2", "file": file, "backing": null})))
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
    command.args(["-U", "--output=json", "--"]).arg(alone(path, true)?);
    let output = program::run(&mut command, &doing, LONG_PATIENCE)?;
    match output.status.code() {
        Some(0 | CORRUPTIONS_FOUND | LEAKS_FOUND) => decode("qemu-img check", path, &output.stdout),
        _ => Err(program::failure(&doing, &output)),
    }
}

/// Checks the metadata of an image that nobody writes to, and frees what is taken in it and not used. Without `is_alone`
/// somebody may read it. The lock is held as in [`resize`].
///
/// # Errors
///
/// As [`check`].
pub fn repair_leaks(path: &Path, is_alone: bool, lock: Option<&FileLock>) -> Result<Check> {
    let found = check(path)?;
    if found.leaks == 0 || found.corruptions + found.check_errors > 0 {
        return Ok(found);
    }
    free_leaks_in(alone(path, is_alone)?, path, lock)?;
    check(path)
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
    use crate::store::{Blank, Unit};

    const MIB: u64 = 1 << 20;

    fn blank(path: &Path, backing: Option<&str>) {
        Blank { virtual_size: MIB, backing, unit: Unit::Cluster }.create(path).unwrap();
    }

    #[test]
    fn an_image_grows_and_does_not_shrink() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        blank(&path, None);
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
        blank(&base.path, None);
        blank(&top.path, Some("nowhere.qcow2"));
        let extents = map(&[top, base]).unwrap();
        assert_eq!(extents.iter().map(|extent| extent.length).sum::<u64>(), MIB);
        assert!(extents.iter().all(|extent| extent.zero && !extent.data && !extent.present));
    }

    #[test]
    fn a_rebased_image_names_its_new_backing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        blank(&path, Some("nowhere.qcow2"));
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
