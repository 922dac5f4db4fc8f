//! Others who write between two mirrors, and daemons that die.

use plugin::activation;
use plugin::mirror::Base;
use serde_json::json;

use super::disk::{Disk, MIRROR, content};
use super::support::{Bench, MIB};

#[test]
fn a_guest_is_told_nothing_and_what_it_leaves_has_a_name() {
    let bench = Bench::new();
    let disk = Disk::new(&bench);
    let mut names = Vec::new();
    for pattern in 1..3 {
        disk.attach("7");
        disk.activate("7");
        disk.attach("7");
        assert_eq!((disk.description(), disk.content()), (None, None));
        disk.write(pattern, 0, MIB);
        let snapshot = bench.snapshot(&disk.key);
        assert_eq!(disk.description(), None);
        names.push(disk.content_of(&snapshot).unwrap());
        disk.write(pattern, MIB, MIB);
        disk.release("7");
        names.push(disk.content().unwrap());
    }
    disk.plug();
    assert_eq!(disk.next().base, Base::Content(names[3]));
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 4);
}

#[test]
fn a_guest_that_joins_a_mirror_ends_the_promise() {
    let bench = Bench::new();
    let disk = Disk::open(&bench);
    let first = disk.announced().unwrap();
    disk.write(1, 0, MIB);
    let second = disk.next();
    let mut client = disk.client();
    disk.activate("7");
    client.write(2, 0, MIB);
    client.disconnect();
    disk.wait_for_clients();
    disk.release("7");
    let third = disk.next();
    assert_eq!(third.base, Base::Unknown);
    let snapshot = bench.snapshot(&disk.key);
    assert_eq!(disk.content_of(&snapshot), Some(third.session));
    assert!(third.session != first.session && third.session != second.session);
}

#[test]
fn while_a_guest_writes_beside_a_mirror_nothing_is_promised() {
    let bench = Bench::new();
    let disk = Disk::new(&bench);
    disk.activate("7");
    disk.plug();
    assert_eq!(disk.description(), None);
    disk.write(1, 0, MIB);
    disk.attach(MIRROR);
    assert_eq!(disk.description(), None);
    disk.release("7");
    assert_eq!(disk.next().base, Base::Unknown);
}

#[test]
fn a_guest_that_starts_after_a_migration_that_was_never_closed_does_not_write_in_its_name() {
    let bench = Bench::new();
    let disk = Disk::open(&bench);
    let first = disk.announced().unwrap();
    disk.write(1, 0, MIB);
    disk.activate("7");
    assert_eq!(disk.description(), None);
    disk.write(2, 0, MIB);
    disk.release("7");
    let left = disk.content().unwrap();
    assert_ne!(left, first.session);
    disk.plug();
    assert_eq!(disk.next().base, Base::Content(left));
}

#[test]
fn another_migration_does_not_write_in_the_name_of_the_first() {
    let bench = Bench::new();
    let disk = Disk::open(&bench);
    let first = disk.announced().unwrap();
    disk.write(1, 0, MIB);
    disk.activate("CPffffff");
    disk.attach("CPffffff");
    let second = disk.announced().unwrap();
    assert_ne!((second.session, second.base), (first.session, first.base));
    disk.write(2, 0, MIB);
    let snapshot = bench.snapshot(&disk.key);
    assert_eq!(disk.content_of(&snapshot), Some(second.session));
}

#[test]
fn a_mirror_does_not_come_while_a_reader_keeps_what_is_outdated_in_place() {
    let bench = Bench::new();
    let disk = Disk::open(&bench);
    let first = disk.announced().unwrap();
    let mut writer = disk.client();
    disk.activate_readonly("8");
    let mut reader = disk.client();
    assert_eq!(disk.next(), first, "nothing was written");
    writer.write(1, 0, MIB);
    writer.disconnect();
    let refused = disk.try_attach(MIRROR).unwrap_err();
    assert!(refused.chain().contains("another domain is connected"), "{refused}");
    reader.read(1, 0, MIB);
    reader.disconnect();
    disk.wait_for_clients();
    assert_eq!(disk.next().base, Base::Unknown);
}

#[test]
fn nothing_is_known_after_the_daemon_was_killed() {
    let bench = Bench::new();
    let disk = Disk::new(&bench);
    for written in [false, true, false] {
        disk.plug();
        let session = disk.announced().unwrap().session;
        if written {
            disk.write(1, 0, MIB);
        }
        disk.kill_daemon();
        disk.plug();
        assert_eq!(disk.next().base, Base::Unknown);
        disk.kill_daemon();
        disk.release(MIRROR);
        assert_eq!(disk.content(), None);
        let snapshot = bench.snapshot(&disk.key);
        assert_ne!(disk.content_of(&snapshot), Some(session));
    }
}

#[test]
fn a_daemon_that_dies_in_a_snapshots_session_leaves_no_name() {
    let bench = Bench::new();
    let disk = Disk::open(&bench);
    disk.write(1, 0, MIB);
    let snapshot = bench.snapshot(&disk.key);
    let second = disk.next();
    disk.write(2, 0, MIB);
    disk.kill_daemon();
    let after = bench.snapshot(&disk.key);
    assert_ne!(disk.content_of(&after), Some(second.session));
    assert_ne!(disk.content_of(&after), disk.content_of(&snapshot));
}

#[test]
fn what_is_thrown_away_is_not_announced_and_leaves_the_name_that_was_there() {
    let bench = Bench::new();
    for domain in ["7", MIRROR] {
        let disk = Disk::open(&bench);
        let first = disk.announced().unwrap();
        disk.write(1, 0, MIB);
        disk.release(MIRROR);
        activation::open(&disk.host, disk.uri, false).unwrap();
        disk.attach(domain);
        disk.activate(domain);
        disk.attach(domain);
        assert_eq!(disk.description(), None);
        disk.write(2, 0, MIB);
        assert_eq!(disk.content(), Some(first.session));
        let snapshot = bench.snapshot(&disk.key);
        assert_eq!(disk.content_of(&snapshot), Some(first.session));
        disk.release(domain);
        activation::close(&disk.host, disk.uri).unwrap();
        disk.plug();
        assert_eq!(disk.next().base, content(first));
    }
}

#[test]
fn an_import_ends_the_promise() {
    let bench = Bench::new();
    let disk = Disk::open(&bench);
    let first = disk.announced().unwrap();
    let mut attachment = plugin::attachment::Attachment::lock_existing(&disk.host, disk.uri.volume).unwrap().unwrap();
    // What it starts ends at once; that it was to start is what counts.
    attachment.import(&MIRROR.parse().unwrap(), &["--help".into()]).unwrap_err();
    drop(attachment);
    assert_eq!(disk.description(), None);
    disk.write(1, 0, MIB);
    disk.deactivate(MIRROR);
    assert_ne!(disk.content(), Some(first.session));
}

#[test]
fn reading_first_or_going_on_reading_changes_nothing() {
    let bench = Bench::new();
    let disk = Disk::new(&bench);
    disk.activate_readonly("8");
    disk.plug();
    let first = disk.next();
    assert_eq!(first.base, Base::Blank);
    disk.write(1, 0, MIB);
    disk.deactivate(MIRROR);
    // It is open, and nobody writes to it any more.
    assert_eq!((disk.content(), disk.description()), (Some(first.session), None));
    let snapshot = bench.snapshot(&disk.key);
    assert_eq!(disk.content_of(&snapshot), Some(first.session));
    disk.release("8");
    bench.call("Volume.set", json!({"key": disk.key, "k": "k", "v": "v"}));
    disk.plug();
    assert_eq!(disk.next().base, content(first));
}
