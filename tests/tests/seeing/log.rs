//! The host's log: a line a call, in the form of syslog or with the journal's fields, and never in anybody's way.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::listener::{Listener, bind};
use crate::site::Site;

/// Gives the value of a line's field.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let rest = &line[line.find(&format!(" {name}="))? + name.len() + 2..];
    Some(match rest.strip_prefix('"') {
        Some(quoted) => &quoted[..quoted.find('"')?],
        None => rest.split(' ').next()?,
    })
}

#[test]
fn each_call_is_one_line_in_syslog_with_what_it_was_about_and_how_it_ended() {
    let site = Site::bare();
    let log = Listener::syslog(&site.root);
    let create = json!({"uuid": site.sr, "configuration": site.configuration(), "name": "n", "description": ""});
    site.call("SR.create", create);
    site.call("SR.attach", json!({"configuration": site.configuration()}));
    let volume = site.create();
    site.call("Volume.stat", json!({"key": volume, "dbg": "task R:1\n{\"traceparent\":\"x\"}"}));
    site.call("Datapath.attach", json!({"uri": site.uri(&volume), "domain": "7"}));
    site.call("Datapath.detach", json!({"uri": site.uri(&volume), "domain": "7"}));
    site.try_call("Volume.resize", json!({"key": volume, "new_size": -1})).unwrap_err();
    let methods = [
        "SR.create",
        "SR.attach",
        "Volume.create",
        "Volume.stat",
        "Datapath.attach",
        "Datapath.detach",
        "Volume.resize",
    ];
    for method in methods {
        log.wait_for(method, |line| field(line, "method") == Some(method));
    }
    let lines = log.lines();
    let ends: Vec<&str> = lines.iter().filter_map(|line| field(line, "outcome").and(field(line, "method"))).collect();
    assert_eq!(ends, methods, "{lines:#?}");
    let of = |method: &str| lines.iter().find(|line| field(line, "method") == Some(method)).unwrap();
    for line in &lines {
        assert!(line.starts_with('<') && line.contains(" xapi-storage-qcow2["), "{line}");
        assert!(field(line, "ms").unwrap().parse::<f64>().unwrap() > 0.0, "{line}");
        assert!(!line.contains('\n'), "{line}");
    }
    // local2 and info, local2 and error.
    assert!(of("Volume.stat").starts_with("<150>") && of("Volume.resize").starts_with("<147>"), "{lines:#?}");
    assert_eq!(field(of("Volume.stat"), "dbg"), Some("task R:1"));
    assert_eq!(field(of("SR.create"), "sr"), Some(site.sr.as_str()));
    for method in ["Volume.stat", "Datapath.attach"] {
        assert_eq!(field(of(method), "sr"), Some(site.sr.as_str()));
        assert_eq!(field(of(method), "volume"), Some(volume.as_str()));
    }
    assert_eq!(field(of("Datapath.attach"), "domain"), Some("7"));
    assert_eq!(field(of("Volume.resize"), "outcome"), Some("SR_BACKEND_FAILURE_79"));
    assert!(field(of("Volume.resize"), "error").unwrap().contains("-1"), "{lines:#?}");
}

#[test]
fn the_journal_gets_a_field_for_each_value_in_place_of_syslog() {
    let site = Site::new();
    let (journal, syslog) = (Listener::journal(&site.root), Listener::syslog(&site.root));
    let volume = site.create();
    site.call("Volume.stat", json!({"key": volume}));
    let entry = journal.wait_for("Volume.stat", |entry| entry.contains("QCOW2_METHOD=Volume.stat\n"));
    let values: Vec<(&str, &str)> = entry.lines().map(|line| line.split_once('=').unwrap()).collect();
    for (name, value) in [
        ("PRIORITY", "6"),
        ("SYSLOG_FACILITY", "18"),
        ("SYSLOG_IDENTIFIER", "xapi-storage-qcow2"),
        ("QCOW2_SR", &site.sr),
        ("QCOW2_VOLUME", &volume),
        ("QCOW2_DBG", "a task"),
        ("QCOW2_OUTCOME", "ok"),
    ] {
        assert!(values.contains(&(name, value)), "{name}={value} in {entry}");
    }
    assert!(values.iter().any(|(name, _)| *name == "QCOW2_MS"), "{entry}");
    assert!(entry.starts_with(&format!("MESSAGE=done method=Volume.stat volume={volume} outcome=ok\n")), "{entry}");
    assert_eq!(syslog.lines(), Vec::<String>::new());
}

#[test]
fn a_log_that_hangs_or_takes_nothing_neither_fails_nor_delays_a_call() {
    let site = Site::new();
    for path in ["dev/log", "run/systemd/journal/socket"] {
        // Nobody reads what comes here; ever more calls fill it.
        let _full = bind(&site.root.join(path));
        for _ in 0..30 {
            let begun = Instant::now();
            site.call("Volume.stat", json!({"key": site.create()}));
            assert!(begun.elapsed() < Duration::from_secs(20));
        }
    }
    // Not a socket at all.
    std::fs::remove_file(site.root.join("dev/log")).unwrap();
    std::fs::write(site.root.join("dev/log"), "").unwrap();
    std::fs::remove_file(site.root.join("run/systemd/journal/socket")).unwrap();
    site.create();
}
