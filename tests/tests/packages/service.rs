//! How a service becomes what it is to be, and its sandbox, without systemd.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::is_root;
use super::scratch::{Kind, Scratch, build, package};

/// The most that `systemd-analyze security` may hold against a unit, in tenths, by what the unit is for.
const EXPOSURE: [(&str, &str); 5] =
    [("daemon", "15"), ("device", "26"), ("gc", "20"), ("import", "20"), ("mirror", "20")];

/// The directory of the service's start below a root.
const LAUNCH: &str = "run/xapi-storage-qcow2/launch/x@1.service";

/// Runs the entry of a service as systemd does, with what it is to be written down below a root of its own. Gives the exit
/// status, what the program printed, what systemd was told and the process that it was told of.
fn become_program(root: &Path, program: &str, arguments: &[&str]) -> (Option<i32>, String, String, Value, u32) {
    let order = json!({"program": program, "arguments": arguments});
    become_ordered(root, order)
}

/// As [`become_program`], with more of what is written down.
fn become_ordered(root: &Path, mut order: Value) -> (Option<i32>, String, String, Value, u32) {
    let launch = root.join(LAUNCH);
    fs::create_dir_all(&launch).unwrap();
    let log = root.join("log");
    fs::write(&log, "of an earlier one").unwrap();
    let common = json!({"format": 1, "environment": [["LC_ALL", "C"], ["WORD", "a b"]], "log": log});
    order.as_object_mut().unwrap().extend(common.as_object().unwrap().clone());
    fs::write(launch.join("order.json"), order.to_string()).unwrap();
    let socket = UnixDatagram::bind(root.join("notify")).unwrap();
    socket.set_nonblocking(true).unwrap();
    let mut child = Command::new(build().join("xapi-storage-qcow2-datapath"))
        .args(["service", "x@1.service"])
        .env("XAPI_STORAGE_QCOW2_ROOT", root)
        .env("NOTIFY_SOCKET", root.join("notify"))
        .env("SECRET", "of the manager")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let status = child.wait().unwrap();
    let mut told = [0; 64];
    let told = socket.recv(&mut told).map_or(String::new(), |length| String::from_utf8_lossy(&told[..length]).into());
    let started = fs::read(launch.join("started.json")).ok();
    let started = started.map_or(Value::Null, |bytes| serde_json::from_slice(&bytes).unwrap());
    (status.code(), fs::read_to_string(log).unwrap(), told, started, child.id())
}

#[test]
fn a_service_tells_who_it_is_and_becomes_its_program() {
    let root = tempfile::tempdir().unwrap();
    let (status, log, told, started, pid) =
        become_program(root.path(), "/bin/sh", &["-c", "echo $$ $0 \"$WORD\" \"$SECRET\" $PWD; exit 3", "a b"]);
    assert_eq!(status, Some(3));
    assert_eq!(log, format!("{pid} a b a b  /\n"));
    assert_eq!(told, "READY=1");
    assert_eq!(started["process"]["pid"], pid);
}

#[test]
fn a_service_whose_program_cannot_be_run_says_so_in_the_programs_log() {
    let root = tempfile::tempdir().unwrap();
    let (status, log, _, started, pid) = become_program(root.path(), "/nonexistent/program", &[]);
    assert_eq!(status, Some(1));
    assert!(log.contains("starting /nonexistent/program failed"), "{log}");
    assert_eq!(started["process"]["pid"], pid, "the caller sees by it that it has ended");
}

#[test]
fn a_service_that_nobody_waits_for_clears_away_what_it_was_started_by() {
    let root = tempfile::tempdir().unwrap();
    let order = json!({"program": "/bin/sh", "arguments": ["-c", "echo $$"], "unwatched": true});
    let (status, log, told, started, pid) = become_ordered(root.path(), order);
    assert_eq!((status, log, told.as_str()), (Some(0), format!("{pid}\n"), "READY=1"));
    assert_eq!(started, Value::Null);
    assert!(!root.path().join(LAUNCH).exists());
}

#[test]
fn a_service_that_nobody_asked_for_becomes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let output = Command::new(build().join("xapi-storage-qcow2-datapath"))
        .args(["service", "x@1.service"])
        .env("XAPI_STORAGE_QCOW2_ROOT", root.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("order.json"), "{output:?}");
}

#[test]
fn the_units_are_well_formed_and_confined() {
    if !is_root() {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(Kind::Deb).unwrap();
    scratch.install(&package(Kind::Deb, &build(), 1, files.path()).unwrap()).unwrap();
    let units = scratch.root().join("usr/lib/systemd/system");
    let mut count = 0;
    for entry in fs::read_dir(&units).unwrap() {
        let template = entry.unwrap().path();
        let text = fs::read_to_string(&template).unwrap();
        let command = text.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
        let program = scratch.root().join(command.split(' ').next().unwrap().trim_start_matches('/'));
        assert_eq!(fs::metadata(&program).unwrap().permissions().mode() & 0o111, 0o111, "{program:?}");
        let name = template.file_name().unwrap().to_str().unwrap();
        let purpose = name.strip_prefix("xapi-storage-qcow2-").unwrap().strip_suffix("@.service").unwrap();
        let (_, exposure) = EXPOSURE.into_iter().find(|(of, _)| *of == purpose).unwrap();
        // As an instance, and with a command that this machine has.
        let instance = files.path().join(name.replace("@.", "@x."));
        fs::write(&instance, text.replace(command, "/bin/true")).unwrap();
        for arguments in [&["verify"][..], &["security", "--offline=yes", "--no-pager", "--threshold", exposure]] {
            let output = Command::new("systemd-analyze")
                .args(arguments)
                .arg(&instance)
                .env("SYSTEMD_LOG_LEVEL", "warning")
                .output()
                .unwrap();
            assert!(output.status.success(), "{arguments:?}: {output:?}");
            assert!(output.stderr.is_empty(), "{arguments:?}: {output:?}");
        }
        count += 1;
    }
    assert_eq!(count, EXPOSURE.len());
}
