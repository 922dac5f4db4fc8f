//! What every method says of an SR that cannot be used: which file, what is wrong, and which command helps.

use std::fs;
use std::path::{Path, PathBuf};

use plugin::error::Error;
use plugin::host::Host;
use plugin::store::Sr;
use serde_json::{Value, json};

use crate::program::check;
use crate::support::{Bench, MIB};

/// Sees that an error names the file and the command.
fn helps(error: &Error, path: &Path, sr: &Path) {
    let text = error.chain();
    assert!(matches!(error, Error::DamagedRecord { .. }), "{text}");
    assert!(text.contains(path.to_str().unwrap()), "{text}");
    assert!(text.contains(&format!("'xapi-storage-qcow2 check {}'", sr.display())), "{text}");
}

#[test]
fn records_cut_off_at_every_length_are_refused_by_whatever_reads_them() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    bench.snapshot(&volume);
    bench.create(MIB);
    let host = Host::at(&bench.host.root);
    let (uuid, key) = (bench.sr.parse().unwrap(), volume.parse().unwrap());
    let tree = bench.tree_directory(&volume).join("tree.json");
    let garbage = [vec![0; 4096], b"null".to_vec(), b"[]".to_vec(), b"{}".to_vec(), b"{\"format\":1}".to_vec()];
    let cut = |path: &Path| {
        let whole = fs::read(path).unwrap();
        // Without the newline at its end a record is whole.
        (0..whole.len() - 1).map(|length| whole[..length].to_vec()).chain(garbage.clone()).collect::<Vec<_>>()
    };
    let whole = fs::read(&tree).unwrap();
    for bytes in cut(&tree) {
        fs::write(&tree, &bytes).unwrap();
        let sr = Sr::attached(&host, uuid).unwrap();
        for error in [
            sr.has_readable_trees().unwrap_err(),
            sr.volumes().unwrap_err(),
            sr.stat(key).unwrap_err(),
            sr.load(key).unwrap_err(),
            sr.lock(&host, key).unwrap_err(),
        ] {
            helps(&error, &tree, &bench.path);
        }
        assert_eq!(fs::read(&tree).unwrap(), bytes);
    }
    fs::write(&tree, &whole).unwrap();
    let record = bench.path.join("sr.json");
    let whole = fs::read(&record).unwrap();
    for bytes in cut(&record) {
        fs::write(&record, &bytes).unwrap();
        for opened in [Sr::attached(&host, uuid), Sr::open(&bench.path)] {
            helps(&opened.unwrap_err(), &record, &bench.path);
        }
    }
    fs::write(&record, &whole).unwrap();
    bench.check();
}

/// Calls the methods by which xapi would find an SR empty, and sees that each says what is wrong.
fn refuses(bench: &Bench, volume: &str, words: &[&str]) {
    let configuration = json!({"configuration": bench.configuration()});
    let requests: Vec<(&str, Value)> = vec![
        ("SR.attach", configuration),
        ("SR.ls", bench.request(json!({}))),
        ("Volume.stat", bench.request(json!({"key": volume}))),
        ("Volume.snapshot", bench.request(json!({"key": volume}))),
        ("Volume.destroy", bench.request(json!({"key": volume}))),
    ];
    for (method, request) in requests {
        let failure = bench.host.try_call(method, request).unwrap_err();
        for word in words {
            assert!(failure.text().contains(word), "{method} does not say {word}: {failure:?}");
        }
    }
    let stat = bench.call("SR.stat", json!({}));
    assert_eq!(stat["health"][0], json!("Unavailable"), "{stat}");
    for word in words {
        assert!(stat["health"][1].as_str().unwrap().contains(word), "SR.stat does not say {word}: {stat}");
    }
}

#[test]
fn an_sr_that_cannot_be_used_is_refused_by_every_method_with_what_to_do() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let command = format!("xapi-storage-qcow2 check {}", bench.path.display());
    let record = bench.tree_directory(&volume).join("tree.json");
    let whole = fs::read_to_string(&record).unwrap();
    for text in ["", &whole[..whole.len() / 2], "garbage"] {
        fs::write(&record, text).unwrap();
        refuses(&bench, &volume, &[record.to_str().unwrap(), &command]);
    }
    fs::write(&record, whole.replace("\"format\":1", "\"format\":42")).unwrap();
    refuses(&bench, &volume, &[record.to_str().unwrap(), "format 42", "install a newer version"]);
    fs::write(&record, &whole).unwrap();

    let record = bench.path.join("sr.json");
    let whole = fs::read_to_string(&record).unwrap();
    fs::write(&record, &whole[..20]).unwrap();
    refuses(&bench, &volume, &[record.to_str().unwrap(), &command]);
    fs::write(&record, whole.replace("\"format\":1", "\"format\":42")).unwrap();
    refuses(&bench, &volume, &[record.to_str().unwrap(), "format 42", "install a newer version"]);
    fs::write(&record, whole).unwrap();

    let away: PathBuf = bench.path.with_file_name("away");
    fs::rename(&bench.path, &away).unwrap();
    for exists in [false, true] {
        if exists {
            fs::create_dir(&bench.path).unwrap();
        }
        refuses(&bench, &volume, &["sr.json", "mount", &command]);
    }
    // An empty directory is not taken for an SR that has lost its record.
    let (status, report) = check(&bench.host, &bench.path, &["--repair"]);
    assert!(status == 1 && report["findings"][0]["remedy"].as_str().unwrap().contains("mount"), "{report:#}");
    assert_eq!(fs::read_dir(&bench.path).unwrap().count(), 0);
    fs::remove_dir(&bench.path).unwrap();
    fs::rename(&away, &bench.path).unwrap();
    bench.check();
}

#[test]
fn an_srs_record_that_is_lost_is_made_anew_where_the_sr_is_attached() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let record = bench.path.join("sr.json");
    let whole = fs::read(&record).unwrap();
    for torn in [true, false] {
        if torn {
            fs::write(&record, &whole[..10]).unwrap()
        } else {
            fs::remove_file(&record).unwrap()
        }
        let elsewhere = crate::support::Host { root: bench.path.with_file_name("other") };
        assert_eq!(check(&elsewhere, &bench.path, &["--repair", "--fast"]).0, 1);
        let (status, report) = check(&bench.host, &bench.path, &["--repair", "--fast"]);
        assert_eq!(status, 0, "{report:#}");
        assert_eq!(fs::read(&record).unwrap(), whole);
    }
    assert_eq!(fs::read(bench.path.join("sr.json.damaged")).unwrap(), &whole[..10]);
    assert_eq!(bench.keys(), [volume]);
}
