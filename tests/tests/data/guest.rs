//! The guest: what it writes, what it remembers, and that it notices what is missing.

use std::time::{Duration, Instant};

use bytes::Bytes;
use fake_xapi::guest::{Durability, Guest, Settings, verify_export, verify_raw};
use fake_xapi::plan::Extent;

use crate::daemon::Daemon;

const MIB: u64 = 1 << 20;

fn settings(depth: usize) -> Settings {
    Settings { depth, flush_every: 50, trims: true, ..Settings::new(Extent { offset: MIB, length: 2 * MIB }, 11) }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Starts a guest and lets it write for a while.
async fn writing(daemon: &Daemon, depth: usize) -> Guest {
    daemon.client().await.disconnect().await;
    let mut guest = Guest::new(settings(depth)).unwrap();
    guest.start(&daemon.uri()).await.unwrap();
    until("the guest writes", || guest.acknowledged() > 1000).await;
    guest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_suspended_guest_finds_every_acknowledged_write_and_goes_on() {
    for depth in [1, 16] {
        let daemon = Daemon::new(4 * MIB);
        let mut guest = writing(&daemon, depth).await;
        guest.suspend().await;
        assert!(!guest.is_writing());
        let before = guest.acknowledged();
        let client = daemon.client().await;
        let verdict = verify_export(&guest.ledger(), &client, Durability::Acknowledged).await.unwrap();
        assert!(verdict.holds() && verdict.checked > 100, "{verdict:?}");
        guest.start(&daemon.uri()).await.unwrap();
        until("the guest goes on", || guest.acknowledged() > before + 100).await;
        guest.suspend().await;
        let verdict = verify_export(&guest.ledger(), &client, Durability::Acknowledged).await.unwrap();
        assert!(verdict.holds(), "{verdict:?}");
        let untouched = client.read(0, MIB as u32).await.unwrap();
        assert!(untouched.iter().all(|byte| *byte == 0));
        let account = guest.account();
        assert!(account.failed == 0 && account.flushes > 0, "{account:?}");
        assert!(account.latency.max_seconds >= account.latency.p50_seconds && account.latency.p50_seconds > 0.0);
        client.disconnect().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_a_torn_and_a_stale_write_are_noticed() {
    let daemon = Daemon::new(4 * MIB);
    let mut guest = writing(&daemon, 4).await;
    guest.suspend().await;
    let client = daemon.client().await;
    let old = client.read(MIB, 2 * MIB as u32).await.unwrap();
    guest.start(&daemon.uri()).await.unwrap();
    let before = guest.acknowledged();
    until("the guest goes on", || guest.acknowledged() > before + 1000).await;
    guest.suspend().await;
    let new = client.read(MIB, 2 * MIB as u32).await.unwrap();
    let ledger = guest.ledger();
    let changed = (0..512).map(|block| block * 4096).find(|at| old[*at..at + 4096] != new[*at..at + 4096]).unwrap();
    let place = MIB + changed as u64;
    let stale = old.slice(changed..changed + 4096);
    let torn = Bytes::from([&new[changed..changed + 2048], &[0x55; 2048]].concat());
    for bad in [stale, torn, Bytes::from(vec![9; 4096])] {
        client.write(place, bad).await.unwrap();
        let verdict = verify_export(&ledger, &client, Durability::Acknowledged).await.unwrap();
        assert_eq!((verdict.wrong, verdict.violations[0].offset), (1, place), "{verdict:?}");
    }
    client.write(place, new.slice(changed..changed + 4096)).await.unwrap();
    let verdict = verify_export(&ledger, &client, Durability::Acknowledged).await.unwrap();
    assert!(verdict.holds(), "{verdict:?}");
    client.disconnect().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_flushed_survives_a_killed_daemon() {
    let mut daemon = Daemon::new(4 * MIB);
    let mut guest = writing(&daemon, 8).await;
    daemon.kill();
    until("the guest notices", || !guest.is_writing()).await;
    guest.suspend().await;
    let account = guest.account();
    assert!(account.failed > 0 && account.errors[0].contains("lost"), "{account:?}");
    daemon.restart();
    let client = daemon.client().await;
    let verdict = verify_export(&guest.ledger(), &client, Durability::Flushed).await.unwrap();
    assert!(verdict.holds() && verdict.checked > 100, "{verdict:?}");
    guest.start(&daemon.uri()).await.unwrap();
    let before = guest.acknowledged();
    until("the guest goes on", || guest.acknowledged() > before + 100).await;
    guest.suspend().await;
    let verdict = verify_export(&guest.ledger(), &client, Durability::Flushed).await.unwrap();
    assert!(verdict.holds(), "{verdict:?}");
    client.disconnect().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_raw_copy_by_qemu_img_is_verified_as_well() {
    let mut daemon = Daemon::new(4 * MIB);
    let mut guest = writing(&daemon, 8).await;
    guest.suspend().await;
    let client = daemon.client().await;
    client.flush().await.unwrap();
    client.disconnect().await;
    daemon.kill();
    let raw = daemon.path().join("disk.raw");
    let status = std::process::Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .args([&daemon.image(), &raw])
        .status()
        .unwrap();
    assert!(status.success());
    let verdict = verify_raw(&guest.ledger(), &raw, Durability::Acknowledged).unwrap();
    assert!(verdict.holds() && verdict.checked > 100, "{verdict:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_guest_keeps_its_pace_and_stops_at_once() {
    let daemon = Daemon::new(4 * MIB);
    daemon.client().await.disconnect().await;
    let mut guest = Guest::new(Settings { writes_per_second: Some(200), ..settings(4) }).unwrap();
    guest.start(&daemon.uri()).await.unwrap();
    until("the guest writes", || guest.acknowledged() >= 60).await;
    guest.suspend().await;
    let account = guest.account();
    let most = 200.0 * account.seconds + 8.0;
    assert!((account.acknowledged as f64) <= most, "{account:?}");

    let mut guest = Guest::new(Settings { writes_per_second: Some(1), ..settings(1) }).unwrap();
    guest.start(&daemon.uri()).await.unwrap();
    until("the first write", || guest.acknowledged() == 1).await;
    let stopped = Instant::now();
    guest.suspend().await;
    assert!(stopped.elapsed() < Duration::from_millis(800));
}

#[tokio::test]
async fn a_guest_that_was_cut_off_leaves_its_last_writes_open() {
    let daemon = Daemon::new(4 * MIB);
    let mut guest = writing(&daemon, 8).await;
    guest.cut().await;
    let client = daemon.client().await;
    let verdict = verify_export(&guest.ledger(), &client, Durability::Acknowledged).await.unwrap();
    assert!(verdict.holds(), "{verdict:?}");
    client.disconnect().await;
}
