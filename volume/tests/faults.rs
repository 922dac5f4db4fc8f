//! Damage, bad input and full file systems: a clear error, and nothing changed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};
use support::{Bench, MIB};

/// Every method that names an SR, with a request that works on a volume.
fn requests(bench: &Bench, volume: &str) -> Vec<(&'static str, Value)> {
    let request = |more: Value| bench.request(more);
    vec![
        ("SR.stat", request(json!({}))),
        ("SR.ls", request(json!({}))),
        ("SR.set_name", request(json!({"new_name": "x"}))),
        ("SR.set_description", request(json!({"new_description": "x"}))),
        ("Volume.create", request(json!({"name": "x", "description": "x", "size": MIB, "sharable": false}))),
        ("Volume.stat", request(json!({"key": volume}))),
        ("Volume.snapshot", request(json!({"key": volume}))),
        ("Volume.clone", request(json!({"key": volume}))),
        ("Volume.resize", request(json!({"key": volume, "new_size": 2 * MIB}))),
        ("Volume.set", request(json!({"key": volume, "k": "k", "v": "v"}))),
        ("Volume.unset", request(json!({"key": volume, "k": "k"}))),
        ("Volume.set_name", request(json!({"key": volume, "new_name": "x"}))),
        ("Volume.set_description", request(json!({"key": volume, "new_description": "x"}))),
        ("Volume.destroy", request(json!({"key": volume}))),
        ("SR.destroy", request(json!({}))),
        ("Volume.compose", request(json!({"key": volume, "key2": volume}))),
    ]
}

/// Sees that SR.stat tells of an SR that cannot be used, and names its file.
fn unavailable(stat: &Value) {
    assert_eq!(stat["health"][0], json!("Unavailable"), "{stat}");
    assert!(stat["health"][1].as_str().unwrap().contains("sr.json"), "{stat}");
}

/// Reads all files of an SR, by which it is seen that nothing changed; locks are not content.
fn content(bench: &Bench) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    let mut directories = vec![bench.path.clone()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_symlink() {
                files.push((path.clone(), fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()));
            } else if path.is_dir() {
                directories.push(path);
            } else if !path.ends_with("lock") {
                files.push((path.clone(), fs::read(&path).unwrap()));
            }
        }
    }
    files.sort();
    files
}

#[test]
fn a_record_that_is_cut_off_anywhere_is_named_and_nothing_is_changed() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let path = bench.tree_directory(&volume).join("tree.json");
    let whole = fs::read(&path).unwrap();
    let short = |bytes: &[u8], methods: &[usize]| {
        fs::write(&path, bytes).unwrap();
        let before = content(&bench);
        for (method, request) in methods.iter().map(|index| requests(&bench, &volume).swap_remove(*index)) {
            let failure = bench.host.try_call(method, request.clone()).unwrap_err();
            assert_eq!(failure.code, "SR_BACKEND_FAILURE_46", "{method} {failure:?}");
            assert!(failure.text().contains(path.to_str().unwrap()), "{method} {failure:?}");
        }
        assert_eq!(content(&bench), before);
    };
    // Some lengths for the scan that xapi relies on, fewer for every method that reads the tree; every length is in the
    // suite `check`. Without the newline at its end the record is whole.
    for length in (0..whole.len() - 1).step_by(29) {
        short(&whole[..length], &[1]);
    }
    let reading: Vec<usize> = vec![1, 5, 6, 7, 8, 9, 10, 11, 12, 13];
    for bytes in [&b""[..], &whole[..whole.len() / 2], b"garbage", b"{}", b"{\"format\":1}", b"null", &[0; 4096]] {
        short(bytes, &reading);
    }
    let newer = String::from_utf8(whole.clone()).unwrap().replace("\"format\":1", "\"format\":99");
    short(newer.as_bytes(), &reading);
    fs::remove_file(&path).unwrap();
    assert_eq!(bench.code("SR.ls", json!({})), "SR_BACKEND_FAILURE_46");
    assert_eq!(bench.code("Volume.destroy", json!({"key": volume})), "SR_BACKEND_FAILURE_46");
    fs::write(&path, whole).unwrap();
    bench.check();
}

