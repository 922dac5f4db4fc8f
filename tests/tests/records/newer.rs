//! Records of newer versions: refused by every call that would use them, with what to do, and left as they are.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::older::{ALL, Site, files};

/// The format of a version that there is not yet.
const NEWER: u64 = 99;

/// Gives the requests of all methods that concern an SR, a volume, or a mirror, each as xapi makes it.
fn requests(site: &Site, [volume, other]: [&str; 2]) -> Vec<(&'static str, Value)> {
    let configuration = json!({"configuration": site.configuration()});
    let key = json!({"key": volume});
    let pair = json!({"key": volume, "key2": other});
    let with = |more: Value| {
        let mut request = key.clone();
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        request
    };
    let path = json!({"uri": site.uri(volume), "domain": "7"});
    let sent = json!({"uri": site.uri(volume), "domain": "7", "remote": "nbd:unix:/nonexistent:exportname=x"});
    let copied = json!({"uri": site.uri(volume), "domain": "7", "remote": "nbd:unix:/nonexistent:exportname=x", "blocklist": {"blocksize": 65536, "ranges": []}});
    vec![
        ("SR.attach", configuration),
        ("SR.ls", json!({})),
        ("SR.set_name", json!({"new_name": "x"})),
        ("SR.set_description", json!({"new_description": "x"})),
        ("SR.destroy", json!({})),
        ("Volume.create", json!({"name": "x", "description": "", "size": 1 << 20, "sharable": false})),
        ("Volume.snapshot", key.clone()),
        ("Volume.clone", key.clone()),
        ("Volume.copy", with(json!({"dest_sr": site.expected.sr}))),
        ("Volume.compose", pair.clone()),
        ("Volume.revert", with(json!({"snapshot": other}))),
        ("Volume.compare", pair.clone()),
        ("Volume.similar_content", key.clone()),
        ("Volume.stat", key.clone()),
        ("Volume.set", with(json!({"k": "k", "v": "v"}))),
        ("Volume.unset", with(json!({"k": "k"}))),
        ("Volume.set_name", with(json!({"new_name": "x"}))),
        ("Volume.set_description", with(json!({"new_description": "x"}))),
        ("Volume.resize", with(json!({"new_size": 2 << 20}))),
        ("Volume.enable_cbt", key.clone()),
        ("Volume.disable_cbt", key.clone()),
        ("Volume.data_destroy", key.clone()),
        ("Volume.list_changed_blocks", with(json!({"key2": other, "offset": 0, "length": 1 << 20}))),
        ("Volume.destroy", key.clone()),
        ("Datapath.open", json!({"uri": site.uri(volume), "persistent": false})),
        ("Datapath.attach", path.clone()),
        ("Datapath.activate", path.clone()),
        ("Datapath.activate_readonly", path.clone()),
        ("Datapath.import_activate", path.clone()),
        ("Datapath.deactivate", path.clone()),
        ("Datapath.detach", path.clone()),
        ("Datapath.close", json!({"uri": site.uri(volume)})),
        ("Data.mirror", sent),
        ("Data.copy", copied),
    ]
}

/// Gives all files below a directory with what is in them.
fn everything(path: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path).unwrap().flatten() {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            found.extend(everything(&entry.path()));
        } else if kind.is_file() {
            // Locks are made by whoever comes.
            found.extend(
                fs::read(entry.path()).ok().filter(|bytes| !bytes.is_empty()).map(|bytes| (entry.path(), bytes)),
            );
        }
    }
    found.sort();
    found
}

/// Makes a record a newer version's and sees that every method whose name begins as one of `which` refuses it, but those that
/// `pass` names, which succeed.
fn refused(site: &Site, volumes: [&str; 2], record: &Path, which: &[&str], pass: &[&str]) {
    let tree = site.tree(volumes[0]).0;
    let whole = fs::read(record).unwrap();
    let mut newer: Value = serde_json::from_slice(&whole).unwrap();
    newer["format"] = NEWER.into();
    newer["of a newer version"] = json!({"unknown": true});
    fs::write(record, newer.to_string()).unwrap();
    let before = everything(&tree);
    let mut passed = BTreeSet::new();
    let requests = requests(site, volumes).into_iter();
    for (method, request) in requests.filter(|(method, _)| which.iter().any(|which| method.starts_with(which))) {
        match site.try_call(method, request) {
            Ok(_) => drop(passed.insert(method)),
            Err(error) => {
                let text = error["backtrace"]["error"].as_str().unwrap();
                // By the volume's name, which is there whatever its record says.
                if method == "SR.destroy" && text.contains("still holds volumes") {
                    continue;
                }
                for word in [record.to_str().unwrap(), "format 99", "install a newer version"] {
                    assert!(text.contains(word), "{method} does not say {word}: {text}");
                }
            }
        }
    }
    assert_eq!(passed, pass.iter().copied().collect(), "of {}", record.display());
    assert_eq!(fs::read(record).unwrap(), newer.to_string().as_bytes(), "it is left as it is");
    assert!(before == everything(&tree), "the volume was changed");
    fs::write(record, whole).unwrap();
}

#[test]
fn a_newer_record_is_refused_by_every_call_that_would_use_it_and_left_as_it_is() {
    let site = Site::new();
    let (volume, other) = (site.create(), site.create());
    let volumes = [volume.as_str(), other.as_str()];
    // What was never attached is detached whatever there is.
    let all = ["SR.", "Volume.", "Datapath.", "Data."];
    refused(&site, volumes, &site.path.join("sr.json"), &all, &["Datapath.detach"]);
    let attached = site.run().join("srs").join(format!("{}.json", site.expected.sr));
    refused(&site, volumes, &attached, &all, &["Datapath.detach"]);
    // What does not concern the volume.
    let others = ["Datapath.detach", "SR.set_description", "SR.set_name", "Volume.create"];
    refused(&site, volumes, &site.tree(&volume).0.join("tree.json"), &all, &others);
    site.datapath(&["attach", "activate"], &volume, "7");
    let state = site.run().join("volumes").join(&volume).join("state.json");
    let running = ["Datapath.", "Data.", "Volume.snapshot", "Volume.resize", "Volume.destroy", "Volume.revert"];
    // Nothing of the volume is thrown away when it is closed.
    refused(&site, volumes, &state, &running, &["Datapath.close"]);
    site.datapath(&["deactivate", "detach"], &volume, "7");
    site.call("SR.detach", json!({}));
}

#[test]
fn a_mirror_of_a_newer_version_is_refused_and_data_stat_calls_it_failed() {
    let site = Site::new();
    let mut record: Value =
        serde_json::from_slice(&fs::read(files(ALL[0]).join("run/mirror.json")).unwrap()).unwrap();
    let key = record["key"].as_str().unwrap().to_owned();
    record["format"] = NEWER.into();
    let path = site.run().join("mirrors").join(&key).join("state.json");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, record.to_string()).unwrap();
    let operation = json!({"operation": ["MirrorV1", key]});
    for (method, request) in
        [("Data.destroy", operation.clone()), ("Data.cancel", operation.clone()), ("Task.stat", json!({"id": key}))]
    {
        let error = site.try_call(method, request).unwrap_err();
        let text = error["backtrace"]["error"].as_str().unwrap();
        assert!(
            text.contains(path.to_str().unwrap()) && text.contains("install a newer version"),
            "{method}: {text}"
        );
    }
    // xapi asks it without a pause, and gives up when it fails.
    let stat = site.call("Data.stat", operation);
    assert_eq!((&stat["failed"], &stat["complete"]), (&json!(true), &json!(false)));
    assert_eq!(fs::read_to_string(&path).unwrap(), record.to_string());
}
