//! The longest chain that is made: what it costs, and that nothing but a merge's own overlay makes it longer. Other lengths
//! are measured with CHAIN_LENGTHS, numbers with commas between.

use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};
use std::{fs, thread};

use plugin::store::{Blank, Unit, plan};
use serde_json::json;
use uuid::Uuid;

use super::scene::{SIZE, Scene};
use super::support::MIB;

/// Makes a volume whose chain has so many nodes; each below it is a snapshot's.
fn chain(length: usize) -> Scene {
    let (scene, _) = Scene::new(&[&[]]);
    let (directory, volume) = (scene.bench.tree_directory(&scene.volume), &scene.volume);
    let mut tree = scene.bench.tree(volume);
    let mut below = tree["volumes"][volume]["node"].as_str().unwrap().to_owned();
    for _ in 1..length {
        let (node, snapshot) = (Uuid::new_v4().to_string(), Uuid::new_v4().to_string());
        let backing = format!("{below}.qcow2");
        let blank = Blank { virtual_size: SIZE, backing: Some(&backing), unit: Unit::Cluster };
        blank.create(&directory.join(format!("{node}.qcow2"))).unwrap();
        tree["nodes"][&node] = json!({"parent": below, "virtual_size": SIZE});
        tree["volumes"][&snapshot] = tree["volumes"][volume].clone();
        tree["volumes"][&snapshot]["node"] = json!(below);
        let target = Path::new("../trees").join(directory.file_name().unwrap());
        symlink(target, scene.bench.path.join("volumes").join(&snapshot)).unwrap();
        below = node;
    }
    tree["volumes"][volume]["node"] = json!(below);
    fs::write(directory.join("tree.json"), tree.to_string()).unwrap();
    scene
}

/// Waits until so much was written to what the guest writes to.
fn wait_for_data(scene: &Scene, bytes: u64) {
    let until = Instant::now() + Duration::from_secs(60);
    while fs::metadata(scene.bench.node_file(&scene.volume)).unwrap().blocks() * 512 < bytes {
        assert!(Instant::now() < until, "the guest writes nothing");
        thread::sleep(Duration::from_millis(10));
    }
}

fn timed<T>(what: impl FnOnce() -> T) -> (f64, T) {
    let began = Instant::now();
    let done = what();
    (began.elapsed().as_secs_f64(), done)
}

#[test]
#[ignore = "takes a minute, and measures"]
fn the_longest_chain_serves_its_guest_and_is_made_longer_by_nobody_but_a_merge() {
    let lengths =
        std::env::var("CHAIN_LENGTHS").ok().map(|text| text.split(',').map(|n| n.parse().unwrap()).collect());
    let lengths = lengths.unwrap_or(vec![1, 32, 64, plan::MAX_CHAIN - 1]);
    println!(
        "nodes  activate  snapshot  deactivate, in seconds, on {}",
        fs::read_to_string("/proc/loadavg").unwrap()
    );
    for length in lengths {
        let mut scene = chain(length);
        let (opened, ()) = timed(|| scene.start());
        wait_for_data(&scene, MIB);
        if length >= plan::MAX_CHAIN {
            println!("{length:5}  {opened:8.2}  {:>8}  {:10.2}", "", timed(|| scene.stop()).0);
            continue;
        }
        let (snapshotted, snapshot) = timed(|| scene.bench.snapshot(&scene.volume));
        assert_eq!(scene.nodes(), length + 1);
        if length + 1 == plan::MAX_CHAIN {
            for method in ["Volume.snapshot", "Volume.clone"] {
                assert_eq!(scene.bench.code(method, json!({"key": scene.volume})), "SR_BACKEND_FAILURE_109");
            }
            assert_eq!(scene.nodes(), plan::MAX_CHAIN);
            // What it writes over is merged all the same: by one overlay more, and one node less.
            wait_for_data(&scene, 2 * MIB);
            scene.bench.destroy(&snapshot);
            let (merged, log) = timed(|| scene.gc());
            assert!(log.contains("frozen"), "{log}");
            assert_eq!(scene.nodes(), plan::MAX_CHAIN);
            scene.assert_agree();
            println!("merged with an overlay under the guest in {merged:.2}");
        }
        let (closed, account) = timed(|| scene.stop());
        println!("{:5}  {opened:8.2}  {snapshotted:8.2}  {closed:10.2}", length + 1);
        assert!(!account.lost);
        account.model.assert_holds(&super::scene::content(&scene.bench.node_file(&scene.volume)), true);
    }
}
