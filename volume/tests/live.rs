//! Volumes that a guest has open: an NBD client of the storage daemon, which is the real one.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs;

use plugin::activation;
use plugin::attachment::Attachment;
use plugin::host::Host;
use plugin::id::{Domain, VolumeUri};
use plugin::store::Mode;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use support::{Bench, Guest, MIB, assert_reads, key};

/// A volume that is attached and activated for a domain until this is dropped.
struct Active<'a> {
    host: Host,
    uri: VolumeUri,
    domain: Domain,
    mode: Mode,
    /// Outlives this: the daemon is below its directory.
    _bench: &'a Bench,
}

impl<'a> Active<'a> {
    fn new(bench: &'a Bench, volume: &str, domain: &str, mode: Mode) -> Self {
        let uri: VolumeUri = format!("qsd://{}/{volume}", bench.sr).parse().unwrap();
        let host = Host::at(&bench.host.root);
        let active = Self { host, uri, domain: domain.parse().unwrap(), mode, _bench: bench };
        activation::attach(&active.host, uri, &active.domain).unwrap();
        activation::activate(&active.host, uri, &active.domain, mode).unwrap();
        active
    }

    fn guest(&self) -> Guest {
        let socket = self.host.volume_dir(self.uri.volume).join("nbd.sock");
        Guest::connect(&socket, &self.uri.volume.to_string(), self.mode == Mode::ReadWrite)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        let released = activation::release(&self.host, self.uri, &self.domain);
        if !std::thread::panicking() {
            released.unwrap();
            let left = Attachment::lock_existing(&self.host, self.uri.volume).unwrap();
            assert_eq!(left.is_none(), !self.host.volume_dir(self.uri.volume).exists());
        }
    }
}

#[test]
fn a_snapshot_of_an_active_volume_keeps_every_acknowledged_write() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    let active = Active::new(&bench, &volume, "7", Mode::ReadWrite);
    let mut guest = active.guest();
    let mut snapshots = Vec::new();
    for pattern in 1..=5 {
        guest.write(pattern, 0, MIB);
        guest.write(pattern, u64::from(pattern) * 65536 * 4, 65536);
        snapshots.push((pattern, bench.snapshot(&volume)));
    }
    guest.write(9, 0, MIB);
    guest.read(9, 0, MIB);
    for (pattern, snapshot) in &snapshots {
        assert_reads(&bench.node_file(snapshot), *pattern, 0, MIB);
        assert_reads(&bench.node_file(snapshot), *pattern, u64::from(*pattern) * 65536 * 4, 65536);
    }
    guest.disconnect();
    drop(active);
    assert_reads(&bench.node_file(&volume), 9, 0, MIB);
    assert_eq!(bench.tree(&volume)["volumes"][&volume].get("active"), None);
    bench.check();
}

#[test]
fn a_clone_of_an_active_volume_is_apart_from_it_at_once() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    let active = Active::new(&bench, &volume, "7", Mode::ReadWrite);
    let mut guest = active.guest();
    guest.write(1, 0, MIB);
    let clone = bench.clone_of(&volume);
    guest.write(2, 0, MIB);
    assert_reads(&bench.node_file(&clone), 1, 0, MIB);
    let other = Active::new(&bench, &clone, "8", Mode::ReadWrite);
    let mut second = other.guest();
    second.write(3, 0, MIB);
    guest.read(2, 0, MIB);
    guest.disconnect();
    second.disconnect();
    drop((active, other));
    assert_reads(&bench.node_file(&volume), 2, 0, MIB);
    assert_reads(&bench.node_file(&clone), 3, 0, MIB);
    bench.check();
}

