//! What older versions wrote below /run, of processes that have died and of such that live.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::older::{ALL, Site, files};

/// The boot in which the files were made.
fn boot_of(version: &str) -> String {
    let state: Value = serde_json::from_slice(&fs::read(files(version).join("run/running.json")).unwrap()).unwrap();
    state["boot_id"].as_str().unwrap().to_owned()
}

/// Puts a version's state where it was, in the boot in which it was written; the processes have died since.
fn put_back(site: &Site, version: &str) {
    let expected = &site.expected;
    site.boot(&boot_of(version));
    let volume =
        |name: &str| expected.named.get(name).map_or_else(String::new, |key| format!("volumes/{key}/state.json"));
    for (name, to) in [
        ("sr", format!("srs/{}.json", expected.sr)),
        ("running", volume("running")),
        ("destination", volume("destination")),
        ("import", volume("target")),
        ("switched", volume("switched")),
        ("thrown", volume("thrown away")),
        ("mirror", format!("mirrors/{}/state.json", expected.mirror)),
        ("gc", format!("gc/{}.json", expected.sr)),
    ] {
        let Ok(text) = fs::read_to_string(files(version).join("run").join(format!("{name}.json"))) else { continue };
        let mut record: Value = serde_json::from_str(&text).unwrap();
        if name == "sr" {
            record["uri"] = site.configuration()["uri"].clone();
        }
        let to = site.run().join(to);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::write(to, record.to_string()).unwrap();
    }
}

#[test]
fn what_died_with_an_older_version_is_told_and_cleared_away() {
    for version in ALL {
        let site = Site::of(version);
        put_back(&site, version);
        let running = site.volume("running");
        let status = site.admin(&["status"]);
        for told in [running, site.volume("target"), &site.expected.mirror, &site.expected.sr] {
            assert!(status.contains(told), "{version}: {status}");
        }
        for method in ["Plugin.diagnostics", "SR.stat"] {
            site.call(method, json!({}));
        }
        let operation = json!({"operation": ["MirrorV1", site.expected.mirror]});
        let stat = site.call("Data.stat", operation.clone());
        assert_eq!((&stat["failed"], &stat["complete"]), (&json!(true), &json!(false)), "{version}");
        site.call("Data.destroy", operation);
        // The guest is told nothing worse than that its disk went, and it is there for the next one.
        let end = |volume: &str, domain: &str| {
            let request = json!({"uri": site.uri(volume), "domain": domain});
            let _ = site.try_call("Datapath.deactivate", request.clone());
            site.call("Datapath.detach", request);
        };
        end(running, "5");
        end(site.volume("destination"), "MIR2");
        end(site.volume("target"), "MIR3");
        end(site.volume("switched"), "6");
        if let Some(thrown) = site.expected.named.get("thrown away") {
            end(thrown, "1");
        }
        site.datapath(&["attach", "activate"], running, "7");
        site.io(running, "read -P 10 0 64k");
        site.datapath(&["deactivate", "detach"], running, "7");
        site.call("SR.detach", json!({}));
        let left: Vec<_> = fs::read_dir(site.run().join("volumes")).unwrap().collect();
        assert!(left.is_empty(), "{version}: {left:?}");
    }
}

/// A storage daemon's monitor.
struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    fn connect(path: &Path) -> Self {
        let mut monitor = Self { stream: BufReader::new(UnixStream::connect(path).unwrap()) };
        monitor.line();
        monitor.execute("qmp_capabilities", json!({}));
        monitor
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({"execute": command, "arguments": arguments});
        self.stream.get_mut().write_all(request.to_string().as_bytes()).unwrap();
        loop {
            let answer = self.line();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(answer) = answer.get("return") {
                return answer.clone();
            }
        }
    }
}

/// Makes of a volume's daemon what the oldest version had: no throttle between an image and its file, and no group for one.
fn as_the_oldest_had_it(site: &Site, volume: &str) {
    let directory = site.run().join("volumes").join(volume);
    let (tree, record) = site.tree(volume);
    let node = record["volumes"][volume]["node"].as_str().unwrap();
    let digits = &node.replace('-', "")[..30];
    let (format, file) = (format!("q{digits}"), format!("f{digits}"));
    let mut monitor = Monitor::connect(&directory.join("qmp.sock"));
    monitor.execute("block-export-del", json!({"id": "volume", "mode": "hard"}));
    while monitor.execute("query-block-exports", json!({})) != json!([]) {}
    for name in [&format, &file] {
        monitor.execute("blockdev-del", json!({"node-name": name}));
    }
    monitor.execute("object-del", json!({"id": "pace"}));
    let image = tree.join(format!("{node}.qcow2"));
    monitor
        .execute("blockdev-add", json!({"driver": "file", "node-name": file, "filename": image, "discard": "unmap"}));
    let options = json!({"driver": "qcow2", "node-name": format, "file": file, "discard": "unmap", "detect-zeroes": "unmap", "backing": null});
    monitor.execute("blockdev-add", options);
    let export = json!({"type": "nbd", "id": "volume", "name": volume, "node-name": format, "writable": true});
    monitor.execute("block-export-add", export);
}

