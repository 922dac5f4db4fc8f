//! Programs of all kinds in the places where storage daemons are looked for.

use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

/// A host of its own, in whose directories a test puts programs.
struct Machine {
    root: tempfile::TempDir,
    host: Host,
}

/// The directory that is looked at first, and that of XenServer's package.
const FIRST: &str = "usr/libexec/xapi-storage-qcow2";
const LAST: &str = "usr/lib64/qemu-dp/bin";

impl Machine {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        Self { host: Host::at(root.path()), root }
    }

    /// Puts a script in a directory; each start of it adds a line to `started` beside it.
    fn script(&self, directory: &str, name: &str, text: &str) -> PathBuf {
        let directory = self.root.path().join(directory);
        fs::create_dir_all(&directory).unwrap();
        let path = directory.join(name);
        // A file that is open for writing in another thread's child cannot be run; one that was renamed is not open.
        let new = directory.join("new");
        fs::write(&new, format!("#!/bin/sh\necho >> \"$0.started\"\n{text}\n")).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(&new, &path).unwrap();
        path
    }

    /// Puts a script in a directory that answers as another version does, without some of what that can do.
    fn older(&self, directory: &str, edit: &str) -> PathBuf {
        let real = program::find(NAME).unwrap();
        self.script(directory, NAME, &format!("{} \"$@\" | sed -u -e '{edit}'", real.display()))
    }

    /// Counts the starts of a script.
    fn started(path: &Path) -> usize {
        fs::read_to_string(format!("{}.started", path.display())).map_or(0, |text| text.lines().count())
    }
}

fn wrapper() -> String {
    format!("exec {} \"$@\"", program::find(NAME).unwrap().display())
}

#[test]
fn the_installed_daemon_can_do_what_is_needed_and_is_asked_once() {
    let machine = Machine::new();
    let daemon = storage_daemon(&machine.host).unwrap();
    assert!(daemon.path.is_absolute() && daemon.version.contains('.'), "{daemon:?}");
    let kept = machine.host.runtime_dir().join("programs.json");
    let first = fs::metadata(&kept).unwrap().ino();
    assert_eq!(storage_daemon(&machine.host).unwrap(), daemon);
    assert_eq!(fs::metadata(&kept).unwrap().ino(), first);
}

#[test]
fn xenservers_package_is_found_and_its_device_model_is_left_alone() {
    let machine = Machine::new();
    let wrong = machine.script(LAST, "qemu-dp", "exit 1");
    let path = machine.script(LAST, NAME, &wrapper());
    assert_eq!(storage_daemon(&machine.host).unwrap().path, path);
    assert_eq!((Machine::started(&path), Machine::started(&wrong)), (1, 0));
}

#[test]
fn the_first_one_that_lacks_nothing_is_used() {
    let machine = Machine::new();
    let old = machine.older(FIRST, r#"s/"major": [0-9]*/"major": 6/"#);
    let poor = machine.older("usr/bin", r#"s/"name": "blockdev-reopen"/"name": "blockdev-reopened"/"#);
    let good = machine.script(LAST, NAME, &wrapper());
    assert_eq!(storage_daemon(&machine.host).unwrap().path, good);
    let kept: Findings = record::read(&machine.host.runtime_dir().join("programs.json")).unwrap();
    let lacks = |path: &Path| kept.programs[path].lacks.clone().unwrap();
    assert!(lacks(&old).contains("is older than 7.0"), "{}", lacks(&old));
    assert!(lacks(&poor).contains("the command blockdev-reopen"), "{}", lacks(&poor));
    // What they lack is known now.
    assert_eq!(storage_daemon(&machine.host).unwrap().path, good);
    assert_eq!([&old, &poor, &good].map(|path| Machine::started(path)), [1, 1, 1]);
}

#[test]
fn a_program_that_was_exchanged_is_asked_again() {
    let machine = Machine::new();
    let path = machine.older(FIRST, r#"s/"name": "throttle"/"name": "x"/; s/"case": "throttle"/"case": "x"/"#);
    assert_ne!(storage_daemon(&machine.host).unwrap().path, path);
    machine.script(FIRST, NAME, &wrapper());
    assert_eq!(storage_daemon(&machine.host).unwrap().path, path);
    assert_eq!(Machine::started(&path), 2);
}

#[test]
fn a_bound_for_handshakes_is_asked_for_where_there_is_one() {
    let machine = Machine::new();
    let path = machine.older(FIRST, r#"s/"handshake-max-seconds"/"another-name"/g"#);
    let found = storage_daemon(&machine.host).unwrap();
    assert!(found.path == path && !found.bounds_handshake, "{found:?}");
}

#[test]
fn what_does_not_answer_is_passed_over_and_tried_again() {
    let machine = Machine::new();
    let failing = machine.script(FIRST, NAME, "echo broken >&2; exit 1");
    let silent = machine.script("usr/local/bin", NAME, "exit 0");
    let talking = machine.script("usr/bin", NAME, "echo hello");
    let found = storage_daemon(&machine.host).unwrap();
    assert!(![&failing, &silent, &talking].contains(&&found.path));
    storage_daemon(&machine.host).unwrap();
    assert_eq!(Machine::started(&failing), 2);
}

#[test]
fn a_directory_or_a_file_that_cannot_be_run_is_no_program() {
    let machine = Machine::new();
    fs::create_dir_all(machine.root.path().join(FIRST).join(NAME)).unwrap();
    let plain = machine.script("usr/local/bin", NAME, &wrapper());
    fs::set_permissions(&plain, fs::Permissions::from_mode(0o644)).unwrap();
    let link = machine.root.path().join("usr/bin").join(NAME);
    fs::create_dir_all(link.parent().unwrap()).unwrap();
    symlink("nowhere", &link).unwrap();
    let found = storage_daemon(&machine.host).unwrap();
    assert!(!found.path.starts_with(machine.root.path()), "{found:?}");
}

#[test]
fn findings_that_cannot_be_read_are_made_anew() {
    let machine = Machine::new();
    let kept = machine.host.runtime_dir().join("programs.json");
    for damage in ["", "{}", r#"{"format": 99}"#] {
        machine.host.make_runtime_dir(&machine.host.runtime_dir()).unwrap();
        fs::write(&kept, damage).unwrap();
        storage_daemon(&machine.host).unwrap();
        assert_eq!(record::read::<Findings>(&kept).unwrap().programs.len(), 1);
    }
}

#[test]
fn what_is_not_there_is_said_and_where() {
    let nowhere = understand(b"", FileIdentity::default()).unwrap_err();
    assert_eq!(nowhere, "it did not answer");
    assert!(program::nowhere().contains("/usr/lib64/qemu-dp/bin"));
}