#[test]
fn a_volume_that_is_only_read_can_be_snapshotted_and_then_written_to() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    support::write(&bench.node_file(&volume), 1, 0, MIB);
    let reading = Active::new(&bench, &volume, "7", Mode::ReadOnly);
    let mut reader = reading.guest();
    reader.read(1, 0, MIB);
    let snapshot = bench.snapshot(&volume);
    reader.read(1, 0, MIB);
    reader.disconnect();
    let writing = Active::new(&bench, &volume, "8", Mode::ReadWrite);
    let mut writer = writing.guest();
    writer.write(2, 0, MIB);
    writer.disconnect();
    activation::deactivate(&writing.host, writing.uri, &writing.domain).unwrap();
    drop((reading, writing));
    assert_eq!(Attachment::volumes(&Host::at(&bench.host.root)).unwrap(), []);
    assert_reads(&bench.node_file(&snapshot), 1, 0, MIB);
    assert_reads(&bench.node_file(&volume), 2, 0, MIB);
    bench.check();
}

#[test]
fn an_active_volume_grows_only_while_nobody_is_connected() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    let active = Active::new(&bench, &volume, "7", Mode::ReadWrite);
    let mut guest = active.guest();
    guest.write(1, 0, MIB);
    let request = json!({"key": volume, "new_size": 8 * MIB});
    assert_eq!(bench.code("Volume.resize", request.clone()), "SR_BACKEND_FAILURE_24");
    guest.write(2, 0, MIB);
    guest.disconnect();
    bench.call("Volume.resize", request);
    assert_eq!(bench.call("Volume.stat", json!({"key": volume}))["virtual_size"], json!(8 * MIB));
    let mut guest = active.guest();
    guest.write(3, 7 * MIB, MIB);
    guest.disconnect();
    drop(active);
    assert_reads(&bench.node_file(&volume), 3, 7 * MIB, MIB);
    bench.check();
}

#[test]
fn a_volume_that_a_guest_has_is_not_destroyed() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let active = Active::new(&bench, &volume, "7", Mode::ReadWrite);
    assert_eq!(bench.code("Volume.destroy", json!({"key": volume})), "SR_BACKEND_FAILURE_24");
    assert_eq!(bench.code("SR.detach", json!({})), "SR_BACKEND_FAILURE_16");
    let mut guest = active.guest();
    guest.write(1, 0, MIB);
    guest.disconnect();
    drop(active);
    bench.destroy(&volume);
    bench.check();
}

#[test]
fn a_migrations_domain_without_a_client_keeps_nothing_from_being_destroyed_or_detached() {
    let bench = Bench::new();
    for volume in [bench.create(MIB), bench.create(MIB)] {
        std::mem::forget(Active::new(&bench, &volume, "MIR0a1b2c", Mode::ReadWrite));
    }
    let keys = bench.keys();
    let host = Host::at(&bench.host.root);
    bench.destroy(&keys[0]);
    assert_eq!(Attachment::volumes(&host).unwrap().len(), 1);
    bench.call("SR.detach", json!({}));
    assert_eq!(Attachment::volumes(&host).unwrap(), []);
    assert_eq!(bench.tree(&keys[1])["volumes"][&keys[1]].get("active"), None);
}

#[test]
fn another_hosts_guest_keeps_this_host_off_with_its_uuid() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let other = bench.other_host();
    let active = Active::new(&bench, &volume, "7", Mode::ReadWrite);
    let holder = active.host.uuid().unwrap().to_string();
    for (method, more) in [
        ("Volume.snapshot", json!({})),
        ("Volume.clone", json!({})),
        ("Volume.destroy", json!({})),
        ("Volume.resize", json!({"new_size": 2 * MIB})),
    ] {
        let mut request = bench.request(json!({"key": volume}));
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let failure = other.try_call(method, request).unwrap_err();
        assert_eq!(failure.params, ["Activated_on_another_host".to_owned(), holder.clone()], "{method}");
    }
    other.call("Volume.set", bench.request(json!({"key": volume, "k": "a", "v": "b"})));
    drop(active);
    other.call("Volume.snapshot", bench.request(json!({"key": volume})));
    bench.check();
}

