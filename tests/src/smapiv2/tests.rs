//! Holds the call orders against a plugin of shell scripts that always answers the same.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::sync::Arc;

use super::*;
use crate::host::{Host, PluginSource};
use crate::script::{CallLog, Fault};

const SCRIPT: &str = r#"#!/bin/sh
cat >/dev/null
volume() { printf '{"key":"%s","name":"n","description":"","read_write":true,"sharable":false,"virtual_size":7,"physical_utilisation":1,"uri":["tape://t","qsd://s/%s"],"keys":%s}' "$1" "$1" "${2:-{\}}"; }
case ${0##*/} in
Plugin.Query) printf '{"plugin":"test","name":"","description":"","vendor":"","copyright":"","version":"","required_api_version":"5.0","features":["VDI_MIRROR","VDI_ACTIVATE_READONLY"],"configuration":{},"required_cluster_stack":[]}' ;;
SR.attach) echo '"sr-string"' ;;
SR.stat) echo '{"sr":"s","name":"","description":"","free_space":1,"total_space":1,"datasources":[],"clustered":false,"health":["Healthy",""]}' ;;
SR.ls) printf '['; volume k '{"clone-on-boot":"tmp"}'; printf ','; volume tmp; printf ']' ;;
Volume.create|Volume.clone|Volume.snapshot) volume new ;;
Volume.stat) volume k ;;
Datapath.attach) echo '{"implementations":[["XenDisk",{"params":"","extra":{},"backend_type":"qdisk"}],["Nbd",{"uri":"nbd:unix:/run/x:exportname=k"}]]}' ;;
Data.mirror) echo '["MirrorV1","m"]' ;;
Data.stat) echo '{"failed":false,"complete":false,"progress":0.5}' ;;
*) echo null ;;
esac
"#;

struct World {
    dir: tempfile::TempDir,
    host: Arc<Host>,
    sr: Sr,
}

async fn world() -> World {
    let dir = tempfile::Builder::new().prefix("fx-").tempdir_in("/tmp").unwrap();
    let script: PathBuf = dir.path().join("script");
    std::fs::write(&script, SCRIPT).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let methods = |kind: &str, name: &str, methods: &[&str]| {
        let target = dir.path().join("plugins").join(kind).join(name);
        std::fs::create_dir_all(&target).unwrap();
        for method in methods {
            symlink(&script, target.join(method)).unwrap();
        }
    };
    let volume: Vec<&str> = "Plugin.Query SR.attach SR.detach SR.stat SR.ls Volume.create Volume.clone \
        Volume.snapshot Volume.stat Volume.set Volume.unset Volume.destroy Volume.resize"
        .split_whitespace()
        .collect();
    methods("volume", "org.xen.xapi.storage.test", &volume);
    let datapath: Vec<&str> = "Plugin.Query Datapath.attach Datapath.activate Datapath.activate_readonly \
        Datapath.deactivate Datapath.detach Data.mirror Data.stat"
        .split_whitespace()
        .collect();
    methods("datapath", "qsd", &datapath);
    let source = PluginSource::Existing(dir.path().join("plugins"));
    let host = Host::start("a", &dir.path().join("a"), &source, &CallLog::default()).await.unwrap();
    let sr = Sr::from("sr-uuid");
    host.sr_attach("t", "test", &sr, &[("uri".to_owned(), "file:///x".to_owned())]).await.unwrap();
    World { dir, host, sr }
}

impl World {
    fn mark(&self) -> usize {
        self.host.runner().log().len()
    }

    fn requests(&self, from: usize) -> Vec<String> {
        let calls = self.host.runner().log().since(from);
        calls.iter().map(|c| format!("{} {}", c.method, c.request)).collect()
    }

    fn methods(&self, from: usize) -> Vec<&'static str> {
        self.host.runner().log().since(from).iter().map(|c| c.method).collect()
    }
}

#[tokio::test]
async fn features_come_from_query_and_from_the_scripts_that_are_there() {
    let world = world().await;
    for feature in
        ["VDI_MIRROR", "VDI_MIRROR_IN", "VDI_SNAPSHOT", "VDI_DELETE", "VDI_ATTACH", "VDI_RESET_ON_BOOT", "SR_SCAN"]
    {
        assert!(world.host.sr_has(&world.sr, feature), "{feature}");
    }
    for feature in ["SR_CREATE", "SR_PROBE", "VDI_REVERT"] {
        assert!(!world.host.sr_has(&world.sr, feature), "{feature}");
    }
    assert!(world.dir.path().join("a/etc/xensource-inventory").exists());
    assert_eq!(crate::host::inventory(world.host.root()), Some(world.host.uuid()));
}

