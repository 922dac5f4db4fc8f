//! Holds the encoder and the decoders against exchanges recorded from the real daemon.

use super::{Attached, ChangedBlocks, Json, MirrorStatus, Operation, Plugin, ProbeResult, Request, SrStat, Volume};

struct Exchange {
    method: String,
    stdin: String,
    stdout: String,
}

fn exchanges() -> Vec<Exchange> {
    include_str!("../../golden/accepted.jsonl")
        .lines()
        .map(|line| {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            let text = |name: &str| value[name].as_str().unwrap().to_owned();
            Exchange { method: text("method"), stdin: text("stdin"), stdout: text("stdout") }
        })
        .collect()
}

/// Builds the request anew from the values that the recorded one carries.
fn rebuild(method: &str, stdin: &str) -> Request {
    let value: serde_json::Value = serde_json::from_str(stdin).unwrap();
    let t = |name: &str| value[name].as_str().unwrap().to_owned();
    let n = |name: &str| value[name].as_i64().unwrap();
    let b = |name: &str| value[name].as_bool().unwrap();
    let config = || -> Vec<(String, String)> {
        let map = value["configuration"].as_object().unwrap();
        map.iter().map(|(k, v)| (k.clone(), v.as_str().unwrap().to_owned())).collect()
    };
    let dbg = &t("dbg");
    match method {
        "Plugin.query" => Request::query(dbg),
        "Plugin.diagnostics" => Request::diagnostics(dbg),
        "SR.probe" => Request::sr_probe(dbg, &config()),
        "SR.create" => Request::sr_create(dbg, &t("uuid"), &config(), &t("name"), &t("description")),
        "SR.attach" => Request::sr_attach(dbg, &config()),
        "SR.stat" => Request::sr("SR.stat", dbg, &t("sr")),
        "SR.ls" => Request::sr("SR.ls", dbg, &t("sr")),
        "SR.detach" => Request::sr("SR.detach", dbg, &t("sr")),
        "SR.destroy" => Request::sr("SR.destroy", dbg, &t("sr")),
        "SR.set_name" => Request::sr_set_name(dbg, &t("sr"), &t("new_name")),
        "SR.set_description" => Request::sr_set_description(dbg, &t("sr"), &t("new_description")),
        "Volume.create" => {
            Request::volume_create(dbg, &t("sr"), &t("name"), &t("description"), n("size"), b("sharable"))
        }
        "Volume.stat" => Request::volume("Volume.stat", dbg, &t("sr"), &t("key")),
        "Volume.snapshot" => Request::volume("Volume.snapshot", dbg, &t("sr"), &t("key")),
        "Volume.clone" => Request::volume("Volume.clone", dbg, &t("sr"), &t("key")),
        "Volume.destroy" => Request::volume("Volume.destroy", dbg, &t("sr"), &t("key")),
        "Volume.enable_cbt" => Request::volume("Volume.enable_cbt", dbg, &t("sr"), &t("key")),
        "Volume.disable_cbt" => Request::volume("Volume.disable_cbt", dbg, &t("sr"), &t("key")),
        "Volume.data_destroy" => Request::volume("Volume.data_destroy", dbg, &t("sr"), &t("key")),
        "Volume.set" => Request::volume_set(dbg, &t("sr"), &t("key"), &t("k"), &t("v")),
        "Volume.unset" => Request::volume_unset(dbg, &t("sr"), &t("key"), &t("k")),
        "Volume.set_name" => Request::volume_set_name(dbg, &t("sr"), &t("key"), &t("new_name")),
        "Volume.set_description" => Request::volume_set_description(dbg, &t("sr"), &t("key"), &t("new_description")),
        "Volume.resize" => Request::volume_resize(dbg, &t("sr"), &t("key"), n("new_size")),
        "Volume.revert" => Request::volume_revert(dbg, &t("sr"), &t("snapshot"), &t("key")),
        "Volume.compose" => Request::volume_compose(dbg, &t("sr"), &t("key"), &t("key2")),
        "Volume.list_changed_blocks" => Request::volume_list_changed_blocks(dbg, &t("sr"), &t("key"), &t("key2")),
        "Datapath.open" => Request::datapath_open(dbg, &t("uri"), b("persistent")),
        "Datapath.close" => Request::datapath_close(dbg, &t("uri")),
        "Datapath.attach" => Request::datapath("Datapath.attach", dbg, &t("uri"), &t("domain")),
        "Datapath.activate" => Request::datapath("Datapath.activate", dbg, &t("uri"), &t("domain")),
        "Datapath.activate_readonly" => Request::datapath("Datapath.activate_readonly", dbg, &t("uri"), &t("domain")),
        "Datapath.import_activate" => Request::datapath("Datapath.import_activate", dbg, &t("uri"), &t("domain")),
        "Datapath.deactivate" => Request::datapath("Datapath.deactivate", dbg, &t("uri"), &t("domain")),
        "Datapath.detach" => Request::datapath("Datapath.detach", dbg, &t("uri"), &t("domain")),
        "Data.mirror" => Request::data_mirror(dbg, &t("uri"), &t("domain"), &t("remote")),
        "Data.stat" => {
            let key = value["operation"][1].as_str().unwrap().to_owned();
            Request::data("Data.stat", dbg, &Operation::Mirror(key))
        }
        other => panic!("no request for {other}"),
    }
}

fn decode(method: &str, answer: &Json) -> Result<(), super::Malformed> {
    match method {
        "Plugin.query" => Plugin::decode(answer).map(drop),
        "Plugin.diagnostics" | "SR.attach" | "Datapath.import_activate" => answer.string("answer").map(drop),
        "SR.probe" => ProbeResult::decode_list(answer).map(drop),
        "SR.create" => answer.string_map("answer").map(drop),
        "SR.stat" => SrStat::decode(answer, "answer").map(drop),
        "SR.ls" => Volume::decode_list(answer).map(drop),
        "Volume.create" | "Volume.stat" | "Volume.snapshot" | "Volume.clone" => {
            Volume::decode(answer, "answer").map(drop)
        }
        "Volume.list_changed_blocks" => ChangedBlocks::decode(answer).map(drop),
        "Datapath.attach" => Attached::decode(answer).map(drop),
        "Data.mirror" => Operation::decode(answer).map(drop),
        "Data.stat" => MirrorStatus::decode(answer).map(drop),
        _ => answer.unit("answer"),
    }
}

#[test]
fn every_recorded_request_is_encoded_byte_for_byte() {
    let exchanges = exchanges();
    assert!(exchanges.len() > 30);
    for exchange in exchanges {
        let request = rebuild(&exchange.method, &exchange.stdin);
        assert_eq!(request.method, exchange.method);
        assert_eq!(request.encode(), exchange.stdin, "{}", exchange.method);
    }
}

#[test]
fn every_recorded_answer_is_decoded() {
    for exchange in exchanges() {
        let answer = Json::parse(exchange.stdout.as_bytes()).unwrap();
        if let Err(e) = decode(&exchange.method, &answer) {
            panic!("{}: {e}", exchange.method);
        }
    }
}

#[test]
fn unit_is_null_and_nothing_else() {
    for bad in ["{}", "[]", "\"\"", "true", "0"] {
        assert!(decode("Volume.set", &Json::parse(bad.as_bytes()).unwrap()).is_err(), "{bad} was accepted");
    }
}
