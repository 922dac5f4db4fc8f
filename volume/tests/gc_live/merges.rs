//! Nodes merged while a guest has them open: inner ones and what it writes to, whichever way the data goes.

use super::guest::Model;
use super::scene::{SIZE, Scene, content};

const MUCH: &[&str] = &["write -P 1 0 6M", "write -z 2M 256k", "write -P 2 12M 1M"];
const LITTLE: &[&str] = &["write -P 3 1M 100k", "write -z 64k 64k", "discard 256k 64k", "write -P 4 13M 512k"];

#[test]
fn inner_nodes_become_one_under_a_guest_whichever_takes_the_data() {
    // Right below what the guest writes to, and further down.
    for above in [&[][..], &["write -P 5 3M 64k"]] {
        let nothing = if above.is_empty() { (MUCH, &[][..], false) } else { (&[][..], MUCH, true) };
        for (lower, upper, up) in [(MUCH, LITTLE, false), (LITTLE, MUCH, true), nothing] {
            let mut layers = vec![lower, upper];
            if !above.is_empty() {
                layers.push(above);
            }
            layers.push(&[]);
            let (mut scene, snapshots) = Scene::new(&layers);
            scene.start();
            let doomed = scene.tree().volumes[&snapshots[0].parse().unwrap()].node;
            scene.bench.destroy(&snapshots[0]);
            let kept = scene.kept();
            let before = scene.nodes();
            scene.gc();
            assert_eq!(scene.nodes(), before - 1);
            assert_eq!(scene.tree().nodes.contains_key(&doomed), !up);
            scene.assert_agree();
            assert_eq!(scene.kept(), kept);
            let account = scene.stop_and_look();
            assert!(account.requests > 0);
            scene.assert_small();
            assert_eq!(scene.kept(), kept);
        }
    }
}

#[test]
fn what_a_guest_writes_over_deleted_data_is_merged_while_it_writes_on() {
    let (mut scene, snapshots) = Scene::new(&[MUCH, &["write -P 6 0 4M"]]);
    scene.start();
    scene.bench.destroy(&snapshots[0]);
    let log = scene.gc();
    assert!(log.contains("frozen"), "{log}");
    // What it writes to now, and all the rest.
    assert_eq!(scene.nodes(), 2);
    scene.assert_agree();
    scene.stop_and_look();
    scene.gc();
    assert_eq!(scene.nodes(), 1);
    scene.assert_small();
    scene.bench.check();
}

#[test]
fn snapshots_destroyed_in_any_order_under_a_guest_leave_nothing() {
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
        let (mut scene, snapshots) = Scene::new(&[MUCH, LITTLE, &["write -P 7 5M 2M"], &["write -P 8 6M 300k"]]);
        scene.start();
        for index in order {
            scene.bench.destroy(&snapshots[index]);
            let kept = scene.kept();
            scene.gc();
            scene.assert_agree();
            assert_eq!(scene.kept(), kept);
        }
        assert!(scene.nodes() <= 2, "{}", scene.nodes());
        scene.stop_and_look();
        scene.gc();
        assert_eq!(scene.nodes(), 1);
        scene.assert_small();
    }
}

#[test]
fn space_comes_back_while_a_guest_writes_and_snapshots_are_taken() {
    let (mut scene, mut snapshots) = Scene::new(&[MUCH, LITTLE]);
    scene.start();
    for _ in 0..3 {
        snapshots.push(scene.bench.snapshot(&scene.volume));
        scene.bench.destroy(&snapshots.remove(0));
        let kept = scene.kept();
        scene.gc();
        scene.assert_agree();
        assert_eq!(scene.kept(), kept);
    }
    scene.bench.destroy(&snapshots.remove(0));
    scene.gc();
    // It is quiet from now on, and its disk open.
    let account = scene.guest.take().unwrap().end();
    scene.gc();
    scene.assert_agree();
    scene.assert_small_while_open();
    account.model.assert_holds(&content(&scene.bench.node_file(&scene.volume)), true);
    scene.release();
    scene.gc();
    assert_eq!(scene.nodes(), 1);
    account.model.assert_holds(&content(&scene.bench.node_file(&scene.volume)), true);
    scene.assert_small();
    scene.check();
}

#[test]
fn a_merge_is_taken_up_again_after_a_snapshot_in_the_middle() {
    let (mut scene, snapshots) = Scene::new(&[MUCH, &["write -P 6 0 4M"], &[]]);
    scene.start();
    scene.set_speed(1);
    let doomed = scene.tree().volumes[&snapshots[0].parse().unwrap()].node;
    scene.bench.destroy(&snapshots[0]);
    let (worker, begun) = scene.merging();
    assert!(begun);
    let health = scene.bench.call("SR.stat", serde_json::json!({}))["health"][1].clone();
    let words = [format!("being brought back: merging nodes {doomed}"), format!("open for volume {}", scene.volume)];
    assert!(words.iter().all(|word| health.as_str().unwrap().contains(word)), "{health}");
    let began = std::time::Instant::now();
    let snapshot = scene.bench.snapshot(&scene.volume);
    let took = began.elapsed();
    assert!(took < std::time::Duration::from_secs(5), "{took:?}");
    let held = content(&scene.bench.node_file(&snapshot));
    scene.set_speed(64);
    assert!(worker.wait_with_output().unwrap().status.success());
    assert_eq!(content(&scene.bench.node_file(&snapshot)), held);
    assert_eq!(scene.nodes(), 3);
    scene.assert_agree();
    scene.stop_and_look();
    assert_eq!(content(&scene.bench.node_file(&snapshot)), held);
    scene.assert_small();
}

#[test]
fn a_guest_that_is_deactivated_in_the_middle_is_not_waited_for() {
    let (mut scene, snapshots) = Scene::new(&[MUCH, &["write -P 6 0 4M"], &[]]);
    scene.start();
    scene.set_speed(1);
    scene.bench.destroy(&snapshots[0]);
    let (worker, begun) = scene.merging();
    assert!(begun);
    let began = std::time::Instant::now();
    let account = scene.stop();
    assert!(began.elapsed() < std::time::Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(worker.wait_with_output().unwrap().status.success());
    account.model.assert_holds(&content(&scene.bench.node_file(&scene.volume)), true);
    assert_eq!(scene.nodes(), 2);
    scene.assert_small();
    scene.bench.check();
}

#[test]
fn a_guest_that_writes_everywhere_does_not_keep_the_worker_for_ever() {
    let (mut scene, snapshots) = Scene::new(&[&["write -P 1 0 16M"], &["write -P 6 0 4M"]]);
    let before = content(&scene.bench.node_file(&scene.volume));
    scene.go_on(Model::of(before), 0..SIZE);
    scene.bench.destroy(&snapshots[0]);
    scene.gc();
    assert!(scene.nodes() <= 3);
    scene.assert_agree();
    scene.stop_and_look();
}
