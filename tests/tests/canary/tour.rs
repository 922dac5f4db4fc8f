//! Every method, called well and wrongly, with the words in whatever a caller can send.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use uuid::Uuid;

use crate::site::{Host, Site};
use crate::words::{
    DATA, DESCRIPTION, NAME, NUMBER, PASSWORD, REMOTE_FRAGMENT, REMOTE_PASSWORD, REMOTE_QUERY, REMOTE_USER,
    SR_DESCRIPTION, SR_NAME, STRING, URI_FRAGMENT, URI_PASSWORD, URI_QUERY, URI_USER, VALUE,
};

const MIB: u64 = 1 << 20;

/// How long what goes on by itself may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// One host's SR, and calls about it.
struct At<'a> {
    site: &'a Site,
    host: &'a Host,
    sr: String,
}

/// Takes the tour.
pub fn all(site: &Site) {
    let source = At { site, host: &site.source, sr: Uuid::new_v4().to_string() };
    let destination = At { site, host: &site.destination, sr: Uuid::new_v4().to_string() };
    for (turn, at) in [&source, &destination].into_iter().enumerate() {
        site.call(at.host, "Plugin.Query", json!({}));
        site.call(at.host, "datapath/Plugin.Query", json!({}));
        at.make(turn);
    }
    let disk = source.volumes();
    mirrors(&source, &destination, &disk);
    source.images();
    for at in [&source, &destination] {
        at.gc_ends();
    }
    site.shown();
    for at in [&source, &destination] {
        at.end();
    }
}

