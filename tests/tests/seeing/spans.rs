//! Spans for xapi's observers, held against one that observer.py wrote.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::site::Site;

/// Where xapi puts the files of observers of storage.
pub const CONFIGURATIONS: &str = "etc/xensource/observer/smapi/enabled";

/// Where xapi wants spans.
pub const SPANS: &str = "var/log/dt/zipkinv2/json";

/// What observer.py wrote, and from what.
pub fn golden() -> Value {
    serde_json::from_str(include_str!("../../golden/observer-span.json")).unwrap()
}

/// Has a host's scripts observed.
pub fn observe(root: &Path) {
    fs::create_dir_all(root.join(CONFIGURATIONS)).unwrap();
    let path = root.join(CONFIGURATIONS).join("33333333-0000-4000-8000-000000000003.observer.conf");
    fs::write(path, golden()["conf"].as_str().unwrap()).unwrap();
}

/// Gives all spans that were written on a host, a list for each file; each file is to be whole.
pub fn written(root: &Path) -> Vec<Vec<Value>> {
    let Ok(entries) = fs::read_dir(root.join(SPANS)) else { return Vec::new() };
    let mut lists = Vec::new();
    for entry in entries {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        // What is hidden is not complete yet, and nobody's to read.
        if name.starts_with('.') {
            continue;
        }
        assert!(path.extension().is_some_and(|extension| extension == "ndjson"), "{}", path.display());
        for line in fs::read_to_string(&path).unwrap().lines() {
            lists.push(serde_json::from_str::<Vec<Value>>(line).unwrap());
        }
    }
    lists
}

fn keys(value: &Value) -> BTreeSet<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

/// Holds a span against the golden one: the same fields of the same types, and whatever the observer said of itself.
pub fn assert_formed(span: &Value) {
    let golden = &golden()["span"];
    let mut fields = keys(span);
    // observer.py has nothing to note; xapi itself does (ocaml/libs/tracing/tracing_export.ml).
    fields.remove("annotations");
    assert_eq!(fields, keys(golden), "{span}");
    for (name, expected) in golden.as_object().unwrap() {
        let found = &span[name];
        assert_eq!(std::mem::discriminant(found), std::mem::discriminant(expected), "{name} in {span}");
        if let (Some(found), Some(expected)) = (found.as_str(), expected.as_str())
            && name != "name"
        {
            assert_eq!(found.len(), expected.len(), "{name} in {span}");
            assert!(found.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')), "{span}");
        }
    }
    assert_eq!(span["localEndpoint"], golden["localEndpoint"]);
    for (name, expected) in golden["tags"].as_object().unwrap() {
        let is_its_own =
            name.starts_with("telemetry.") || name == "service.instance.id" || name.starts_with("xs.span.");
        match name.starts_with("otel.") {
            true => assert!(span["tags"][name].is_string(), "{name} in {span}"),
            false if is_its_own => {}
            false => assert_eq!(span["tags"][name], *expected, "{name} in {span}"),
        }
    }
    // Microseconds since 1970: between 2020 and 2100.
    assert!((1_577_836_800_000_000..4_102_444_800_000_000).contains(&span["timestamp"].as_u64().unwrap()), "{span}");
}

/// Makes a call as observer.py's stand-in does.
fn traced(site: &Site, method: &str, request: &Value, parent: Option<&str>) -> bool {
    let mut command = site.command(method);
    command.arg("--json").env("OBSERVER_CONFIG_DIR", format!("'/{CONFIGURATIONS}'"));
    if let Some(parent) = parent {
        command.env("TRACEPARENT", parent);
    }
    Site::run(command, request).status.success()
}

#[test]
fn a_call_is_a_span_as_the_observer_writes_it_below_that_of_xapi() {
    let site = Site::new();
    let golden = golden();
    let parent = golden["traceparent"].as_str().unwrap();
    let volume = site.create();
    let stat = json!({"sr": site.sr, "key": volume, "dbg": "task"});
    assert!(traced(&site, "Volume.stat", &stat, Some(parent)));
    assert_eq!(written(&site.root), Vec::<Vec<Value>>::new(), "nobody observes");
    observe(&site.root);
    assert!(traced(&site, "Volume.stat", &stat, Some(&parent.replace("-01", "-00"))));
    assert_eq!(written(&site.root), Vec::<Vec<Value>>::new(), "the trace is not recorded");

    assert!(traced(&site, "Volume.stat", &stat, Some(parent)));
    let lists = written(&site.root);
    let [[span]] = lists.iter().map(Vec::as_slice).collect::<Vec<_>>()[..] else { panic!("{lists:?}") };
    assert_formed(span);
    assert_eq!(span["name"], "Volume.stat");
    assert_eq!(span["traceId"], golden["span"]["traceId"]);
    assert_eq!(span["parentId"], golden["span"]["parentId"]);
    assert_eq!(span["tags"]["qcow2.volume"], json!(volume));
    let name = fs::read_dir(site.root.join(SPANS)).unwrap().next().unwrap().unwrap().file_name();
    // The same but for the time.
    let shape = |name: &str| name.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect::<String>();
    assert_eq!(shape(name.to_str().unwrap()), shape(golden["file"].as_str().unwrap()));
}

#[test]
fn what_a_call_waits_for_hangs_from_its_span_and_its_failure_is_told() {
    let site = Site::new();
    let parent = golden()["traceparent"].as_str().unwrap().to_owned();
    let volume = site.create();
    observe(&site.root);
    let attach = json!({"uri": site.uri(&volume), "domain": "7", "dbg": "task"});
    assert!(traced(&site, "Datapath.attach", &attach, Some(&parent)));
    assert!(!traced(&site, "Volume.resize", &json!({"sr": site.sr, "key": volume, "new_size": -1}), None));
    site.call("Datapath.detach", attach);
    let lists = written(&site.root);
    lists.iter().flatten().for_each(|span| {
        if span["parentId"].is_string() {
            assert_formed(span)
        }
    });
    let of =
        |name: &str| lists.iter().flatten().find(|span| span["name"] == name).unwrap_or_else(|| panic!("{name}"));
    let (attach, start) = (of("Datapath.attach"), of("qemu-storage-daemon start"));
    assert_eq!((&start["parentId"], &start["traceId"]), (&attach["id"], &attach["traceId"]));
    assert!(start["duration"].as_u64() < attach["duration"].as_u64());
    let resize = of("Volume.resize");
    assert_eq!(resize["tags"]["otel.status_code"], "ERROR");
    assert_eq!(resize["tags"]["qcow2.code"], "SR_BACKEND_FAILURE_79");
    assert!(resize["tags"]["error"].as_str().unwrap().contains("size"), "{resize}");
    // Without a place in a trace it begins one, as observer.py does.
    assert!(resize.get("parentId").is_none() && resize["traceId"] != attach["traceId"], "{resize}");
}

/// Waits for the span of a process that outlives the call that starts it, and gives all that were written by then.
fn wait_for(site: &Site, name: &str) -> Vec<Value> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let spans: Vec<Value> = written(&site.root).into_iter().flatten().collect();
        if spans.iter().any(|span| span["name"] == name) {
            return spans;
        }
        assert!(Instant::now() < deadline, "no span {name}, but {spans:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Finds the one span of a name, and holds it to be well formed and to hang from another.
fn hanging<'a>(spans: &'a [Value], name: &str, from: &str) -> &'a Value {
    let of = |name: &str| {
        let found: Vec<_> = spans.iter().filter(|span| span["name"] == name).collect();
        assert_eq!(found.len(), 1, "{name} in {spans:?}");
        found[0]
    };
    let (child, parent) = (of(name), of(from));
    assert_formed(child);
    assert_eq!((&child["traceId"], &child["parentId"]), (&parent["traceId"], &parent["id"]), "{child} and {parent}");
    child
}

