//! One mirror after the other into one volume.

use std::collections::BTreeMap;

use plugin::mirror::Base;
use serde_json::json;

use super::disk::{Disk, MIRROR, content};
use super::support::{Bench, Guest, MIB, assert_reads};

#[test]
fn a_new_volume_is_blank_until_something_is_written() {
    let bench = Bench::new();
    let disk = Disk::open(&bench);
    let first = disk.announced().unwrap();
    assert_eq!(first.base, Base::Blank);
    for _ in 0..3 {
        assert_eq!(disk.next(), first, "nothing was written");
        disk.activate(MIRROR);
    }
    disk.write(1, 0, 4096);
    let second = disk.next();
    assert_eq!(second.base, content(first));
    assert_ne!(second.session, first.session);
    assert_eq!(disk.next(), second);
    disk.write(2, 0, 4096);
    disk.activate(MIRROR);
    let third = disk.announced().unwrap();
    assert_eq!(third.base, content(second));
}

#[test]
fn zeroes_and_discards_are_writes() {
    let bench = Bench::new();
    for command in ["write -z 0 64k", "write -z -u 0 64k", "discard 0 64k", "write 65536 512"] {
        let disk = Disk::open(&bench);
        disk.write(1, 0, MIB);
        let before = disk.next();
        let written = std::process::Command::new("qemu-io")
            .args(["-d", "unmap", "-f", "raw", "-c", command, &disk.nbd()])
            .output()
            .unwrap();
        assert!(written.status.success(), "{written:?}");
        disk.wait_for_clients();
        assert_eq!(disk.next().base, content(before), "{command}");
        // What is only read is not written.
        let again = disk.next();
        let mut client = disk.client();
        client.read(1, 512 << 10, 4096);
        client.disconnect();
        disk.wait_for_clients();
        assert_eq!(disk.next(), again);
    }
}

#[test]
fn a_snapshot_between_two_mirrors_holds_what_the_first_has_left() {
    let bench = Bench::new();
    let disk = Disk::open(&bench);
    let first = disk.announced().unwrap();
    disk.write(1, 0, MIB);
    let snapshot = bench.snapshot(&disk.key);
    assert_eq!(disk.content_of(&snapshot), Some(first.session));
    assert_eq!((disk.content(), bench.tree(&disk.key)["format"].clone()), (None, json!(3)));
    let second = disk.announced().unwrap();
    assert_eq!(second.base, content(first));
    assert_eq!(disk.next(), second, "nothing was written since");
    disk.write(2, MIB, MIB);
    let next = bench.snapshot(&disk.key);
    assert_eq!(disk.content_of(&next), Some(second.session));
    assert_eq!(disk.next().base, content(second));
    disk.write(3, 0, 4096);
    assert_reads(&bench.node_file(&snapshot), 1, 0, MIB);
    assert_reads(&bench.node_file(&next), 1, 0, MIB);
    assert_reads(&bench.node_file(&next), 2, MIB, MIB);
}

#[test]
fn a_snapshot_under_a_connected_client_promises_nothing() {
    let bench = Bench::new();
    let disk = Disk::open(&bench);
    let first = disk.announced().unwrap();
    let mut client = disk.client();
    client.write(1, 0, MIB);
    let snapshot = bench.snapshot(&disk.key);
    client.write(2, 0, MIB);
    client.read(2, 0, MIB);
    client.disconnect();
    disk.wait_for_clients();
    let left = disk.content_of(&snapshot).unwrap();
    assert_ne!(left, first.session);
    assert_reads(&bench.node_file(&snapshot), 1, 0, MIB);
    let second = disk.next();
    assert_eq!(second.base, Base::Unknown);
    disk.write(3, 0, MIB);
    disk.deactivate(MIRROR);
    // From here on it is known again.
    assert_eq!(disk.content(), Some(second.session));
    let under = Disk::of(&bench, &bench.clone_of(&snapshot));
    under.plug();
    assert_eq!(under.next().base, Base::Content(left));
}

#[test]
fn a_snapshot_waits_for_the_client_of_a_mirror_that_is_about_to_go() {
    let bench = Bench::new();
    let disk = Disk::open(&bench);
    // It waits for a second, which may pass on a busy machine.
    let waited = (0..5).any(|_| {
        let announced = disk.next();
        let mut client = disk.client();
        client.write(1, 0, MIB);
        let snapshot = std::thread::scope(|scope| {
            let snapshot = scope.spawn(|| bench.snapshot(&disk.key));
            client.disconnect();
            snapshot.join().unwrap()
        });
        disk.content_of(&snapshot) == Some(announced.session) && disk.next().base == content(announced)
    });
    assert!(waited);
}

#[test]
fn what_was_closed_is_the_base_when_it_is_opened_again() {
    let bench = Bench::new();
    let disk = Disk::open(&bench);
    let mut last = disk.announced().unwrap();
    for pattern in 1..4 {
        disk.write(pattern, 0, MIB);
        if pattern == 2 {
            disk.release(MIRROR);
        } else {
            disk.deactivate(MIRROR);
        }
        assert_eq!(disk.content(), Some(last.session));
        disk.activate_readonly(MIRROR);
        assert_eq!((disk.description(), disk.content()), (None, Some(last.session)));
        disk.deactivate(MIRROR);
        disk.plug();
        assert_eq!(disk.content(), None, "it is written to");
        let next = disk.next();
        assert_eq!(next.base, content(last));
        last = next;
    }
}

