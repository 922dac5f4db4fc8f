//! packaging/install.sh: what it puts into the directories that xapi-storage-script watches, and how.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const PLUGINS: [(&str, &str); 2] = [
    ("volume/org.xen.xapi.storage.qcow2", "xapi-storage-qcow2-volume"),
    ("datapath/qsd", "xapi-storage-qcow2-datapath"),
];

/// A place to install to, with a name that a careless script trips over.
struct Stage {
    _dir: tempfile::TempDir,
    destination: PathBuf,
}

impl Stage {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let destination = dir.path().join("a place, with 'quotes' & $spaces");
        Self { _dir: dir, destination }
    }

    fn scripts(&self) -> PathBuf {
        self.destination.join("usr/libexec/xapi-storage-script")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/install.sh"));
        command.args(arguments).env("DESTDIR", &self.destination).env("BUILD", executables());
        command.stdin(Stdio::null()).current_dir("/");
        command
    }

    fn run(&self, arguments: &[&str]) {
        succeeded(&self.command(arguments).output().unwrap());
    }

    /// Every path below the scripts' directory, relative to it.
    fn tree(&self) -> BTreeSet<String> {
        fn walk(root: &Path, dir: &Path, found: &mut BTreeSet<String>) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                found.insert(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned());
                if path.symlink_metadata().unwrap().is_dir() {
                    walk(root, &path, found);
                }
            }
        }
        let mut found = BTreeSet::new();
        walk(&self.scripts(), &self.scripts(), &mut found);
        found
    }
}

/// The directory of the executables that were built with this test.
fn executables() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    own.ancestors().nth(2).unwrap().to_owned()
}

fn succeeded(output: &Output) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {stderr}", output.status);
}

/// The methods that an executable says it has.
fn methods(executable: &str) -> BTreeSet<String> {
    let output = Command::new(executables().join(executable)).arg("--list-methods").output().unwrap();
    succeeded(&output);
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn a_plugins_directory_holds_its_executable_a_link_for_each_method_and_the_observer_and_nothing_else() {
    let stage = Stage::new();
    stage.run(&[]);
    let mut expected: BTreeSet<String> = ["volume", "datapath"].map(str::to_owned).into();
    for (directory, executable) in PLUGINS {
        let methods = methods(executable);
        assert!(methods.contains("Plugin.Query"), "{methods:?}");
        expected.insert(directory.to_owned());
        expected.insert(format!("{directory}/{executable}"));
        expected.insert(format!("{directory}/observer.py"));
        for method in &methods {
            expected.insert(format!("{directory}/{method}"));
            let link = stage.scripts().join(directory).join(method);
            assert_eq!(fs::read_link(&link).unwrap(), Path::new(executable));
        }
    }
    assert_eq!(stage.tree(), expected);
}

#[test]
fn what_is_installed_can_be_run_by_all_and_changed_by_its_owner_only() {
    let stage = Stage::new();
    // Whatever the mask of who installs.
    let script = "umask 077; exec \"$0\"";
    let inner = stage.command(&[]);
    let mut outer = Command::new("sh");
    outer.args(["-c", script]).arg(inner.get_program()).stdin(Stdio::null());
    outer.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    succeeded(&outer.output().unwrap());
    let own = rustix::process::geteuid().as_raw();
    for path in stage.tree() {
        let metadata = stage.scripts().join(&path).symlink_metadata().unwrap();
        assert_eq!(metadata.uid(), own, "{path}");
        if !metadata.is_symlink() {
            let mode = if path.ends_with(".py") { 0o644 } else { 0o755 };
            assert_eq!(metadata.permissions().mode() & 0o7777, mode, "{path}");
        }
    }
}

#[test]
fn the_administrators_program_comes_and_goes_with_the_plugins() {
    let stage = Stage::new();
    let program = stage.destination.join("usr/sbin/xapi-storage-qcow2");
    for _ in 0..2 {
        stage.run(&[]);
        assert_eq!(fs::metadata(&program).unwrap().permissions().mode() & 0o7777, 0o755);
        assert_eq!(fs::read_dir(program.parent().unwrap()).unwrap().count(), 1);
    }
    succeeded(&Command::new(&program).arg("--help").output().unwrap());
    stage.run(&["--uninstall"]);
    assert!(!program.exists());
}

#[test]
fn a_link_answers_as_its_method() {
    let stage = Stage::new();
    stage.run(&[]);
    for (directory, plugin) in [(PLUGINS[0].0, "qcow2"), (PLUGINS[1].0, "qsd")] {
        let mut child = Command::new(stage.scripts().join(directory).join("Plugin.Query"))
            .arg("--json")
            .env("XAPI_STORAGE_QCOW2_ROOT", &stage.destination)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(br#"{"dbg":"test"}"#).unwrap();
        let output = child.wait_with_output().unwrap();
        succeeded(&output);
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(answer["plugin"], plugin);
    }
}

#[test]
fn an_upgrade_replaces_a_directory_whole_while_its_name_stays() {
    let stage = Stage::new();
    stage.run(&[]);
    let fresh = stage.tree();
    let old = stage.scripts().join(PLUGINS[0].0);
    symlink("gone", old.join("Volume.of_an_older_version")).unwrap();
    let inode = fs::metadata(&old).unwrap().ino();

    // A watcher that sees the name missing once has seen the plugin removed.
    let done = std::sync::atomic::AtomicBool::new(false);
    let (looks, missing) = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let (mut looks, mut missing) = (0_u64, 0_u64);
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                looks += 1;
                missing += u64::from(fs::symlink_metadata(old.join("Plugin.Query")).is_err());
            }
            (looks, missing)
        });
        stage.run(&[]);
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        watcher.join().unwrap()
    });
    assert!(looks > 0);
    assert_eq!(missing, 0, "of {looks} looks");
    assert_ne!(fs::metadata(&old).unwrap().ino(), inode);
    assert_eq!(stage.tree(), fresh);
}

#[test]
fn what_an_installation_left_that_was_killed_is_cleared_by_the_next() {
    let stage = Stage::new();
    stage.run(&[]);
    let fresh = stage.tree();
    fs::create_dir_all(stage.scripts().join(".xapi-storage-qcow2.killed/volume")).unwrap();
    stage.run(&[]);
    assert_eq!(stage.tree(), fresh);
}

#[test]
fn an_executable_that_is_missing_changes_nothing() {
    let stage = Stage::new();
    stage.run(&[]);
    let before = stage.tree();
    let inodes = PLUGINS.map(|(directory, _)| fs::metadata(stage.scripts().join(directory)).unwrap().ino());
    let build = tempfile::tempdir().unwrap();
    let datapath = PLUGINS[1].1;
    fs::copy(executables().join(datapath), build.path().join(datapath)).unwrap();
    let output = stage.command(&[]).env("BUILD", build.path()).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("xapi-storage-qcow2-volume is missing"));
    assert_eq!(stage.tree(), before);
    assert_eq!(PLUGINS.map(|(directory, _)| fs::metadata(stage.scripts().join(directory)).unwrap().ino()), inodes);
}

#[test]
fn uninstalling_removes_both_plugins_and_leaves_those_of_others() {
    let stage = Stage::new();
    stage.run(&["--uninstall"]);
    stage.run(&[]);
    fs::create_dir(stage.scripts().join("volume/org.xen.xapi.storage.other")).unwrap();
    stage.run(&["--uninstall"]);
    stage.run(&["--uninstall"]);
    let left = ["datapath", "volume", "volume/org.xen.xapi.storage.other"].map(str::to_owned);
    assert_eq!(stage.tree(), left.into());
}