impl At<'_> {
    fn call(&self, method: &str, mut request: Value) -> Value {
        request["sr"] = self.sr.clone().into();
        self.site.call(self.host, method, request)
    }

    fn uri(&self, volume: &str) -> String {
        format!("qsd://{}/{volume}", self.sr)
    }

    /// A call about a volume's datapath.
    fn path(&self, method: &str, volume: &str, domain: &str) -> Value {
        self.call(method, json!({"uri": self.uri(volume), "domain": domain, "persistent": true}))
    }

    fn create(&self) -> String {
        let request = json!({"name": NAME, "description": DESCRIPTION, "size": 4 * MIB, "sharable": false});
        key_of(&self.call("Volume.create", request))
    }

    /// A call that makes a volume of another one.
    fn another(&self, method: &str, volume: &str) -> String {
        key_of(&self.call(method, json!({"key": volume, "dest_sr": self.sr})))
    }

    fn destroy(&self, volume: &str) {
        self.call("Volume.destroy", json!({"key": volume}));
    }

    /// Makes the SR, after everything that is refused; each host has a turn with another method.
    fn make(&self, turn: usize) {
        let (site, host) = (self.site, self.host);
        let named = |configuration: Value| json!({"uuid": self.sr, "configuration": configuration, "name": SR_NAME, "description": SR_DESCRIPTION});
        let place = host.place.display();
        let login = format!("{URI_USER}:{URI_PASSWORD}@");
        let refused = [
            json!({"uri": format!("file://{login}localhost{place}")}),
            json!({"uri": format!("nfs://{login}server/share")}),
            json!({"uri": format!("//{login}server/share")}),
            json!({"uri": format!("{login}server:/share")}),
            json!({"uri": format!("file:{login}server/share")}),
            json!({"uri": format!("file://{place}?password={URI_QUERY}")}),
            json!({"uri": format!("file://{place}#{URI_FRAGMENT}")}),
            json!({"uri": format!("smb://server/share;{login}x?{URI_QUERY}#{URI_FRAGMENT}")}),
            json!({"uri": format!("file://{place}"), "password": NUMBER.parse::<u64>().unwrap()}),
            json!({"uri": format!("file://{place}"), "password": [PASSWORD]}),
            json!({"uri": format!("file://{place}"), "password": {PASSWORD: PASSWORD}}),
            json!({"password": PASSWORD}),
            json!({"uri": format!("file://{place}/nothing"), "password": PASSWORD}),
            json!(STRING),
            json!([STRING]),
        ];
        for (number, configuration) in refused.iter().enumerate() {
            // By all three in turn: they read it in one place.
            let method = ["SR.create", "SR.attach", "SR.probe"][(number + turn) % 3];
            site.refused(host, method, named(configuration.clone()));
        }
        let mut configuration = host.configuration();
        for key in ["password", "secret", "token", "chappassword"] {
            configuration[key] = PASSWORD.into();
        }
        site.call(host, "SR.probe", json!({"configuration": configuration}));
        let kept = site.call(host, "SR.create", named(configuration));
        assert_eq!(kept["password"], PASSWORD);
        site.call(host, "SR.probe", json!({"configuration": kept}));
        site.call(host, "SR.attach", json!({"configuration": kept}));
        self.call("SR.set_name", json!({"new_name": SR_NAME}));
        self.call("SR.set_description", json!({"new_description": SR_DESCRIPTION}));
        self.call("SR.stat", json!({}));
    }

    /// Volumes with names, keys and data, one of them with a guest; gives that one.
    fn volumes(&self) -> String {
        let (disk, other) = (self.create(), self.create());
        let wrong = json!({"sr": self.sr, "name": NAME, "description": DESCRIPTION, "size": -1, "sharable": NAME});
        self.site.refused(self.host, "Volume.create", wrong.clone());
        self.site.refused(self.host, "Volume.create", json!({"sharable": false, "name": [NAME], "size": VALUE}));
        self.call("Volume.set_name", json!({"key": disk, "new_name": NAME}));
        self.call("Volume.set_description", json!({"key": disk, "new_description": DESCRIPTION}));
        self.call("Volume.set", json!({"key": disk, "k": "sm-config", "v": VALUE}));
        self.call("Volume.set", json!({"key": disk, "k": "gone", "v": VALUE}));
        self.call("Volume.unset", json!({"key": disk, "k": "gone"}));
        self.site.refused(self.host, "Volume.set", json!({"sr": self.sr, "key": disk, "k": 1, "v": VALUE}));
        self.call("Volume.stat", json!({"key": disk}));
        self.call("Volume.enable_cbt", json!({"key": disk}));
        self.path("Datapath.open", &disk, "7");
        self.path("Datapath.attach", &disk, "7");
        self.path("Datapath.activate", &disk, "7");
        self.write(&disk);
        let first = self.another("Volume.snapshot", &disk);
        self.write(&disk);
        self.site.processes("qemu-storage-daemon");
        self.call("Volume.list_changed_blocks", json!({"key": first, "key2": disk, "offset": 0, "length": -1}));
        self.call("Volume.compare", json!({"key": first, "key2": disk}));
        self.call("Volume.similar_content", json!({"key": disk}));
        self.call("SR.ls", json!({}));
        self.path("Datapath.attach", &first, "8");
        self.path("Datapath.activate_readonly", &first, "8");
        self.path("Datapath.deactivate", &first, "8");
        self.path("Datapath.detach", &first, "8");
        self.path("Datapath.close", &first, "8");
        let clone = self.another("Volume.clone", &first);
        self.another("Volume.copy", &first);
        self.call("Volume.resize", json!({"key": clone, "new_size": 8 * MIB}));
        self.call("Volume.revert", json!({"key": clone, "snapshot": first}));
        self.call("Volume.compose", json!({"key": other, "key2": clone}));
        // An import, and a guest whose writes are thrown away.
        self.path("Datapath.attach", &other, "MIR0a1b2c");
        self.path("Datapath.activate", &other, "MIR0a1b2c");
        self.path("Datapath.import_activate", &other, "MIR0a1b2c");
        assert!(self.site.processes("\0import-relay\0") > 0, "no import runs");
        self.path("Datapath.deactivate", &other, "MIR0a1b2c");
        self.path("Datapath.detach", &other, "MIR0a1b2c");
        self.call("Datapath.open", json!({"uri": self.uri(&other), "persistent": false}));
        self.path("Datapath.close", &other, "7");
        self.site.refused(self.host, "Volume.destroy", json!({"sr": self.sr, "key": disk}));
        self.destroy(&other);
        disk
    }

    /// What is left to do with volumes that nobody uses.
    fn images(&self) {
        let volume = self.create();
        self.call("Volume.enable_cbt", json!({"key": volume}));
        let snapshot = self.another("Volume.snapshot", &volume);
        self.another("Volume.snapshot", &volume);
        self.call("Volume.data_destroy", json!({"key": snapshot}));
        self.call("Volume.disable_cbt", json!({"key": volume}));
        self.destroy(&snapshot);
    }

    /// Writes as a guest does.
    fn write(&self, volume: &str) {
        let file = self.site.file("pattern");
        fs::write(&file, DATA.repeat(5000)).unwrap();
        let export = format!("nbd:unix:{}:exportname={volume}", self.host.socket(volume).display());
        let write = format!("write -q -s {} 0 128k", file.display());
        let output = Command::new("qemu-io").args(["-f", "raw", "-c", &write, &export]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    fn gc_ends(&self) {
        let what = format!("space is brought back of {}", self.host.place.display());
        until(&what, || self.site.processes("\0gc\0") == 0);
    }

    /// Takes everything down.
    fn end(&self) {
        let volumes = self.call("SR.ls", json!({}));
        for volume in volumes.as_array().unwrap() {
            self.destroy(volume["key"].as_str().unwrap());
        }
        self.gc_ends();
        self.call("SR.detach", json!({}));
        let again = json!({"configuration": self.host.configuration()});
        self.site.call(self.host, "SR.attach", again);
        self.call("SR.destroy", json!({}));
        self.site.refused(self.host, "SR.stat", json!({"sr": self.sr}));
    }
}

fn key_of(volume: &Value) -> String {
    volume["key"].as_str().unwrap().to_owned()
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "not yet: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A remote as xapi writes it, with more in it than is understood.
fn remote(socket: &Path, export: &str) -> String {
    let socket = socket.display();
    format!("nbd+unix:///{export}?session_id={REMOTE_QUERY}&socket={socket}&pw={REMOTE_PASSWORD}#{REMOTE_FRAGMENT}")
}

/// A running guest's disk is mirrored, and copied, to another host.
fn mirrors(source: &At<'_>, destination: &At<'_>, disk: &str) {
    let site = source.site;
    let login = format!("{REMOTE_USER}:{REMOTE_PASSWORD}@");
    let request = |remote: &str| {
        let blocks = json!({"blocksize": 65536, "ranges": [[0, 2]]});
        json!({"uri": source.uri(disk), "domain": "7", "remote": remote, "blocklist": blocks})
    };
    for remote in [
        format!("nbd://{login}127.0.0.1:1/x?tls-psk={REMOTE_QUERY}#{REMOTE_FRAGMENT}"),
        format!("nbd://{REMOTE_USER}@127.0.0.1:1/x"),
        format!("nbd+unix://{login}/x?socket=/nowhere&session_id={REMOTE_QUERY}"),
        format!("http://{login}host/services/SM/nbdproxy?session_id={REMOTE_QUERY}"),
        format!("{login}host:/services?session_id={REMOTE_QUERY}"),
    ] {
        site.refused(source.host, "Data.mirror", request(&remote));
        site.refused(source.host, "Data.copy", request(&remote));
    }
    // Where nobody listens: that is found out later, and told.
    source.host.set(1);
    for (method, remote) in [
        ("Data.mirror", format!("nbd://127.0.0.1:1/x?password={REMOTE_QUERY}#{REMOTE_FRAGMENT}")),
        ("Data.copy", format!("nbd+unix:///x?session_id={REMOTE_QUERY}&socket=/nowhere")),
    ] {
        let operation = site.call(source.host, method, request(&remote));
        until("it has failed", || {
            site.call(source.host, "Data.stat", json!({"operation": operation}))["failed"] == true
        });
        site.call(source.host, "Plugin.diagnostics", json!({}));
        site.call(source.host, "Data.destroy", json!({"operation": operation}));
    }

    source.host.set(60);
    let target = destination.create();
    destination.path("Datapath.attach", &target, "MIR0d1e2f");
    destination.path("Datapath.activate", &target, "MIR0d1e2f");
    let to = remote(&destination.host.socket(&target), &target);
    let complete = |operation: &Value| {
        until("it is complete", || {
            let status = site.call(source.host, "Data.stat", json!({"operation": operation}));
            assert_eq!(status["failed"], false, "{}", site.call(source.host, "Plugin.diagnostics", json!({})));
            status["complete"] == true
        });
    };
    let copy = site.call(source.host, "Data.copy", request(&to));
    complete(&copy);
    let operation = site.call(source.host, "Data.mirror", request(&to));
    complete(&operation);
    assert!(site.processes("\0mirror-supervisor\0") > 0, "no mirror runs");
    assert!(!site.has_devices || site.processes("\0device-server\0") > 0, "no block device is there");
    site.shown();
    site.call(source.host, "Data.ls", json!({}));
    let task = json!({"id": operation[1]});
    for method in ["Task.ls", "Task.stat"] {
        site.call(source.host, method, task.clone());
    }
    site.refused(source.host, "Data.destroy", json!({"operation": operation}));
    source.write(disk);
    source.path("Datapath.deactivate", disk, "7");
    site.call(source.host, "Data.cancel", json!({"operation": operation}));
    site.call(source.host, "Task.cancel", task);
    site.call(source.host, "Data.destroy", json!({"operation": operation}));
    site.call(source.host, "Task.destroy", json!({"id": copy[1]}));
    destination.path("Datapath.deactivate", &target, "MIR0d1e2f");
    destination.path("Datapath.detach", &target, "MIR0d1e2f");
    source.path("Datapath.detach", disk, "7");
    source.path("Datapath.close", disk, "7");
}