#[test]
fn an_srs_record_that_is_damaged_or_newer_is_named() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let path = bench.path.join("sr.json");
    let whole = fs::read_to_string(&path).unwrap();
    for text in ["", "{", "{}", &whole.replace("\"format\":1", "\"format\":7")] {
        fs::write(&path, text).unwrap();
        for (method, request) in requests(&bench, &volume) {
            if method == "SR.stat" {
                unavailable(&bench.host.call(method, request));
                continue;
            }
            let failure = bench.host.try_call(method, request).unwrap_err();
            assert_eq!(failure.code, "SR_BACKEND_FAILURE_46", "{method}");
            assert!(failure.text().contains("sr.json"), "{method} {failure:?}");
        }
        let configuration = json!({"configuration": bench.configuration()});
        for method in ["SR.attach", "SR.probe"] {
            assert_eq!(bench.host.code(method, configuration.clone()), "SR_BACKEND_FAILURE_46");
        }
    }
}

#[test]
fn an_sr_whose_file_system_is_gone_is_never_an_empty_one() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let away = bench.path.with_file_name("away");
    fs::rename(&bench.path, &away).unwrap();
    for exists in [false, true] {
        if exists {
            fs::create_dir(&bench.path).unwrap();
        }
        for (method, request) in requests(&bench, &volume) {
            if method == "SR.stat" {
                unavailable(&bench.host.call(method, request));
                continue;
            }
            assert_eq!(bench.host.code(method, request), "SR_BACKEND_FAILURE_47", "{method}");
        }
        let configuration = json!({"configuration": bench.configuration()});
        assert_eq!(bench.host.code("SR.attach", configuration), "SR_BACKEND_FAILURE_47");
    }
    // Another SR in its place is not it either.
    let other = json!({"uuid": uuid::Uuid::new_v4().to_string(), "configuration": bench.configuration(),
        "name": "", "description": ""});
    bench.host.call("SR.create", other);
    assert_eq!(bench.code("SR.ls", json!({})), "SR_BACKEND_FAILURE_47");
    assert_eq!(bench.code("Volume.destroy", json!({"key": volume})), "SR_BACKEND_FAILURE_47");
}

#[test]
fn requests_that_mean_nothing_are_refused_and_change_nothing() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let before = content(&bench);
    for (method, request) in requests(&bench, &volume) {
        let fields: Vec<String> = request.as_object().unwrap().keys().filter(|key| *key != "dbg").cloned().collect();
        for field in fields {
            let mut missing = request.clone();
            missing.as_object_mut().unwrap().remove(&field);
            assert_eq!(bench.host.code(method, missing), "SR_BACKEND_FAILURE_115", "{method} without {field}");
            for wrong in [Value::Null, json!([]), json!({}), json!(1.5), json!([[[]]])] {
                let mut changed = request.clone();
                changed[&field] = wrong.clone();
                assert_eq!(bench.host.code(method, changed), "SR_BACKEND_FAILURE_115", "{method} {field} {wrong}");
            }
        }
        for bytes in [&b""[..], b"null", b"[]", b"{", b"\xff", b"{\"sr\":\"\xff\"}", "[".repeat(10_000).as_bytes()] {
            let failure = bench.host.finish(bench.host.start_bytes(method, bytes)).unwrap_err();
            assert_eq!(failure.code, "SR_BACKEND_FAILURE_115", "{method}");
        }
    }
    assert_eq!(content(&bench), before);
}

