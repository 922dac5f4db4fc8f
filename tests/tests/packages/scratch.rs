//! Packages made by packaging/package.sh, and a root of their own that they are installed in.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

/// What the maintainer scripts of an RPM run, which rpm changes root for.
const TOOLS: [&str; 13] =
    ["sh", "mv", "cp", "rm", "mkdir", "ln", "stat", "id", "flock", "mktemp", "chmod", "chown", "sync"];

/// Where a host has the plugins.
const BASE: &str = "usr/libexec/xapi-storage-script";

/// A package's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Rpm,
    Deb,
}

/// The two plugins' directories below a root.
pub fn plugins(root: &Path) -> [PathBuf; 2] {
    ["volume/org.xen.xapi.storage.qcow2", "datapath/qsd"].map(|name| root.join(BASE).join(name))
}

/// The executables to pack: those that were built with this test, unless the environment names others.
pub fn build() -> PathBuf {
    let beside = || Path::new(env!("CARGO_BIN_EXE_fake-xapi")).parent().unwrap().to_owned();
    std::env::var_os("FAKE_XAPI_BUILD").map_or_else(beside, PathBuf::from)
}

/// The executables of the package that is upgraded from: the same, unless the environment names older ones.
pub fn old_build() -> PathBuf {
    std::env::var_os("FAKE_XAPI_OLD_BUILD").map_or_else(build, PathBuf::from)
}

/// Runs a command to its end; what it printed is told if it fails.
pub fn run(command: &mut Command) -> Result<Output> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    let told = || String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{command:?}: {}: {}", output.status, told());
    Ok(output)
}

/// Makes a package and gives its file.
pub fn package(kind: Kind, build: &Path, release: u32, directory: &Path) -> Result<PathBuf> {
    let word = if kind == Kind::Rpm { "rpm" } else { "deb" };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/package.sh");
    let small = without_debug_information(build, &directory.join(format!("build-{release}")))?;
    let mut command = Command::new(script);
    command.args(["--any", word]).arg(directory).env("BUILD", small);
    let output = run(command.env("RELEASE", release.to_string()).env("COMPRESS", "none"))?;
    Ok(String::from_utf8(output.stdout)?.trim().into())
}

/// Copies the executables without what makes most of them in the dev profile.
fn without_debug_information(build: &Path, to: &Path) -> Result<PathBuf> {
    fs::create_dir_all(to)?;
    for name in ["xapi-storage-qcow2", "xapi-storage-qcow2-volume", "xapi-storage-qcow2-datapath"] {
        run(Command::new("strip").arg("--strip-debug").arg("-o").arg(to.join(name)).arg(build.join(name)))?;
    }
    Ok(to.to_owned())
}

/// A root that has nothing but what package managers and their scripts need.
pub struct Scratch {
    kind: Kind,
    directory: TempDir,
}

impl Scratch {
    pub fn new(kind: Kind) -> Result<Self> {
        // Short: sockets are below it.
        let directory = tempfile::Builder::new().prefix("fx-").tempdir_in("/tmp")?;
        let root = directory.path();
        for name in ["tmp", "run", "etc", "dev", "var/lib/rpm", "var/lib/dpkg/info", "var/lib/dpkg/updates"] {
            fs::create_dir_all(root.join(name))?;
        }
        for name in ["status", "available"] {
            fs::write(root.join("var/lib/dpkg").join(name), "")?;
        }
        if kind == Kind::Rpm {
            fs::write(root.join("dev/null"), "")?;
            for tool in TOOLS {
                let path = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"].map(|place| Path::new(place).join(tool));
                let path = path.iter().find(|path| path.is_file()).with_context(|| format!("there is no {tool}"))?;
                put(path, root)?;
            }
            fs::create_dir_all(root.join("bin"))?;
            fs::copy("/bin/sh", root.join("bin/sh"))?;
            // The executables of the dev profile are linked with what any program is linked with.
            libraries(&build().join("xapi-storage-qcow2-datapath"), root)?;
        }
        Ok(Self { kind, directory })
    }

    pub fn root(&self) -> &Path {
        self.directory.path()
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Installs a package, or upgrades to it.
    pub fn install(&self, package: &Path) -> Result<()> {
        let mut command = self.manager();
        match self.kind {
            Kind::Rpm => command.args(["--nodeps", "-U"]),
            Kind::Deb => command.arg("-i"),
        };
        run(command.arg(package)).map(drop)
    }

    /// Removes the package.
    pub fn remove(&self) -> Result<()> {
        let mut command = self.manager();
        command.args([if self.kind == Kind::Rpm { "-e" } else { "-r" }, "xapi-storage-qcow2"]);
        run(&mut command).map(drop)
    }

    fn manager(&self) -> Command {
        let root = self.root().display();
        let mut command = Command::new(if self.kind == Kind::Rpm { "rpm" } else { "dpkg" });
        command.arg(format!("--root={root}")).env("LC_ALL", "C");
        if self.kind == Kind::Deb {
            let log = format!("--log={root}/dpkg.log");
            command.args(["--force-script-chrootless", "--force-depends", "--no-triggers", &log]);
        }
        command
    }

    /// What is in the directories that xapi-storage-script watches, and beside them.
    pub fn watched(&self) -> BTreeSet<String> {
        let base = self.root().join(BASE);
        let names = |directory: &Path| -> Vec<String> {
            let entries = fs::read_dir(directory).into_iter().flatten();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        };
        let mut found = BTreeSet::new();
        for name in names(&base) {
            found.extend(names(&base.join(&name)).iter().map(|inner| format!("{name}/{inner}")));
            found.insert(name);
        }
        found
    }

    /// Files of the package anywhere below the root.
    pub fn remains(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut directories = vec![self.root().to_owned()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).unwrap().flatten() {
                let path = entry.path();
                if path.starts_with(self.root().join("var")) {
                    continue;
                }
                if path.file_name().unwrap().to_string_lossy().contains("xapi-storage-qcow2") {
                    found.push(path.clone());
                }
                if entry.file_type().unwrap().is_dir() {
                    directories.push(path);
                }
            }
        }
        found
    }
}

/// Copies a program below a root, with the libraries that it needs.
fn put(program: &Path, root: &Path) -> Result<()> {
    let to = root.join(program.strip_prefix("/")?);
    fs::create_dir_all(to.parent().context("a program in no directory")?)?;
    fs::copy(program, &to).with_context(|| program.display().to_string())?;
    libraries(program, root)
}

fn libraries(program: &Path, root: &Path) -> Result<()> {
    // It fails for a program without any.
    let output = Command::new("ldd").arg(program).stdin(Stdio::null()).output().context("ldd")?;
    for word in String::from_utf8_lossy(&output.stdout).split_whitespace().filter(|word| word.starts_with('/')) {
        let to = root.join(word.trim_start_matches('/'));
        if !to.exists() {
            fs::create_dir_all(to.parent().context("a library in no directory")?)?;
            fs::copy(word, &to).with_context(|| word.to_owned())?;
        }
    }
    Ok(())
}