/// Writes to all images of an SR in which nothing is active, where they have nothing yet.
fn write_to_images(site: &Site) {
    let uri = site.configuration()["uri"].as_str().unwrap().to_owned();
    let trees = Path::new(uri.strip_prefix("file://").unwrap()).join("trees");
    let files = fs::read_dir(trees).unwrap().flat_map(|tree| fs::read_dir(tree.unwrap().path()).unwrap());
    let images: Vec<_> = files
        .map(|file| file.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "qcow2"))
        .collect();
    let count = images.len();
    for image in images {
        let write = format!("write -q {}k 64k", 64 * count);
        let status = Command::new("qemu-io").args(["-f", "qcow2", "-c", &write]).arg(image).status();
        assert!(status.unwrap().success());
    }
}

#[test]
fn the_worker_that_brings_space_back_hangs_from_the_call_that_started_it() {
    let site = Site::new();
    std::fs::write(site.root.join("etc/xapi-storage-qcow2.json"), r#"{"gc": true}"#).unwrap();
    let volume = site.create();
    write_to_images(&site);
    let snapshot = site.call("Volume.snapshot", json!({"key": volume}))["key"].clone();
    // What the upper one has of its own is copied.
    write_to_images(&site);
    observe(&site.root);
    let parent = golden()["traceparent"].as_str().unwrap().to_owned();
    let destroy = json!({"sr": site.sr, "key": snapshot, "dbg": "task"});
    assert!(traced(&site, "Volume.destroy", &destroy, Some(&parent)));
    let spans = wait_for(&site, "gc");
    let gc = hanging(&spans, "gc", "Volume.destroy");
    assert_eq!((&gc["tags"]["qcow2.sr"], &gc["tags"]["qcow2.merged"]), (&json!(site.sr), &json!("1")));
    assert!(gc["tags"].get("otel.status_code").is_none(), "{gc}");
    // What took its time in it hangs from it.
    let merged = spans.iter().find(|span| span["name"].as_str().unwrap().starts_with("merge "));
    assert_eq!(merged.unwrap()["parentId"], gc["id"]);
}

#[test]
fn an_import_hangs_from_the_call_that_started_it_and_ends_with_its_domain() {
    let site = Site::new();
    let volume = site.create();
    let domain = json!({"uri": site.uri(&volume), "domain": "MIRx", "dbg": "task"});
    site.call("Datapath.attach", domain.clone());
    site.call("Datapath.activate", domain.clone());
    observe(&site.root);
    let parent = golden()["traceparent"].as_str().unwrap().to_owned();
    assert!(traced(&site, "Datapath.import_activate", &domain, Some(&parent)));
    assert!(!written(&site.root).iter().flatten().any(|span| span["name"] == "import"), "it goes on");
    site.call("Datapath.deactivate", domain.clone());
    // Its process has ended by now.
    let spans: Vec<Value> = written(&site.root).into_iter().flatten().collect();
    let import = hanging(&spans, "import", "Datapath.import_activate");
    assert_eq!(import["tags"]["qcow2.volume"], json!(volume));
    site.call("Datapath.detach", domain);
}