#[test]
fn names_that_are_no_uuids_name_nothing() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let before = content(&bench);
    let upper = volume.to_uppercase();
    let long = "x".repeat(1 << 20);
    let through = format!("../volumes/{volume}");
    for odd in ["", ".", "..", "../..", "/etc/passwd", "a\0b", "a\nb", "'\"", &upper, &through, &long, "é"] {
        for (method, request) in requests(&bench, &volume) {
            if request.get("key").is_some() {
                let mut changed = request.clone();
                changed["key"] = json!(odd);
                match bench.host.try_call(method, changed) {
                    Ok(answer) => assert_eq!((method, answer), ("Volume.destroy", Value::Null)),
                    Err(failure) => {
                        assert_eq!(failure.code, "Volume_does_not_exist", "{method}");
                        assert!(failure.text().len() < 1000);
                    }
                }
            }
            let mut changed = request.clone();
            changed["sr"] = json!(odd);
            assert_eq!(bench.host.code(method, changed), "Sr_not_attached", "{method}");
        }
        assert_eq!(bench.host.call("SR.detach", json!({"sr": odd})), Value::Null);
        let uri = json!({"configuration": {"uri": odd}});
        for method in ["SR.attach", "SR.probe"] {
            assert_eq!(bench.host.code(method, uri.clone()), "SR_BACKEND_FAILURE_91", "{method} {odd:.40}");
        }
        let create = json!({"uuid": odd, "configuration": bench.configuration(), "name": "", "description": ""});
        assert_eq!(bench.host.code("SR.create", create), "SR_BACKEND_FAILURE_115");
    }
    for method in ["SR.attach", "SR.probe"] {
        assert_eq!(bench.host.code(method, json!({"configuration": {}})), "SR_BACKEND_FAILURE_90");
    }
    assert_eq!(content(&bench), before);
}

#[test]
fn sizes_that_no_volume_has_are_refused() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let before = content(&bench);
    for size in [json!(0), json!(-1), json!(i64::MIN), json!(i64::MAX), json!(1_u64 << 63), json!((64_u64 << 40) + 1)]
    {
        let create = json!({"name": "", "description": "", "size": size, "sharable": false});
        assert_eq!(bench.code("Volume.create", create), "SR_BACKEND_FAILURE_79", "{size}");
        let resize = json!({"key": volume, "new_size": size});
        assert_eq!(bench.code("Volume.resize", resize), "SR_BACKEND_FAILURE_79", "{size}");
    }
    assert_eq!(content(&bench), before);
    let large = bench.create(64 << 40);
    assert_eq!(bench.call("Volume.stat", json!({"key": large}))["virtual_size"], json!(64_u64 << 40));
    bench.snapshot(&large);
    bench.check();
}

#[test]
fn any_text_is_stored_exactly() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let long = "é".repeat(1 << 19);
    for text in ["", "a\0b\n\r\t\u{1}\u{7f}\u{2028}", "'\"\\/{}[]", "../../x", "\u{10ffff}\u{feff}", &long] {
        bench.call("Volume.set_name", json!({"key": volume, "new_name": text}));
        bench.call("Volume.set_description", json!({"key": volume, "new_description": text}));
        bench.call("Volume.set", json!({"key": volume, "k": text, "v": text}));
        bench.call("SR.set_name", json!({"new_name": text}));
        let record = bench.call("Volume.stat", json!({"key": volume}));
        assert_eq!((&record["name"], &record["description"]), (&json!(text), &json!(text)));
        assert_eq!(record["keys"][text], json!(text));
        assert_eq!(bench.call("SR.ls", json!({})), json!([record]));
        assert_eq!(bench.call("SR.stat", json!({}))["name"], json!(text));
    }
    bench.check();
}

#[test]
fn a_hundred_thousand_keys_are_kept() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let path = bench.tree_directory(&volume).join("tree.json");
    let mut tree = bench.tree(&volume);
    let keys: serde_json::Map<String, Value> = (0..100_000).map(|i| (format!("k{i}"), json!("v"))).collect();
    tree["volumes"][&volume]["keys"] = Value::Object(keys.clone());
    fs::write(&path, tree.to_string()).unwrap();
    bench.call("Volume.set", json!({"key": volume, "k": "k0", "v": "new"}));
    let record = bench.call("Volume.stat", json!({"key": volume}));
    assert_eq!(record["keys"].as_object().unwrap().len(), keys.len());
    assert_eq!(record["keys"]["k0"], json!("new"));
    bench.snapshot(&volume);
    bench.destroy(&volume);
    bench.check();
}

#[test]
fn an_image_that_is_missing_is_named_by_the_scan() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let file = bench.node_file(&volume);
    fs::remove_file(&file).unwrap();
    for (method, more) in [("SR.ls", json!({})), ("Volume.stat", json!({"key": volume}))] {
        let failure = bench.try_call(method, more).unwrap_err();
        assert!(failure.code == "SR_BACKEND_FAILURE_46" && failure.text().contains(file.to_str().unwrap()));
    }
    bench.destroy(&volume);
    bench.check();
}

