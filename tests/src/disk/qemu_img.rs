//! qemu-img, asked for JSON wherever it can answer in it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::json;

/// What an image's header says.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Info {
    /// The image.
    pub filename: PathBuf,
    /// Its format; everything here is qcow2.
    pub format: String,
    /// The size of its content in bytes.
    pub virtual_size: u64,
    /// The backing file as the header spells it.
    pub backing_filename: Option<String>,
    /// The backing file as qemu-img understands it.
    pub full_backing_filename: Option<PathBuf>,
    /// The backing file's format, if the header says it.
    pub backing_filename_format: Option<String>,
    /// Bytes of a cluster.
    pub cluster_size: Option<u64>,
}

/// What a check of an image's metadata found.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Check {
    /// Clusters whose content may be wrong.
    #[serde(default)]
    pub corruptions: u64,
    /// Clusters that are allocated for nothing.
    #[serde(default)]
    pub leaks: u64,
    /// Errors of the check itself.
    #[serde(default)]
    pub check_errors: u64,
}

#[derive(Deserialize)]
struct Mapped {
    length: u64,
    data: bool,
}

/// The image and everything below it, top first.
///
/// # Errors
/// If any layer cannot be opened.
pub fn chain(image: &Path) -> Result<Vec<Info>> {
    let arguments = [OsStr::new("info"), "-U".as_ref(), "--backing-chain".as_ref(), "--output=json".as_ref()];
    answer(arguments, [image])
}

/// One image's header; what it is based on is not opened.
///
/// # Errors
/// If the image cannot be opened.
pub fn info(image: &Path) -> Result<Info> {
    answer(["info", "-U", "-f", "qcow2", "--output=json"], [image])
}

/// Checks one image's metadata.
///
/// # Errors
/// If the check could not be made; what it found is in the answer.
pub fn check(image: &Path) -> Result<Check> {
    let arguments = ["check", "-U", "-f", "qcow2", "--output=json"];
    let output = run(arguments, [image])?;
    // 2 is corruption and 3 are leaks, both of them answers.
    match output.status.code() {
        Some(0 | 2 | 3) => parse(&output),
        _ => bail!(failure(&output)),
    }
}

/// Whether two images read the same, whatever they are based on; a longer one must end in zeroes.
///
/// # Errors
/// If they could not be compared.
pub fn same_content(one: &Path, other: &Path) -> Result<bool> {
    let output = run(["compare", "-U", "-q", "-f", "qcow2", "-F", "qcow2"], [one, other])?;
    match output.status.code() {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        _ => bail!(failure(&output)),
    }
}

/// Writes an image's whole content to a new raw file, with holes for zeroes.
///
/// # Errors
/// If the image cannot be read or the file not written.
pub fn to_raw(image: &Path, raw: &Path) -> Result<()> {
    let output = run(["convert", "-U", "-f", "qcow2", "-O", "raw", "-S", "4k"], [image, raw])?;
    if output.status.success() { Ok(()) } else { bail!(failure(&output)) }
}

/// Bytes of data that this one image holds, whatever lies below it.
///
/// # Errors
/// If the image cannot be mapped.
pub fn allocated(image: &Path) -> Result<u64> {
    let file = json!({"driver": "file", "filename": image});
    // Without a backing file, what is not allocated here is neither data nor anybody else's.
    let alone = format!("json:{}", json!({"driver": "qcow2", "backing": null, "file": file}));
    let mapped: Vec<Mapped> = answer(["map", "-U", "--output=json"], [alone])?;
    Ok(mapped.iter().filter(|extent| extent.data).map(|extent| extent.length).sum())
}

fn answer<A, O, T>(arguments: impl IntoIterator<Item = A>, operands: impl IntoIterator<Item = O>) -> Result<T>
where
    A: AsRef<OsStr>,
    O: AsRef<OsStr>,
    T: serde::de::DeserializeOwned,
{
    let output = run(arguments, operands)?;
    if output.status.success() { parse(&output) } else { bail!(failure(&output)) }
}

fn run<A, O>(arguments: impl IntoIterator<Item = A>, operands: impl IntoIterator<Item = O>) -> Result<Output>
where
    A: AsRef<OsStr>,
    O: AsRef<OsStr>,
{
    let mut command = Command::new("qemu-img");
    command.args(arguments).args(operands).env("LC_ALL", "C");
    command.output().with_context(|| format!("cannot run {command:?}"))
}

fn parse<T: serde::de::DeserializeOwned>(output: &Output) -> Result<T> {
    serde_json::from_slice(&output.stdout).context("qemu-img's answer is not what is known of it")
}

fn failure(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    format!("qemu-img ended with {}: {}", output.status, stderr.trim())
}
