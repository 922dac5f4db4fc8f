//! An SR that is well: nothing is found, whatever is just being done with it.

use std::fs;

use plugin::activation;
use plugin::host::Host;
use plugin::id::{Domain, VolumeUri};
use plugin::store::Mode;
use serde_json::{Value, json};

use crate::program::{assert_well, check, run};
use crate::support::{Bench, Guest, MIB, key, write};

/// A volume that is attached and active until this is dropped, also by a check that fails.
struct Active {
    host: Host,
    uri: VolumeUri,
    domain: Domain,
}

impl Drop for Active {
    fn drop(&mut self) {
        let released = activation::release(&self.host, self.uri, &self.domain);
        assert!(released.is_ok() || std::thread::panicking(), "{released:?}");
    }
}

/// Attaches and activates a volume.
fn activated(bench: &Bench, volume: &str, domain: &str, mode: Mode) -> Active {
    let host = Host::at(&bench.host.root);
    let uri: VolumeUri = format!("qsd://{}/{volume}", bench.sr).parse().unwrap();
    let domain: Domain = domain.parse().unwrap();
    let active = Active { host, uri, domain };
    activation::attach(&active.host, uri, &active.domain).unwrap();
    activation::activate(&active.host, uri, &active.domain, mode).unwrap();
    active
}

#[test]
fn nothing_is_found_after_any_operation() {
    let bench = Bench::new();
    let well = || assert_well(&bench.host, &bench.path, &["--fast"]);
    well();
    let volume = bench.create(4 * MIB);
    well();
    write(&bench.node_file(&volume), 1, 0, MIB);
    bench.call("Volume.enable_cbt", json!({"key": volume}));
    let snapshot = bench.snapshot(&volume);
    well();
    let clone = bench.clone_of(&volume);
    well();
    bench.call("Volume.resize", json!({"key": clone, "new_size": 8 * MIB}));
    well();
    bench.call("Volume.revert", json!({"key": volume, "snapshot": snapshot}));
    well();
    let parent = bench.create(4 * MIB);
    let child = bench.create(4 * MIB);
    bench.call("Volume.compose", json!({"key": child, "key2": parent}));
    well();
    key(&bench.call("Volume.copy", json!({"key": volume, "dest_sr": bench.sr})));
    well();
    bench.call("Volume.set", json!({"key": volume, "k": "k", "v": "v"}));
    let second = bench.snapshot(&volume);
    bench.call("Volume.data_destroy", json!({"key": second}));
    well();
    bench.destroy(&snapshot);
    well();
    bench.destroy(&clone);
    bench.destroy(&volume);
    well();
    assert_well(&bench.host, &bench.path, &[]);
    let by_uuid = run(&bench.host, &["check", &bench.sr]);
    assert!(by_uuid.status == 0 && by_uuid.text.contains("all is well"), "{}", by_uuid.text);
}

#[test]
fn nothing_is_found_while_guests_have_volumes_open() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    let snapshot = bench.snapshot(&volume);
    let active = activated(&bench, &volume, "7", Mode::ReadWrite);
    let reading = activated(&bench, &snapshot, "8", Mode::ReadOnly);
    let mut guest = Guest::connect(&active.host.volume_dir(active.uri.volume).join("nbd.sock"), &volume, true);
    guest.write(1, 0, MIB);
    assert_well(&bench.host, &bench.path, &[]);
    bench.snapshot(&volume);
    guest.write(2, 0, 65536);
    assert_well(&bench.host, &bench.path, &[]);
    bench.clone_of(&volume);
    assert_well(&bench.host, &bench.path, &["--repair"]);
    guest.read(2, 0, 65536);
    guest.disconnect();
    let drawn = run(&bench.host, &["tree", &bench.sr, &volume]);
    assert!(drawn.text.contains("active rw on this host") && drawn.text.contains("domains 7"), "{}", drawn.text);

    // The record lost while the guest has the volume open: what it writes to is known from its daemon.
    let record = bench.tree_directory(&volume).join("tree.json");
    let whole = fs::read(&record).unwrap();
    fs::write(&record, &whole[..whole.len() / 3]).unwrap();
    fs::remove_file(record.with_file_name("spare")).unwrap();
    let (status, report) = check(&bench.host, &bench.path, &["--repair"]);
    assert_eq!(status, 0, "{report:#}");
    let (before, after): (Value, Value) = (serde_json::from_slice(&whole).unwrap(), bench.tree(&volume));
    for key in [&volume, &snapshot] {
        assert_eq!(after["volumes"][key]["node"], before["volumes"][key]["node"]);
        assert_eq!(after["volumes"][key]["active"], before["volumes"][key]["active"]);
    }
    drop((active, reading));
    assert_well(&bench.host, &bench.path, &[]);
}

#[test]
fn a_daemon_that_died_is_found_and_is_no_reason_to_touch_anything() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let active = activated(&bench, &volume, "7", Mode::ReadWrite);
    let state = active.host.volume_dir(active.uri.volume).join("state.json");
    let state: Value = serde_json::from_slice(&fs::read(state).unwrap()).unwrap();
    let pid = i32::try_from(state["daemon"]["pid"].as_i64().unwrap()).unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::KILL)
        .unwrap();
    while check(&bench.host, &bench.path, &["--fast"]).0 == 0 {}
    let (status, report) = check(&bench.host, &bench.path, &["--fast", "--repair"]);
    assert!(status == 1 && report["findings"][0]["what"].as_str().unwrap().contains("domains 7"), "{report:#}");
    drop(active);
    assert_well(&bench.host, &bench.path, &["--fast"]);
}

#[test]
fn nothing_is_found_while_calls_are_at_work() {
    let bench = Bench::new();
    let kept = bench.create(MIB);
    let is_done = std::sync::atomic::AtomicBool::new(false);
    let order = std::sync::atomic::Ordering::SeqCst;
    std::thread::scope(|scope| {
        let at_work = scope.spawn(|| {
            // However it ends.
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                for _ in 0..6 {
                    let (child, parent) = (bench.create(MIB), bench.create(MIB));
                    let snapshot = bench.snapshot(&child);
                    bench.destroy(&snapshot);
                    bench.host.gc(&bench.sr);
                    bench.call("Volume.compose", json!({"key": child, "key2": parent}));
                    bench.destroy(&bench.clone_of(&kept));
                    bench.destroy(&child);
                }
            }));
            is_done.store(true, order);
            ended
        });
        while !is_done.load(order) {
            assert_well(&bench.host, &bench.path, &["--fast"]);
        }
        at_work.join().unwrap().unwrap();
    });
    assert_well(&bench.host, &bench.path, &["--fast"]);
}