#[test]
fn a_clone_of_a_snapshot_begins_with_what_the_snapshot_holds() {
    let bench = Bench::new();
    let disk = Disk::open(&bench);
    let first = disk.announced().unwrap();
    disk.write(1, 0, MIB);
    let snapshot = bench.snapshot(&disk.key);
    disk.release(MIRROR);
    bench.destroy(&disk.key);
    for size in [None, Some(8 * MIB)] {
        let clone = Disk::of(&bench, &bench.clone_of(&snapshot));
        if let Some(size) = size {
            bench.call("Volume.resize", json!({"key": clone.key, "new_size": size}));
        }
        clone.plug();
        assert_eq!(clone.next().base, content(first));
        clone.write(2, 0, 4096);
        let second = clone.next();
        assert_ne!(second.base, content(first));
        if size.is_some() {
            // Growth shows zeroes and nothing else.
            bench.call("Volume.resize", json!({"key": clone.key, "new_size": 16 * MIB}));
            assert_eq!(clone.next(), second);
        }
        clone.deactivate(MIRROR);
        assert_eq!(clone.content(), Some(second.session));
        bench.call("Volume.resize", json!({"key": clone.key, "new_size": 32 * MIB}));
        clone.activate(MIRROR);
        assert_eq!(clone.next().base, content(second));
    }
}

#[test]
fn a_client_that_has_written_and_lingers_is_cut_off_for_the_next() {
    let bench = Bench::new();
    let disk = Disk::open(&bench);
    let first = disk.announced().unwrap();
    let mut lingering = disk.client();
    lingering.write(1, 0, MIB);
    let second = disk.next();
    assert_eq!(second.base, content(first));
    assert!(lingering.is_cut_off());
    lingering.abandon();
    assert_reads_through(&disk, 1);
    assert_eq!(disk.next(), second);
}

#[test]
fn a_client_that_has_not_written_yet_stays_and_its_session_names_nothing() {
    let bench = Bench::new();
    let disk = Disk::open(&bench);
    let first = disk.announced().unwrap();
    let mut client = disk.client();
    assert_eq!(disk.next(), first);
    client.write(1, 0, MIB);
    client.disconnect();
    disk.wait_for_clients();
    let second = disk.next();
    assert_eq!(second.base, Base::Unknown);
    assert_ne!(second.session, first.session);
    let snapshot = bench.snapshot(&disk.key);
    assert_ne!(disk.content_of(&snapshot), Some(first.session));
}

#[test]
fn a_repeated_activation_leaves_a_client_alone() {
    let bench = Bench::new();
    let disk = Disk::open(&bench);
    let first = disk.announced().unwrap();
    let mut client = disk.client();
    client.write(1, 0, MIB);
    disk.activate(MIRROR);
    client.write(2, 0, MIB);
    client.disconnect();
    disk.wait_for_clients();
    disk.deactivate(MIRROR);
    let left = disk.content().unwrap();
    assert_ne!(left, first.session);
    disk.activate(MIRROR);
    assert_eq!(disk.next().base, Base::Content(left));
}

#[test]
fn calls_made_at_once_begin_one_session() {
    let bench = Bench::new();
    let disk = Disk::open(&bench);
    let first = disk.announced().unwrap();
    disk.write(1, 0, MIB);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| disk.attach(MIRROR));
            scope.spawn(|| disk.activate(MIRROR));
        }
    });
    assert_eq!(disk.announced().unwrap().base, content(first));
}

/// System calls between which what is said and what is so could come apart. strace counts each by itself.
const STEPS: [&str; 6] = ["rename", "sendto", "recvfrom", "unlink", "fsync", "flock"];

#[test]
fn a_snapshot_killed_anywhere_makes_no_promise_untrue() {
    let bench = Bench::new();
    let disk = Disk::open(&bench);
    // What the source of each mirror knows: what it has sent in which session.
    let mut sent = BTreeMap::new();
    let (mut round, mut kills, mut known) = (0, 0, 0);
    for call in STEPS {
        for step in 1..60 {
            round += 1;
            let pattern = u8::try_from(round % 200).unwrap() + 1;
            let announced = disk.next();
            disk.write(pattern, 0, MIB);
            sent.insert(announced.session, pattern);
            let request = bench.request(json!({"key": disk.key}));
            let Some(killed) = bench.host.killed_at("Volume.snapshot", &request, call, step) else { return };
            let next = disk.next();
            if let Base::Content(base) = next.base
                && let Some(believed) = sent.get(&base)
            {
                known += 1;
                assert_eq!(*believed, pattern, "{call} {step}");
            }
            for key in bench.keys() {
                if let Some(believed) = disk.content_of(&key).and_then(|name| sent.get(&name)) {
                    assert_reads(&bench.node_file(&key), *believed, 0, MIB);
                }
                if key != disk.key {
                    bench.destroy(&key);
                }
            }
            assert_reads_through(&disk, pattern);
            bench.check_records();
            if !killed {
                assert_eq!(next.base, content(announced));
                break;
            }
            kills += 1;
        }
    }
    assert!(kills > 20 && known > 10, "{kills} {known}");
}

fn assert_reads_through(disk: &Disk<'_>, pattern: u8) {
    let mut client: Guest = disk.client();
    client.read(pattern, 0, MIB);
    client.disconnect();
    disk.wait_for_clients();
}
