//! What `xapi-storage-qcow2 status` says while a disk migrates, and after it.

use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use fake_xapi::host::Host;
use fake_xapi::sxm::{Event, Flow};
use serde_json::Value;

use crate::world::{World, binaries};

fn status(host: &Host, arguments: &[&str]) -> Command {
    let mut command = Command::new(binaries().join("xapi-storage-qcow2"));
    command.arg("status").args(arguments).env("XAPI_STORAGE_QCOW2_ROOT", host.root()).stdin(Stdio::null());
    command
}

fn text(host: &Host, arguments: &[&str]) -> String {
    let output = status(host, arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(host: &Host) -> Value {
    serde_json::from_str(&text(host, &["--json"])).unwrap()
}

/// What was seen when the mirror was ready, and who watches it to its end.
struct Seen {
    json: Value,
    text: String,
    watcher: Child,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_status_shows_a_mirror_and_watching_ends_with_it() {
    let plan = r#"{"size": 2097152, "steps": [{"write": {"offset": 0, "length": 1048576, "seed": 1}}]}"#;
    let mut world = World::build(plan, Flow::Leaf).await.unwrap();
    let (source, destination) = (Arc::clone(&world.stage.source), Arc::clone(&world.stage.destination));
    let leaf = world.leaf().0;
    let seen: Arc<Mutex<Option<Seen>>> = Arc::default();
    let (host, slot) = (Arc::clone(&source), Arc::clone(&seen));
    world.player.at(move |event: &Event| {
        if let Event::Complete { .. } = event {
            let watcher = status(&host, &["--watch"]).stdout(Stdio::piped()).spawn().unwrap();
            *slot.lock().unwrap() = Some(Seen { json: json(&host), text: text(&host, &[]), watcher });
        }
    });
    world.migrate_well().await.unwrap();
    world.player.at_nothing();
    let Seen { json: during, text: shown, watcher } = seen.lock().unwrap().take().expect("it was complete once");

    let mirror = &during["mirrors"][0];
    assert_eq!(
        (&mirror["phase"], &mirror["is_running"], &mirror["volume"]),
        (&"ready".into(), &true.into(), &leaf.as_str().into())
    );
    assert!(mirror["sent"].as_u64() >= Some(1 << 20) && mirror["done"].as_f64() > Some(0.5), "{mirror}");
    let volume =
        during["volumes"].as_array().unwrap().iter().find(|volume| volume["volume"] == leaf.as_str()).unwrap();
    assert!(volume["daemon"].as_i64() > Some(0) && volume["memory"].as_u64() > Some(1 << 20), "{volume}");
    assert_eq!((&volume["open"], &volume["nodes"]), (&"rw".into(), &1.into()));
    let sr = &during["srs"][0];
    assert_eq!((&sr["trees"], &sr["volumes"], &sr["longest_chain"]), (&1.into(), &1.into(), &1.into()), "{sr}");
    let line = shown.lines().find(|line| line.contains("ready")).unwrap_or_else(|| panic!("{shown}"));
    assert!(line.contains(&format!("of volume {leaf}")) && line.trim_start().starts_with("[#"), "{shown}");

    let watched = watcher.wait_with_output().unwrap();
    let watched = String::from_utf8(watched.stdout).unwrap();
    let all: Vec<&str> = watched.split("xapi-storage-qcow2 ").collect();
    assert!(all.iter().any(|one| one.contains("[#")), "{watched}");
    assert!(!all.last().unwrap().contains('['), "{watched}");
    // No terminal, no commands to one.
    assert!(!watched.contains('\u{1b}'));
    let after = json(&destination);
    assert_eq!((&after["volumes"][0]["open"], &after["srs"][0]["volumes"]), (&"rw".into(), &1.into()), "{after}");
    world.close().await.unwrap();
}

#[tokio::test]
async fn the_status_tells_what_failed_last_and_what_is_broken() {
    let world = World::build(crate::world::CHAIN, Flow::Leaf).await.unwrap();
    let (host, leaf) = (&world.stage.source, world.leaf());
    host.vdi_destroy("OpaqueRef:failing", &world.stage.source_sr, &leaf).await.unwrap_err();
    let status = json(host);
    let failure = status["failures"].as_array().unwrap().last().unwrap();
    assert_eq!(
        (&failure["method"], &failure["volume"]),
        (&"Volume.destroy".into(), &leaf.0.as_str().into()),
        "{failure}"
    );
    assert!(text(host, &[]).contains("Volume.destroy SR_BACKEND_FAILURE"));
    crate::world::kill_daemon(host, &leaf);
    let is_told = || {
        let volumes = json(host)["volumes"].clone();
        volumes.as_array().unwrap().iter().any(|volume| volume["problem"] == "its storage daemon does not run")
    };
    while !is_told() {}
    world.reboot().await.unwrap();
    world.close().await.unwrap();
}
