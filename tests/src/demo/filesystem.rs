//! An ext4 file system in a raw file: made, changed and checked by e2fsprogs, without mounting it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail, ensure};

/// A file system in a raw file, and the files that it holds.
#[derive(Debug, Clone)]
pub struct Filesystem {
    image: PathBuf,
    files: Files,
}

/// What a file system must hold: names in its root directory, and files with the same content outside of it.
pub type Files = BTreeMap<String, PathBuf>;

impl Filesystem {
    /// Makes one of so many bytes with these files in it.
    ///
    /// # Errors
    /// If a file cannot be copied or mkfs.ext4 fails.
    pub fn make(image: &Path, bytes: u64, files: Files) -> Result<Self> {
        let staging = tempfile::Builder::new().prefix("fx-files-").tempdir()?;
        for (name, from) in &files {
            std::fs::copy(from, staging.path().join(name))
                .with_context(|| format!("cannot copy {}", from.display()))?;
        }
        let mut command = program("mkfs.ext4");
        command.args(["-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d"]);
        command.arg(staging.path()).arg(image).arg(format!("{}k", bytes / 1024));
        succeed(&mut command)?;
        Ok(Self { image: image.to_owned(), files })
    }

    /// The raw file.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// What it holds.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// Copies it to another raw file and changes it there: some files go, others come; a name in both is replaced.
    ///
    /// # Errors
    /// If debugfs could not do it, or left something inconsistent.
    pub fn changed(&self, image: &Path, remove: &[String], add: &Files) -> Result<Self> {
        let mut copy = program("cp");
        succeed(copy.args(["--sparse=always", "--reflink=auto"]).arg(&self.image).arg(image))?;
        let mut files = self.files.clone();
        let mut script = String::new();
        for name in remove.iter().chain(add.keys()) {
            if files.remove(name).is_some() {
                writeln!(script, "rm {name}")?;
            }
        }
        for (name, from) in add {
            writeln!(script, "write {} {name}", from.display())?;
            files.insert(name.clone(), from.clone());
        }
        let commands = tempfile::NamedTempFile::new()?;
        std::fs::write(commands.path(), script)?;
        let mut debugfs = program("debugfs");
        succeed(debugfs.args(["-w", "-f"]).arg(commands.path()).arg(image))?;
        // debugfs ends well whatever its commands did; only the file system itself can tell.
        check(image, &files).context("after debugfs changed the file system")?;
        Ok(Self { image: image.to_owned(), files })
    }
}

/// Checks a raw file: its file system is consistent and holds exactly these files with their content.
///
/// # Errors
/// Says what is wrong with it.
pub fn check(image: &Path, files: &Files) -> Result<()> {
    succeed(program("e2fsck").args(["-f", "-n"]).arg(image))?;
    let out = tempfile::Builder::new().prefix("fx-dump-").tempdir()?;
    let mut dump = program("debugfs");
    dump.arg("-R").arg(format!("rdump / {}", out.path().display())).arg(image);
    succeed(&mut dump)?;
    let mut found = 0;
    for entry in std::fs::read_dir(out.path())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "lost+found" {
            ensure!(files.contains_key(&name), "the file {name} should not be there");
            found += 1;
        }
    }
    ensure!(found == files.len(), "{} files are missing", files.len() - found);
    for (name, original) in files {
        let (there, here) = (std::fs::read(out.path().join(name))?, std::fs::read(original)?);
        ensure!(there == here, "the file {name} differs from {}", original.display());
    }
    Ok(())
}

/// A program of e2fsprogs or coreutils, found where a login shell of root would find it.
fn program(name: &str) -> Command {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = std::env::split_paths(&path).collect();
    directories.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
    let found = directories.into_iter().map(|directory| directory.join(name)).find(|path| path.is_file());
    let mut command = Command::new(found.unwrap_or_else(|| name.into()));
    command.env("LC_ALL", "C");
    command
}

fn succeed(command: &mut Command) -> Result<Output> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        bail!("{command:?} ended with {}: {}{}", output.status, stdout.trim(), stderr.trim());
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_is_made_changed_and_a_wrong_byte_in_it_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, byte: u8| {
            let path = directory.path().join(name);
            std::fs::write(&path, vec![byte; 70_000]).unwrap();
            path
        };
        let files = Files::from([("a".to_owned(), file("1", 1)), ("b".to_owned(), file("2", 2))]);
        let first = Filesystem::make(&directory.path().join("i1"), 8 << 20, files).unwrap();
        check(first.image(), first.files()).unwrap();
        let add = Files::from([("b".to_owned(), file("3", 3)), ("c".to_owned(), file("4", 4))]);
        let second = first.changed(&directory.path().join("i2"), &["a".to_owned()], &add).unwrap();
        assert_eq!(second.files().keys().collect::<Vec<_>>(), ["b", "c"]);
        check(first.image(), first.files()).unwrap();
        let error = check(second.image(), first.files()).unwrap_err().to_string();
        assert!(error.contains("should not be there"), "{error}");

        let mut bytes = std::fs::read(second.image()).unwrap();
        let place = bytes.windows(4096).position(|window| window.iter().all(|byte| *byte == 3)).unwrap();
        bytes[place + 100] = 0;
        std::fs::write(second.image(), &bytes).unwrap();
        let error = check(second.image(), second.files()).unwrap_err().to_string();
        assert!(error.contains("the file b differs"), "{error}");
        bytes[1024..2048].fill(0xff);
        std::fs::write(second.image(), &bytes).unwrap();
        assert!(check(second.image(), second.files()).is_err());
    }
}