#[test]
fn few_descriptors_a_closed_input_and_an_open_umask_do_no_harm() {
    let bench = Bench::new();
    let program = env!("CARGO_BIN_EXE_xapi-storage-qcow2-volume");
    let shell = |script: &str, request: &Value| {
        let request_file = bench.path.with_file_name("request");
        fs::write(&request_file, request.to_string()).unwrap();
        let output = Command::new("sh")
            .args(["-c", script, "sh", program])
            .arg(&request_file)
            .env("XAPI_STORAGE_QCOW2_ROOT", &bench.host.root)
            .env("LC_ALL", "tr_TR.UTF-8")
            .output()
            .unwrap();
        (output.status.success(), serde_json::from_slice::<Value>(&output.stdout).unwrap())
    };
    let create = bench.request(json!({"name": "x", "description": "", "size": MIB, "sharable": false}));
    let limited = r#"umask 0; ulimit -n 64; exec "$1" Volume.create --json < "$2""#;
    let (made, record) = shell(limited, &create);
    assert!(made, "{record}");
    bench.snapshot(&support::key(&record));
    let (made, failure) = shell(r#"exec "$1" Volume.create --json <&-"#, &create);
    assert!(!made && failure["code"].as_str().unwrap().starts_with("SR_BACKEND_FAILURE_"), "{failure}");
    for (path, _) in content(&bench) {
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::symlink_metadata(&path).unwrap().permissions());
        assert!(path.is_symlink() || mode & 0o077 == 0, "{} {mode:o}", path.display());
    }
    bench.check();
}

/// An SR on a small file system of its own.
struct Small {
    bench: Option<Bench>,
    mount: PathBuf,
    directory: tempfile::TempDir,
}

impl Small {
    /// Makes and mounts it; `None` where that is not allowed.
    fn new() -> Option<Self> {
        let directory = tempfile::Builder::new().prefix("vs-").tempdir_in("/tmp").unwrap();
        let image = directory.path().join("fs");
        let mount = directory.path().join("mnt");
        fs::create_dir(&mount).unwrap();
        fs::File::create(&image).unwrap().set_len(16 * MIB).unwrap();
        let made = Command::new("mkfs.ext4").args(["-q", "-m", "0", "-b", "1024"]).arg(&image).status();
        let mounted = Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&mount).status();
        if !made.is_ok_and(|status| status.success()) || !mounted.is_ok_and(|status| status.success()) {
            return None;
        }
        let mut bench = Bench::without_sr();
        bench.path = mount.join("sr");
        fs::create_dir(&bench.path).unwrap();
        bench.create_sr();
        Some(Self { bench: Some(bench), mount, directory })
    }

    /// Leaves that many bytes free, or none.
    fn fill(&self, leave: u64) {
        let path = self.mount.join("fill");
        let _ = fs::remove_file(&path);
        let mut file = fs::File::create(&path).unwrap();
        for size in [1 << 20, 1 << 10] {
            let block = vec![1; size];
            while std::io::Write::write_all(&mut file, &block).is_ok() {}
        }
        let _ = file.sync_all();
        let length = file.metadata().unwrap().len();
        file.set_len(length.saturating_sub(leave)).unwrap();
        let _ = file.sync_all();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        self.bench.take();
        let unmounted = Command::new("umount").arg(&self.mount).status();
        assert!(unmounted.is_ok_and(|status| status.success()), "{}", self.directory.path().display());
    }
}

