//! Plugin.diagnostics and `xapi-storage-qcow2 status`: one picture, which tells whatever there is and never fails for it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use plugin::activation;
use plugin::attachment::Attachment;
use plugin::host::Host;
use plugin::id::VolumeUri;
use plugin::store::Mode;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use support::{Bench, Guest, MIB};
use uuid::Uuid;

fn diagnostics(bench: &Bench) -> String {
    let text = bench.host.call("Plugin.diagnostics", json!({"dbg": ""}));
    text.as_str().unwrap().to_owned()
}

fn status(bench: &Bench, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xapi-storage-qcow2"));
    command.arg("status").args(arguments).env("XAPI_STORAGE_QCOW2_ROOT", &bench.host.root);
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A running guest's volume, released at the end.
struct Running {
    host: Host,
    uri: VolumeUri,
}

impl Running {
    fn new(bench: &Bench, volume: &str) -> Self {
        let uri: VolumeUri = format!("qsd://{}/{volume}", bench.sr).parse().unwrap();
        let host = Host::at(&bench.host.root);
        let domain = "7".parse().unwrap();
        activation::attach(&host, uri, &domain).unwrap();
        activation::activate(&host, uri, &domain, Mode::ReadWrite).unwrap();
        Self { host, uri }
    }

    fn daemon(&self) -> Pid {
        Pid::from_raw(Attachment::seen(&self.host, self.uri.volume).unwrap().unwrap().pid.unwrap()).unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = activation::release(&self.host, self.uri, &"7".parse().unwrap());
    }
}

#[test]
fn diagnostics_tell_programs_srs_trees_daemons_and_what_failed_last() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    let (first, second) = (bench.snapshot(&volume), bench.snapshot(&volume));
    bench.destroy(&first);
    let tree = bench.tree(&volume);
    bench.code("Volume.resize", json!({"key": volume, "new_size": -1}));
    let running = Running::new(&bench, &volume);
    let socket = running.host.volume_dir(running.uri.volume).join("nbd.sock");
    let guest = Guest::connect(&socket, &volume, true);
    let text = diagnostics(&bench);
    let pid = running.daemon().as_raw_nonzero();
    let path = bench.path.display().to_string();
    for part in [
        &format!("xapi-storage-qcow2 {}\n", env!("CARGO_PKG_VERSION")),
        &format!("host {}, boot ", running.host.uuid().unwrap()),
        "qemu-storage-daemon ",
        ": can do all that is needed",
        &format!("  {} \"", bench.sr),
        &format!(" at {path}\n"),
        "volumes 2, trees 1, hidden nodes 1, longest chain 3",
        "  nodes 3, hidden 1, depth 3\n",
        "      hidden  node ",
        "      └─ \"",
        &format!("{second}  node "),
        "active rw on this host  domains 7",
        &format!("  {volume}  daemon {pid}, "),
        "  open rw, 3 images  clients 1  domain 7 rw\n",
        &format!("    of SR {}\n", bench.sr),
        "Volume.resize SR_BACKEND_FAILURE_79: ",
        &format!("    SR {}, volume {volume}", bench.sr),
    ] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
    for node in tree["nodes"].as_object().unwrap().keys() {
        assert!(text.contains(node), "{node} is not in\n{text}");
    }
    // The same picture in short.
    let short = status(&bench, &[]);
    assert!(short.contains("  open rw, 3 images  clients 1  domain 7 rw\n") && short.len() < text.len(), "{short}");
    guest.disconnect();
}

#[test]
fn whatever_is_torn_or_hangs_is_told_and_nobody_fails_or_waits_for_it() {
    let bench = Bench::new();
    let (volume, other) = (bench.create(MIB), bench.create(MIB));
    let running = Running::new(&bench, &volume);
    kill_process(running.daemon(), Signal::STOP).unwrap();
    let run = bench.host.root.join("run/xapi-storage-qcow2");
    let tear = |path: &std::path::Path| {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "{\"format\": 1, \"torn").unwrap();
    };
    let (mirror, sr) = (Uuid::new_v4().to_string(), Uuid::new_v4().to_string());
    let torn = [
        bench.tree_directory(&other).join("tree.json"),
        run.join(format!("volumes/{}/state.json", Uuid::new_v4())),
        run.join(format!("mirrors/{mirror}/state.json")),
        run.join(format!("srs/{sr}.json")),
        run.join(format!("gc/{}.json", bench.sr)),
        bench.host.root.join("etc/xapi-storage-qcow2.json"),
        bench.host.root.join("etc/xensource-inventory"),
    ];
    let whole = torn.clone().map(|path| fs::read(path).ok());
    torn.iter().for_each(|path| tear(path));
    let begun = Instant::now();
    let (text, short, fields) = (diagnostics(&bench), status(&bench, &[]), status(&bench, &["--json"]));
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    let fields: Value = serde_json::from_str(&fields).unwrap();
    for path in &torn {
        let path = path.display().to_string();
        let (in_text, in_fields) = (text.contains(&path), fields.to_string().contains(&path));
        assert!(in_text && in_fields, "{path}: {in_text} {in_fields}\n{text}");
    }
    for part in [&format!("mirror {mirror}: "), "settings: ", "  open rw, 1 images  domain 7 rw", "trees 1"] {
        assert!(short.contains(part), "{part:?} is not in\n{short}");
    }
    for (path, whole) in torn.iter().zip(whole) {
        whole.map_or_else(|| fs::remove_file(path), |bytes| fs::write(path, bytes)).unwrap();
    }
    // The one of the SR itself, too.
    let record = bench.path.join("sr.json");
    let whole = fs::read(&record).unwrap();
    tear(&record);
    for text in [diagnostics(&bench), status(&bench, &[])] {
        assert!(text.contains(&record.display().to_string()), "{text}");
    }
    fs::write(&record, whole).unwrap();
    kill_process(running.daemon(), Signal::CONT).unwrap();
}
