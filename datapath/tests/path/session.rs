//! What an export announces to a mirror's source, after calls that were made at once or killed.

use std::collections::BTreeMap;
use std::process::Command;

use plugin::id::ContentId;
use plugin::mirror::{Announcement, Base};
use serde_json::Value;

use super::scene::{Scene, answer, killed_at};

const MIRROR: &str = "MIR0a1b2c";

/// Gives what the export announces.
fn announced(scene: &Scene) -> Announcement {
    let socket = scene.directory_of_volume().join("nbd.sock");
    let uri = format!("nbd+unix:///{}?socket={}", scene.uri.volume, socket.display());
    let output = Command::new("nbdinfo").args(["--json", "--no-content", &uri]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let all: Value = serde_json::from_slice(&output.stdout).unwrap();
    all["exports"][0]["description"].as_str().unwrap().parse().unwrap()
}

/// Comes for a connection as xapi's proxy does.
fn next(scene: &Scene) -> Announcement {
    scene.call("Datapath.attach", MIRROR);
    announced(scene)
}

/// Gives the name of what the volume's node holds.
fn content(scene: &Scene) -> Option<ContentId> {
    let loaded = scene.sr.load(scene.uri.volume).unwrap();
    loaded.tree.node(loaded.volume(scene.uri.volume).unwrap().node).unwrap().content
}

#[test]
fn a_mirror_is_told_what_the_one_before_has_left() {
    let scene = Scene::new();
    scene.call("Datapath.attach", MIRROR);
    scene.call("Datapath.activate", MIRROR);
    let first = next(&scene);
    assert_eq!(first.base, Base::Blank);
    assert!(scene.io("write -P 1 0 1M"));
    let calls: Vec<_> = (0..6).map(|_| scene.start("Datapath.attach", MIRROR)).collect();
    let answers: Vec<Value> = calls.into_iter().map(|call| answer(call).unwrap()).collect();
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]));
    let second = announced(&scene);
    assert_eq!(second.base, Base::Content(first.session));
    scene.call("Datapath.deactivate", MIRROR);
    assert_eq!(content(&scene), Some(second.session));
    scene.call("Datapath.activate", MIRROR);
    assert_eq!(content(&scene), None);
    assert_eq!(next(&scene).base, Base::Content(second.session));
    let diagnostics = scene.try_request("Plugin.diagnostics", b"{\"dbg\":\"\"}").unwrap();
    assert!(diagnostics.as_str().unwrap().contains(&second.session.to_string()), "{diagnostics}");
    scene.call("Datapath.detach", MIRROR);
    scene.assert_nothing_left();
}

/// System calls between which what is said and what is so could come apart.
const STEPS: [&str; 4] = ["rename", "sendto", "unlink", "fsync"];

#[test]
fn calls_killed_at_any_step_leave_no_untrue_promise() {
    let scene = Scene::new();
    // What the source of each mirror knows: what it has sent in which session.
    let mut sent: BTreeMap<ContentId, u64> = BTreeMap::new();
    let mut pattern = 0;
    for method in ["Datapath.attach", "Datapath.activate", "Datapath.deactivate", "Datapath.detach"] {
        let (mut kills, mut known) = (0, 0);
        for call in STEPS {
            for n in 1..60 {
                scene.call("Datapath.attach", MIRROR);
                scene.call("Datapath.activate", MIRROR);
                let announced = next(&scene);
                pattern = pattern % 250 + 1;
                assert!(scene.io(&format!("write -P {pattern} 0 1M")));
                sent.insert(announced.session, pattern);
                let request = scene.request(MIRROR);
                let Some(killed) = killed_at(&scene, method, &request, call, n) else { return };
                kills += u32::from(killed);
                scene.call("Datapath.attach", MIRROR);
                scene.call("Datapath.activate", MIRROR);
                let next = next(&scene);
                assert!(scene.io(&format!("read -P {pattern} 0 1M")), "{method} {call} {n}");
                if let Base::Content(base) = next.base {
                    assert!(sent.get(&base).is_none_or(|sent| *sent == pattern), "{method} {call} {n}");
                    known += u32::from(sent.contains_key(&base));
                }
                // It is written to.
                assert_eq!(content(&scene), None, "{method} {call} {n}");
                if !killed {
                    assert_eq!(next.base, Base::Content(announced.session), "{method} {call} {n}");
                    break;
                }
            }
        }
        assert!(kills > 4 && known > 3, "{method}: {kills} {known}");
    }
    scene.call("Datapath.detach", MIRROR);
    scene.assert_nothing_left();
}