#[tokio::test]
async fn every_datapath_call_follows_a_stat_and_goes_to_the_scheme_that_has_a_plugin() {
    let world = world().await;
    let (host, sr, vdi, vm) = (&world.host, &world.sr, Vdi::from("k"), Vm::from("0"));
    let dp = Dp::from("mirror_vbd/5/xvda");
    let mark = world.mark();
    host.vdi_attach3("t", &dp, sr, &vdi, &vm, true).await.unwrap();
    host.dp_destroy("t", &dp).await.unwrap();
    host.dp_destroy("t", &dp).await.unwrap();
    assert!(!host.vdi_deactivate("t", &dp).await.unwrap());
    let domain = r#"{"domain":"u0_mirror_vbd_5_xvda","uri":"qsd://s/k","dbg":"t"}"#;
    let stat = r#"Volume.stat {"key":"k","sr":"sr-string","dbg":"t"}"#;
    let expected = [
        stat.to_owned(),
        format!("Datapath.attach {domain}"),
        stat.to_owned(),
        format!("Datapath.deactivate {domain}"),
        format!("Datapath.detach {domain}"),
    ];
    assert_eq!(world.requests(mark), expected);
}

#[tokio::test]
async fn a_read_only_attach_is_activated_read_only() {
    let world = world().await;
    let (host, sr, vdi, vm) = (&world.host, &world.sr, Vdi::from("k"), Vm::from("CP1"));
    let mark = world.mark();
    for (dp, read_write) in [("a", false), ("b", true)] {
        let dp = Dp::from(dp);
        host.vdi_attach3("t", &dp, sr, &vdi, &vm, read_write).await.unwrap();
        host.vdi_activate3("t", &dp, sr, &vdi, &vm).await.unwrap();
    }
    let activations: Vec<_> = world.methods(mark).into_iter().filter(|m| m.contains("activate")).collect();
    assert_eq!(activations, ["Datapath.activate_readonly", "Datapath.activate"]);
    assert!(host.vdi_activate3("t", &Dp::from("unknown"), sr, &vdi, &vm).await.is_err());
}

#[tokio::test]
async fn a_snapshot_is_followed_by_five_keys_and_a_clone_by_its_type() {
    let world = world().await;
    let info = VdiInfo { vdi: Vdi::from("k"), content_id: "c".into(), ..VdiInfo::blank("n", 1) };
    let mark = world.mark();
    let snapshot = world.host.vdi_snapshot("t", &world.sr, &info).await.unwrap();
    assert!(snapshot.is_a_snapshot && snapshot.snapshot_of == info.vdi);
    let requests = world.requests(mark);
    assert_eq!(requests.len(), 6);
    for (request, key) in
        requests[1..].iter().zip(["snapshot_time", "is_a_snapshot", "snapshot_of", "content_id", "vdi-type"])
    {
        assert!(request.starts_with("Volume.set ") && request.contains(&format!("\"k\":\"{key}\"")), "{request}");
        assert!(request.contains("\"key\":\"new\""), "{request}");
    }
    let mark = world.mark();
    let clone = world.host.vdi_clone("t", &world.sr, &info).await.unwrap();
    assert_eq!((clone.ty.as_str(), clone.is_a_snapshot), ("user", false));
    assert_eq!(world.methods(mark), ["Volume.clone", "Volume.set"]);
    let mark = world.mark();
    world.host.vdi_clone("t", &world.sr, &VdiInfo { ty: String::new(), ..info }).await.unwrap();
    assert_eq!(world.methods(mark), ["Volume.clone"]);
}

#[tokio::test]
async fn a_scan_leaves_out_clones_made_for_one_boot() {
    let world = world().await;
    let found = world.host.sr_scan("t", &world.sr).await.unwrap();
    assert_eq!(found.iter().map(|v| v.vdi.0.as_str()).collect::<Vec<_>>(), ["k"]);
}

#[tokio::test]
async fn polls_of_a_mirror_use_the_stat_that_started_it() {
    let world = world().await;
    let (host, sr, vdi) = (&world.host, &world.sr, Vdi::from("k"));
    let mark = world.mark();
    let operation = host.data_mirror("t", sr, &vdi, &Vm::from("5"), "nbd+unix:///e?socket=/s").await.unwrap();
    for _ in 0..2 {
        host.data_stat("t", sr, &vdi, &operation).await.unwrap();
    }
    assert_eq!(world.methods(mark), ["Volume.stat", "Data.mirror", "Data.stat", "Data.stat"]);
    assert!(world.requests(mark)[1].contains(r#""domain":"5""#));
}

#[tokio::test]
async fn a_follow_up_that_fails_fails_the_whole_call() {
    let world = world().await;
    world.host.runner().faults().nth_of("a", "Volume.set", 0, Fault::FailInstead);
    let error = world.host.vdi_create("t", &world.sr, &VdiInfo::blank("n", 1)).await.unwrap_err();
    assert_eq!(error.code(), Some("INJECTED"));
    let missing = world.host.sr_set_name_label("t", &world.sr, "x").await.unwrap_err();
    assert_eq!(missing.code(), Some("SCRIPT_MISSING"));
    assert!(matches!(world.host.sr_stat("t", &Sr::from("other")).await, Err(Error::SrNotAttached(_))));
}

#[test]
fn times_are_written_as_xapi_writes_them() {
    let now = now();
    assert_eq!(now.len(), "19700101T00:00:00Z".len());
    assert!(now.as_str() > "20260101T00:00:00Z" && now.ends_with('Z'), "{now}");
}
