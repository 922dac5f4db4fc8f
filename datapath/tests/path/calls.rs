//! One caller, in any order.

use plugin::id::{SrUuid, VolumeKey, VolumeUri};
use serde_json::{Value, json};

use super::scene::Scene;

#[test]
fn answers_have_the_shape_that_xapi_decodes() {
    let scene = Scene::new();
    let query = scene.try_request("Plugin.Query", b"{\"dbg\":\"register\"}").unwrap();
    assert_eq!((&query["plugin"], &query["required_api_version"]), (&json!("qsd"), &json!("5.0")));
    assert_eq!(query.as_object().unwrap().len(), 10);
    let open = json!({"persistent": true, "uri": scene.uri.to_string(), "dbg": ""}).to_string();
    assert_eq!(scene.try_request("Datapath.open", open.as_bytes()).unwrap(), Value::Null);
    let attached = scene.call("Datapath.attach", "7");
    let uri = format!("nbd:unix:{}/nbd.sock:exportname={}", scene.directory_of_volume().display(), scene.uri.volume);
    assert_eq!(uri.split(':').count(), 4);
    let disk = json!({"backend_type": "qdisk", "extra": {}, "params": uri});
    assert_eq!(attached, json!({"implementations": [["XenDisk", disk], ["Nbd", {"uri": uri}]]}));
    assert_eq!(scene.call("Datapath.attach", "u0_mirror_vbd_5_xvda"), attached);
    for method in ["Datapath.activate", "Datapath.activate_readonly", "Datapath.deactivate", "Datapath.detach"] {
        assert_eq!(scene.call(method, "7"), Value::Null);
    }
    let diagnostics = scene.try_request("Plugin.diagnostics", b"{\"dbg\":\"\"}").unwrap();
    assert!(diagnostics.as_str().unwrap().contains(&scene.uri.volume.to_string()));
    scene.call("Datapath.detach", "u0_mirror_vbd_5_xvda");
    let close = json!({"uri": scene.uri.to_string(), "dbg": ""}).to_string();
    assert_eq!(scene.try_request("Datapath.close", close.as_bytes()).unwrap(), Value::Null);
    scene.assert_nothing_left();
}

#[test]
fn calls_come_in_any_order_and_number() {
    let scene = Scene::new();
    let methods = [
        "Datapath.deactivate",
        "Datapath.detach",
        "Datapath.activate",
        "Datapath.attach",
        "Datapath.activate_readonly",
        "Datapath.activate",
        "Datapath.detach",
        "Datapath.deactivate",
        "Datapath.attach",
        "Datapath.deactivate",
        "Datapath.activate_readonly",
        "Datapath.deactivate",
        "Datapath.activate",
        "Datapath.activate",
        "Datapath.deactivate",
        "Datapath.detach",
    ];
    for method in methods.into_iter().chain(methods.into_iter().rev()) {
        for _ in 0..2 {
            scene.call(method, "7");
        }
    }
    scene.call("Datapath.detach", "7");
    scene.assert_nothing_left();
}

#[test]
fn a_domain_that_was_never_activated_disturbs_nobody() {
    let scene = Scene::new();
    scene.call("Datapath.activate", "7");
    assert!(scene.io("write -P 1 0 64k"));
    scene.call("Datapath.attach", "u0_mirror_vbd_5_xvda");
    for method in ["Datapath.deactivate", "Datapath.detach"] {
        scene.call(method, "u0_mirror_vbd_5_xvda");
        scene.call(method, "8");
    }
    assert!(scene.io("write -P 2 64k 64k"));
}

#[test]
fn what_is_gone_is_deactivated_and_detached_and_cannot_be_attached() {
    let scene = Scene::new();
    let gone = VolumeUri { volume: VolumeKey::random(), ..scene.uri };
    let detached = VolumeUri { sr: SrUuid::random(), ..scene.uri };
    for (uri, code) in [(gone, "Volume_does_not_exist"), (detached, "Sr_not_attached")] {
        let request = json!({"domain": "7", "uri": uri.to_string(), "persistent": true, "dbg": ""}).to_string();
        for method in ["Datapath.deactivate", "Datapath.detach", "Datapath.close"] {
            scene.try_request(method, request.as_bytes()).unwrap();
        }
        for method in ["Datapath.attach", "Datapath.activate", "Datapath.activate_readonly", "Datapath.open"] {
            assert_eq!(scene.try_request(method, request.as_bytes()).unwrap_err().code, code);
        }
    }
    scene.assert_nothing_left();
}

#[test]
fn bad_requests_are_refused_and_change_nothing() {
    let scene = Scene::new();
    let uri = scene.uri.to_string();
    let long = "x".repeat(1 << 20);
    let uris =
        ["", "qsd://", &uri[1..], &format!("{uri}/../x"), &format!("qsd://../{}", scene.uri.volume), &long, "\0"];
    let mut requests: Vec<Vec<u8>> =
        uris.iter().map(|uri| json!({"domain": "7", "uri": uri, "dbg": ""}).to_string().into_bytes()).collect();
    for domain in ["", "a\nb", "\0", "ä", &long] {
        requests.push(json!({"domain": domain, "uri": uri, "dbg": ""}).to_string().into_bytes());
    }
    for request in [
        &b""[..],
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"{\"uri\": 1, \"domain\": \"7\"}",
        b"{\"uri\": null, \"domain\": null}",
        b"\xff\xfe",
        "[".repeat(1 << 20).as_bytes(),
    ] {
        requests.push(request.to_vec());
    }
    for method in [
        "Datapath.attach",
        "Datapath.activate",
        "Datapath.activate_readonly",
        "Datapath.deactivate",
        "Datapath.detach",
        "Datapath.open",
    ] {
        for request in &requests {
            let failure = scene.try_request(method, request).unwrap_err();
            assert_eq!(failure.code, "SR_BACKEND_FAILURE_115", "{method} {:?}", request.get(..100));
            assert!(failure.params.iter().map(String::len).sum::<usize>() < 2000);
        }
    }
    scene.assert_nothing_left();
}
