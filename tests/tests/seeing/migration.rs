//! A migration as it is seen while it goes on.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex};

use fake_xapi::sxm::{Event, Flow};

use crate::listener::Listener;
use crate::spans::{assert_formed, observe, written};
use crate::world::World;

/// Looks at everything in a directory: it and what is below may be used by its owner alone. What goes meanwhile is passed
/// over.
fn open_to_others(path: &Path, found: &mut BTreeSet<String>, seen: &mut BTreeSet<String>) {
    let Ok(metadata) = path.symlink_metadata() else { return };
    let mode = metadata.permissions().mode() & 0o7777;
    // Of a socket's mode only the bits for writing count; QEMU leaves it to the umask.
    let wanted = if metadata.is_dir() || metadata.file_type().is_socket() { 0o700 } else { 0o600 };
    seen.insert(path.file_name().unwrap().to_string_lossy().into_owned());
    if mode & !wanted != 0 {
        found.insert(format!("{} {mode:o}", path.display()));
    }
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        open_to_others(&entry.path(), found, seen);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_is_logged_and_traced_and_nothing_of_it_is_open_to_others() {
    let plan = r#"{"size": 2097152, "steps": [{"write": {"offset": 0, "length": 1048576, "seed": 1}}]}"#;
    let mut world = World::build(plan, Flow::Leaf).await.unwrap();
    let (source, destination) = (Arc::clone(&world.stage.source), Arc::clone(&world.stage.destination));
    let log = Listener::syslog(source.root());
    observe(source.root());
    source.runner().trace(true);
    let leaf = world.leaf().0;
    let looked: Arc<Mutex<(BTreeSet<String>, BTreeSet<String>)>> = Arc::default();
    let (hosts, looks) = ([Arc::clone(&source), Arc::clone(&destination)], Arc::clone(&looked));
    world.player.at(move |_: &Event| {
        let (found, seen) = &mut *looks.lock().unwrap();
        hosts.iter().for_each(|host| open_to_others(&host.runtime_dir(), found, seen));
    });
    world.migrate_well().await.unwrap();
    world.player.at_nothing();
    source.runner().trace(false);

    let (found, seen) = looked.lock().unwrap().clone();
    assert_eq!(found, BTreeSet::new());
    for name in ["state.json", "qmp.sock", "nbd.sock", "mirror.sock", "control.sock", "supervisor.log", "daemon.log"]
    {
        assert!(seen.contains(name), "{name} was not looked at, but {seen:?}");
    }

    log.wait_for("the mirror's end", |line| line.contains(" method=mirror ") && line.contains(" outcome=finished "));
    let lists = written(source.root());
    lists.iter().flatten().for_each(assert_formed);
    let of = |name: &str| {
        let found: Vec<_> = lists.iter().flatten().filter(|span| span["name"] == name).collect();
        assert_eq!(found.len(), 1, "{name}");
        found[0]
    };
    let (call, mirror) = (of("Data.mirror"), of("mirror"));
    assert_eq!((&mirror["traceId"], &mirror["parentId"]), (&call["traceId"], &call["id"]));
    assert_eq!(mirror["tags"]["qcow2.volume"], leaf.as_str());
    assert_eq!(mirror["tags"]["qcow2.outcome"], "finished");
    let noted: Vec<&str> =
        mirror["annotations"].as_array().unwrap().iter().filter_map(|noted| noted["value"].as_str()).collect();
    assert_eq!(noted, ["connecting", "copying", "ready", "draining"]);
    let asked = lists.iter().flatten().filter(|span| span["name"] == "Data.stat").count();
    assert!(asked > 0);
    world.close().await.unwrap();
}