/// Takes out of a record what an older version's has not, and puts in what only that has.
fn as_older(record: &mut Value, older: &Value) {
    let (Some(fields), Some(known)) = (record.as_object_mut(), older.as_object()) else { return };
    fields.retain(|name, _| known.contains_key(name));
    for (name, value) in known {
        match fields.get_mut(name) {
            // Of a map the keys are not fields.
            Some(field) if !["domains", "unflushed"].contains(&name.as_str()) => as_older(field, value),
            Some(_) => {}
            None => drop(fields.insert(name.clone(), value.clone())),
        }
    }
}

/// Rewrites a record as a version wrote it.
fn rewrite(path: &Path, version: &str, name: &str) {
    let mut record: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let older = fs::read(files(version).join("run").join(format!("{name}.json"))).unwrap();
    as_older(&mut record, &serde_json::from_slice(&older).unwrap());
    fs::write(path, record.to_string()).unwrap();
}

#[test]
fn what_an_older_version_started_goes_on_to_be_served() {
    let site = Site::new();
    let (guest, destination) = (site.create(), site.create());
    site.datapath(&["attach", "activate"], &guest, "5");
    site.io(&guest, "write -P 1 0 64k");
    as_the_oldest_had_it(&site, &guest);
    site.datapath(&["attach", "activate"], &destination, "MIR2");
    let state = |volume: &str| site.run().join("volumes").join(volume).join("state.json");
    let daemon = || serde_json::from_slice::<Value>(&fs::read(state(&guest)).unwrap()).unwrap()["daemon"].clone();
    let first = daemon();
    rewrite(&site.run().join("srs").join(format!("{}.json", site.expected.sr)), ALL[0], "sr");
    rewrite(&state(&guest), ALL[0], "running");
    rewrite(&state(&destination), ALL[0], "destination");
    let socket = site.run().join("volumes").join(&destination).join("nbd.sock");
    let remote = format!("nbd+unix:///{destination}?socket={}", socket.display());
    let mirror = site.call("Data.mirror", json!({"uri": site.uri(&guest), "domain": "5", "remote": remote}));
    let deadline = Instant::now() + Duration::from_secs(60);
    let complete = || site.call("Data.stat", json!({"operation": mirror}))["complete"] == json!(true);
    while !complete() {
        assert!(Instant::now() < deadline, "the mirror is not complete");
    }
    for version in ALL {
        rewrite(&site.run().join("mirrors").join(mirror[1].as_str().unwrap()).join("state.json"), version, "mirror");
        assert!(complete(), "{version}");
        rewrite(&state(&guest), version, "running");
        rewrite(&state(&destination), version, "destination");
        // Calls that come again change nothing.
        site.datapath(&["attach", "activate"], &guest, "5");
        site.datapath(&["attach", "activate"], &destination, "MIR2");
    }
    site.io(&guest, "write -P 2 128k 64k");
    rewrite(&state(&guest), ALL[0], "running");
    site.datapath(&["deactivate"], &guest, "5");
    assert!(complete(), "its drain");
    for (pattern, at) in [(1, 0), (2, 128)] {
        site.io(&destination, &format!("read -P {pattern} {at}k 64k"));
    }

    // Opened and snapshotted anew in the same daemon.
    site.datapath(&["activate"], &guest, "5");
    site.io(&guest, "write -P 3 256k 64k");
    as_the_oldest_had_it(&site, &guest);
    rewrite(&state(&guest), ALL[0], "running");
    let snapshot = site.snapshot(&guest);
    site.io(&guest, "write -P 4 256k 64k");
    site.datapath(&["deactivate"], &guest, "5");
    assert_eq!(daemon(), first, "it is the same daemon all the time");
    site.datapath(&["detach"], &guest, "5");
    site.datapath(&["deactivate", "detach"], &destination, "MIR2");
    site.datapath(&["attach", "activate_readonly"], &snapshot, "8");
    site.io(&snapshot, "read -P 3 256k 64k");
    site.datapath(&["deactivate", "detach"], &snapshot, "8");
    site.call("SR.detach", json!({}));
}