#[test]
fn on_a_full_file_system_every_call_fails_cleanly_and_destroy_works() {
    let Some(small) = Small::new() else {
        return eprintln!("skipped: no loop devices or no right to mount");
    };
    let bench = small.bench.as_ref().unwrap();
    let volume = bench.create(MIB);
    let first = bench.snapshot(&volume);
    let second = bench.snapshot(&volume);
    let alone = bench.create(MIB);
    let calls = [
        ("Volume.create", json!({"name": "x", "description": "x", "size": MIB, "sharable": false})),
        ("Volume.snapshot", json!({"key": volume})),
        ("Volume.clone", json!({"key": volume})),
        ("Volume.set", json!({"key": volume, "k": "k", "v": "v".repeat(100_000)})),
        ("SR.set_name", json!({"new_name": "n".repeat(100_000)})),
    ];
    // From nothing free up to where it works, and once more in small steps where it begins to, so that each of a
    // call's writes is the one that fails.
    for (method, request) in calls {
        let works_with = |kibibytes: usize| {
            small.fill(kibibytes as u64 * 1024);
            let before = (bench.keys(), bench.node_files(), support::names(&bench.path.join("volumes")));
            match bench.try_call(method, request.clone()) {
                Ok(_) => true,
                Err(failure) => {
                    assert_eq!(failure.code, "SR_BACKEND_FAILURE_44", "{method} {kibibytes} {failure:?}");
                    let after = (bench.keys(), bench.node_files(), support::names(&bench.path.join("volumes")));
                    assert_eq!(after, before, "{method} {kibibytes}");
                    false
                }
            }
        };
        let enough = (0..1024).step_by(8).find(|leave| works_with(*leave)).unwrap();
        assert!(enough > 0, "{method} worked without any space");
        for leave in enough - 8..enough {
            works_with(leave);
        }
    }
    small.fill(0);
    for key in [&first, &alone, &volume, &second] {
        bench.destroy(key);
        bench.destroy(key);
        small.fill(0);
    }
    for key in bench.keys() {
        bench.destroy(&key);
        small.fill(0);
    }
    assert_eq!(bench.keys(), Vec::<String>::new());
    bench.check();
}

#[test]
fn keys_that_tell_of_snapshots_that_are_none_change_nothing() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let snapshot = bench.snapshot(&volume);
    let nobody = uuid::Uuid::new_v4().to_string();
    // Of itself, of each other, of nobody, of no volume at all: parentage is the plugin's own.
    for (of_volume, of_snapshot) in [
        (&volume, &snapshot),
        (&snapshot, &volume),
        (&nobody, &nobody),
        (&volume, &volume),
        (&String::new(), &"../x".into()),
    ] {
        for (key, of) in [(&volume, of_volume), (&snapshot, of_snapshot)] {
            bench.call("Volume.set", json!({"key": key, "k": "snapshot_of", "v": of}));
            bench.call("Volume.set", json!({"key": key, "k": "is_a_snapshot", "v": "true"}));
        }
        let second = bench.snapshot(&volume);
        let clone = bench.clone_of(&snapshot);
        bench.call("Volume.revert", json!({"key": volume, "snapshot": second}));
        bench.destroy(&second);
        bench.destroy(&clone);
        let mut expected = vec![volume.clone(), snapshot.clone()];
        expected.sort();
        assert_eq!(bench.keys(), expected);
    }
    bench.destroy(&volume);
    assert_eq!(bench.keys(), std::slice::from_ref(&snapshot));
    bench.destroy(&snapshot);
    bench.check();
}

#[test]
fn without_space_nodes_stay_two_and_everything_reads_the_same() {
    let Some(small) = Small::new() else {
        return eprintln!("skipped: no loop devices or no right to mount");
    };
    let bench = small.bench.as_ref().unwrap();
    let volume = bench.create(4 * MIB);
    support::write(&bench.node_file(&volume), 1, 0, 2 * MIB);
    let snapshot = bench.snapshot(&volume);
    support::write(&bench.node_file(&volume), 2, 3 * MIB, MIB);
    bench.destroy(&snapshot);
    let reads = || {
        for (pattern, at, length) in [(1, 0, 2 * MIB), (0, 2 * MIB, MIB), (2, 3 * MIB, MIB)] {
            support::assert_reads(&bench.node_file(&volume), pattern, at, length);
        }
    };
    for leave in [0, 16 << 10, 200 << 10, 700 << 10] {
        small.fill(leave);
        let log = bench.host.gc(&bench.sr);
        assert!(log.contains("no space left"), "{leave}: {log}");
        let tree = bench.tree(&volume);
        assert_eq!((tree.get("merge"), tree["nodes"].as_object().unwrap().len()), (None, 2), "{tree}");
        reads();
        let text = bench.host.call("Plugin.diagnostics", json!({"dbg": ""}));
        assert!(text.as_str().unwrap().contains("failed: "), "{text}");
        bench.check();
    }
    small.fill(8 * MIB);
    bench.gc();
    assert_eq!(bench.tree(&volume)["nodes"].as_object().unwrap().len(), 1);
    reads();
    bench.check();
}
