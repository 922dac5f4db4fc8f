//! What calls that were killed leave: a repair finishes or removes it, and what is found is never more than that.

use std::fs;

use plugin::id::{SrUuid, VolumeKey, VolumeUri};
use plugin::mirror::{MirrorRecord, Phase};
use serde_json::{Value, json};

use crate::program::{assert_well, check};
use crate::support::{Bench, CHANGING, MIB, at_every_step, names, write};

/// A call that is killed, on a volume with a snapshot and another volume.
type Request = fn(&str, &str, &str) -> (&'static str, Value);

#[test]
fn whatever_a_killed_call_leaves_is_put_right() {
    let requests: [Request; 5] = [
        |volume, _, _| ("Volume.snapshot", json!({"key": volume})),
        |volume, snapshot, _| ("Volume.revert", json!({"key": volume, "snapshot": snapshot})),
        |volume, _, _| ("Volume.resize", json!({"key": volume, "new_size": 4 * MIB})),
        |volume, _, other| ("Volume.compose", json!({"key": other, "key2": volume})),
        |_, _, other| ("Volume.destroy", json!({"key": other})),
    ];
    let mut left = 0;
    for request in requests {
        // Each step once: more would cost what other suites spend on it.
        for step in (1..).step_by(3) {
            let bench = Bench::new();
            let (volume, other) = (bench.create(2 * MIB), bench.create(2 * MIB));
            write(&bench.node_file(&volume), 1, 0, 65536);
            let snapshot = bench.snapshot(&volume);
            let (method, more) = request(&volume, &snapshot, &other);
            let Some(killed) = bench.host.killed_at(method, &bench.request(more), CHANGING, step) else { return };
            if !killed {
                break;
            }
            bench.wait_for_orphans();
            let (status, found) = check(&bench.host, &bench.path, &["--fast"]);
            left += status;
            let is_repairable = |finding: &Value| finding["repairable"] == json!(true);
            assert!(found["findings"].as_array().unwrap().iter().all(is_repairable), "{method} {step}: {found:#}");
            let (status, report) = check(&bench.host, &bench.path, &["--fast", "--repair"]);
            assert_eq!(status, 0, "{method} {step}: {report:#}");
            assert!(bench.keys().contains(&volume) || method == "Volume.compose", "{method} {step}");
            bench.check();
        }
    }
    assert!(left > 3, "{left} of the calls left something");
}

#[test]
fn what_is_left_of_attachments_and_mirrors_is_found_and_ended() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let host = plugin::host::Host::at(&bench.host.root);
    let (sr, key): (SrUuid, VolumeKey) = (bench.sr.parse().unwrap(), volume.parse().unwrap());
    let directory = host.volume_dir(key);
    let one = |words: &str| {
        let (status, report) = check(&bench.host, &bench.path, &["--fast"]);
        let findings = report["findings"].as_array().unwrap();
        assert!(status == 1 && findings.len() == 1, "{report:#}");
        assert!(findings[0]["what"].as_str().unwrap().contains(words), "{report:#}");
        assert_eq!(check(&bench.host, &bench.path, &["--fast", "--repair"]).0, 0);
        assert_well(&bench.host, &bench.path, &["--fast"]);
    };
    fs::create_dir_all(&directory).unwrap();
    one("killed");
    assert!(!directory.exists());
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("state.json"), "{\"format\":1,").unwrap();
    one("damaged");
    assert!(!directory.exists());

    let uri = VolumeUri { sr, volume: key };
    let mut mirror =
        MirrorRecord::new(uri, plugin::id::NodeId::random(), "7".parse().unwrap(), "nbd:unix:/nowhere".to_owned());
    mirror.phase = Phase::Copying;
    fs::create_dir_all(host.mirror_dir(mirror.key)).unwrap();
    mirror.store(&host).unwrap();
    one("nobody supervises");
    let ended = MirrorRecord::load(&host, mirror.key).unwrap().unwrap();
    assert!(ended.phase.is_terminal() && ended.phase != Phase::Finished, "{ended:?}");
    mirror.remove(&host).unwrap();
}

/// The end of a mirror is told until its volume is destroyed; xapi does not destroy again what it does not find.
#[test]
fn the_record_of_a_mirror_goes_also_when_the_destruction_of_its_volume_is_killed() {
    let bench = Bench::new();
    let host = plugin::host::Host::at(&bench.host.root);
    let (mut gone, mirrors) = (0, host.runtime_dir().join("mirrors"));
    at_every_step(|call, number| {
        let volume = bench.create(MIB);
        let uri = VolumeUri { sr: bench.sr.parse().unwrap(), volume: volume.parse().unwrap() };
        let mut mirror = MirrorRecord::new(
            uri,
            plugin::id::NodeId::random(),
            "7".parse().unwrap(),
            "nbd:unix:/nowhere".to_owned(),
        );
        mirror.phase = Phase::Finished;
        fs::create_dir_all(host.mirror_dir(mirror.key)).unwrap();
        mirror.store(&host).unwrap();
        let request = bench.request(json!({"key": volume}));
        let was_killed = bench.host.killed_at("Volume.destroy", &request, call, number)?;
        let is_listed = bench.keys().contains(&volume);
        gone += u32::from(was_killed && !is_listed);
        let configuration = json!({"configuration": bench.configuration()});
        if number % 2 == 0 {
            bench.call("SR.detach", json!({}));
            assert_eq!(names(&mirrors).len(), usize::from(is_listed), "{call} {number}");
        }
        bench.host.call("SR.attach", configuration);
        assert_eq!(names(&mirrors).len(), usize::from(is_listed), "{call} {number}");
        bench.destroy(&volume);
        Some(was_killed)
    });
    assert!(gone > 2, "{gone}");
}
