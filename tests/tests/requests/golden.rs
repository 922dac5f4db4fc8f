//! A request of each method that is answered well: xapi's own, about what there is, and of those that it never calls.

use std::collections::BTreeMap;

use fake_xapi::wire::Json;
use serde_json::{Value, json};

use crate::site::Names;

/// Requests by method. Those that both plugins have are asked of the volume plugin.
pub fn requests(names: &Names) -> BTreeMap<String, Json> {
    let mut requests: BTreeMap<String, Json> = BTreeMap::new();
    for line in include_str!("../../golden/accepted.jsonl").lines() {
        let exchange: Value = serde_json::from_str(line).unwrap();
        let method = exchange["method"].as_str().unwrap().replace("Plugin.query", "Plugin.Query");
        let request: Value = serde_json::from_str(exchange["stdin"].as_str().unwrap()).unwrap();
        requests.insert(method, parsed(&about(request, names)));
    }
    let (volume, uri, id) = (&names.leaf, &names.uri, &names.nothing);
    let blocks = json!({"blocksize": 65536, "ranges": [[0, 2], [3, 1]]});
    for (method, mut request) in [
        ("Plugin.ls", json!({})),
        ("Volume.copy", json!({"key": names.snapshot, "dest_sr": names.sr})),
        ("Volume.compare", json!({"key": names.snapshot, "key2": volume})),
        ("Volume.similar_content", json!({"key": volume})),
        ("Data.copy", json!({"uri": uri, "domain": "0", "remote": names.remote, "blocklist": blocks})),
        ("Data.cancel", json!({"operation": ["MirrorV1", id]})),
        ("Data.destroy", json!({"operation": ["CopyV1", id]})),
        ("Data.ls", json!({})),
        ("Task.stat", json!({"id": id})),
        ("Task.cancel", json!({"id": id})),
        ("Task.destroy", json!({"id": id})),
        ("Task.ls", json!({})),
    ] {
        request["dbg"] = "OpaqueRef:dbg".into();
        if method.starts_with("Volume.") {
            request["sr"] = names.sr.clone().into();
        }
        requests.insert(method.to_owned(), parsed(&request));
    }
    requests
}

fn parsed(request: &Value) -> Json {
    Json::parse(request.to_string().as_bytes()).unwrap()
}

/// Puts what there is into the place of what the recorded plugin had.
fn about(value: Value, names: &Names) -> Value {
    match value {
        Value::String(text) => Value::String(match text.as_str() {
            "qsd:///x" => names.place.clone(),
            "qsd:///sr" => names.sr.clone(),
            "sr-uuid-1" => names.nothing.clone(),
            "k1" => names.leaf.clone(),
            "k3" => names.snapshot.clone(),
            "k2" | "k6" => names.other.clone(),
            "qsd:///sr/k1" | "qsd:///sr/k9" => names.uri.clone(),
            "mkey" => names.nothing.clone(),
            "nbd://1.2.3.4:10809/x" => names.remote.clone(),
            _ => text,
        }),
        Value::Array(all) => all.into_iter().map(|value| about(value, names)).collect(),
        Value::Object(fields) => fields.into_iter().map(|(name, value)| (name, about(value, names))).collect(),
        other => other,
    }
}