#[test]
fn a_snapshot_killed_anywhere_is_finished_or_undone_while_the_guest_goes_on() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    let active = Active::new(&bench, &volume, "7", Mode::ReadWrite);
    let mut guest = active.guest();
    let mut taken: Vec<(u8, String)> = Vec::new();
    for step in 1..500 {
        let pattern = u8::try_from(step % 200).unwrap() + 1;
        guest.write(pattern, 0, MIB);
        let request = bench.request(json!({"key": volume}));
        let killed = bench.host.killed_at("Volume.snapshot", &request, support::SPEAKING, step);
        // Any call that takes the tree's lock finishes it.
        bench.call("Volume.set", json!({"key": volume, "k": "step", "v": step.to_string()}));
        for new in bench.keys() {
            if new != volume && !taken.iter().any(|(_, old)| *old == new) {
                taken.push((pattern, new));
            }
        }
        guest.read(pattern, 0, MIB);
        bench.check_records();
        match killed {
            Some(true) => {}
            Some(false) => break,
            None => return guest.disconnect(),
        }
    }
    guest.write(255, 0, MIB);
    guest.disconnect();
    drop(active);
    assert!(taken.len() > 2, "{taken:?}");
    for (pattern, snapshot) in &taken {
        assert_reads(&bench.node_file(snapshot), *pattern, 0, MIB);
    }
    assert_reads(&bench.node_file(&volume), 255, 0, MIB);
    bench.check();
}

/// Kills snapshots at each step in turn until one leaves an intent behind; false without strace.
fn leave_an_intent(bench: &Bench, volume: &str) -> bool {
    let request = bench.request(json!({"key": volume}));
    for step in 1..500 {
        match bench.host.killed_at("Volume.snapshot", &request, support::SPEAKING, step) {
            None => return false,
            Some(false) => break,
            Some(true) if bench.tree(volume).get("intent").is_some() => return true,
            Some(true) => {}
        }
    }
    panic!("no step of the snapshot left an intent");
}

#[test]
fn what_another_hosts_call_began_is_left_to_it() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    let clone = bench.clone_of(&volume);
    let other = bench.other_host();
    let active = Active::new(&bench, &volume, "7", Mode::ReadWrite);
    let mut guest = active.guest();
    guest.write(1, 0, MIB);
    if !leave_an_intent(&bench, &volume) {
        return guest.disconnect();
    }
    let files = bench.node_files();
    other.call("SR.attach", json!({"configuration": bench.configuration()}));
    let set = |key: &str| bench.request(json!({"key": key, "k": "k", "v": "v"}));
    assert_eq!(other.code("Volume.set", set(&volume)), "Activated_on_another_host");
    other.call("Volume.set", set(&clone));
    other.call("Volume.snapshot", bench.request(json!({"key": clone})));
    assert!(files.iter().all(|file| file.exists()));
    assert!(bench.tree(&volume).get("intent").is_some());
    bench.call("Volume.set", json!({"key": volume, "k": "k", "v": "v"}));
    assert_eq!(bench.tree(&volume).get("intent"), None);
    guest.read(1, 0, MIB);
    guest.disconnect();
    drop(active);
    bench.check();
}

#[test]
fn a_snapshot_whose_daemon_dies_with_it_keeps_what_was_written() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    let active = Active::new(&bench, &volume, "7", Mode::ReadWrite);
    let mut guest = active.guest();
    guest.write(1, 0, MIB);
    if !leave_an_intent(&bench, &volume) {
        return guest.disconnect();
    }
    let state: Value =
        serde_json::from_slice(&fs::read(active.host.volume_dir(active.uri.volume).join("state.json")).unwrap())
            .unwrap();
    let daemon = i32::try_from(state["daemon"]["pid"].as_i64().unwrap()).unwrap();
    kill_process(Pid::from_raw(daemon).unwrap(), Signal::KILL).unwrap();
    guest.abandon();
    while plugin::attachment::Attachment::lock_existing(&active.host, active.uri.volume).unwrap().unwrap().is_alive()
    {
    }
    let before = bench.keys().len();
    bench.call("Volume.set", json!({"key": volume, "k": "a", "v": "b"}));
    assert_eq!(bench.keys().len(), before + 1, "rolled forward");
    drop(active);
    assert_reads(&bench.node_file(&volume), 1, 0, MIB);
    bench.check();
}

#[test]
fn a_snapshot_of_a_fresh_volume_has_its_record() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let record = bench.call("Volume.snapshot", json!({"key": volume}));
    assert_eq!(bench.call("Volume.stat", json!({"key": key(&record)})), record);
}
