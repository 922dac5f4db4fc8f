//! Plugins whose answers have the wrong form.

use serde_json::{Value, json};

use crate::faults::{CREATE, Fault, UNKNOWN, fault};
use crate::wrapper::{Answer, Call, by_arguments};

pub fn faults() -> Vec<Fault> {
    vec![
        fault("an absent field is null", CREATE, "uuid", |call| {
            call.is(&["Volume.stat"]).then(|| call.answer()?.edit_volumes(|v| v["uuid"] = Value::Null))?
        }),
        fault("an integer is written as a float", CREATE, "virtual_size", |call| {
            let size = |v: &mut Value| v["virtual_size"] = json!(v["virtual_size"].as_f64());
            call.is(&["SR.ls"]).then(|| call.answer()?.edit_volumes(size))?
        }),
        fault("a boolean is written as a text", CREATE, "sharable", |call| {
            call.is(&["Volume.create"]).then(|| call.answer()?.edit_volumes(|v| v["sharable"] = json!("false")))?
        }),
        fault("keys are a list of pairs", CREATE, "keys", |call| {
            call.is(&["Volume.create"]).then(|| call.answer()?.edit_volumes(|v| v["keys"] = json!([])))?
        }),
        fault("a log line stands before the answer", CREATE, "bad json", |call| {
            call.is(&["Volume.stat"]).then(|| {
                let answer = call.answer()?;
                Some(Answer { text: [b"starting\n", &answer.text[..]].concat(), ..answer })
            })?
        }),
        fault(
            "nothing is answered where null belongs",
            "volume: Volume.set_name and Volume.set_description are seen in stat and ls",
            "bad json",
            |call| call.is(&["Volume.set_name"]).then(|| Answer { text: Vec::new(), ..call.answer().unwrap() }),
        ),
        fault(
            "an empty object is answered where null belongs",
            "volume: Volume.set and Volume.unset are seen in the keys of stat and ls",
            "answer",
            |call| call.is(&["Volume.set"]).then(|| call.answer()?.edit(|answer| *answer = json!({})))?,
        ),
        fault("an error ends with success", UNKNOWN, "", |call| {
            call.is(&["Volume.stat"]).then(|| Some(Answer { success: true, ..call.answer()? }))?
        }),
        fault("an error has no backtrace", UNKNOWN, "SCRIPT_FAILED", |call| {
            let answer = call.answer()?;
            if answer.success { Some(answer) } else { answer.edit(|error| error["backtrace"] = Value::Null) }
        }),
        fault("an error has a number among its parameters", UNKNOWN, "SCRIPT_FAILED", |call| {
            let answer = call.answer()?;
            if answer.success { Some(answer) } else { answer.edit(|error| error["params"] = json!(["x", 1])) }
        }),
        fault("an unknown volume has sm's code", UNKNOWN, "SR_BACKEND_FAILURE_144", |call| {
            let answer = call.answer()?;
            if !answer.failed_with("Volume_does_not_exist") {
                return Some(answer);
            }
            answer.edit(|error| error["code"] = json!("SR_BACKEND_FAILURE_144"))
        }),
        fault(
            "a request that is no object is answered",
            "bad input: SR.stat refuses what is not one JSON object",
            "was answered",
            |call| (call.method == "SR.stat" && !call.request.is_object()).then(|| Answer::of(&Value::Null)),
        ),
        fault(
            "a field that is not known is refused",
            "bad input: Volume.create ignores fields that it does not know",
            "SR_BACKEND_FAILURE_115",
            |call| call.request.get("zz_unknown").map(|_| Answer::refusal("SR_BACKEND_FAILURE_115")),
        ),
        fault(
            "null is taken for an empty text",
            "bad input: Volume.create refuses missing, null and mistyped fields",
            "name",
            |call| {
                let null = call.is(&["Volume.create"]) && call.request["name"].is_null();
                null.then(|| call.other("Volume.create", &json!({"name": ""})))?
            },
        ),
        fault(
            "a trace context in dbg is refused",
            "plugin: every script accepts a dbg with a trace context behind a newline",
            "SR_BACKEND_FAILURE_115",
            |call| call.text("dbg").contains("traceparent").then(|| Answer::refusal("SR_BACKEND_FAILURE_115")),
        ),
        fault(
            "with tracing on something is printed",
            "plugin: every script works when the observer runs it, as with tracing on",
            "bad json",
            |call| {
                std::env::var_os("TRACEPARENT")?;
                let answer = call.answer()?;
                Some(Answer { text: [b"traced\n", &answer.text[..]].concat(), ..answer })
            },
        ),
        fault("diagnostics are an object", "plugin: Plugin.diagnostics answers a text", "string", |call| {
            call.is(&["Plugin.diagnostics"]).then(|| Answer::of(&json!({"text": "all is well"})))
        }),
        fault(
            "the API version is one that nobody knows",
            "plugin: Plugin.Query of the volume plugin names the SR type and a known API version",
            "9.9",
            |call| {
                let query = call.is(&["Plugin.Query"]) && call.answer()?.json()["plugin"] == "qcow2";
                query.then(|| call.answer()?.edit(|answer| answer["required_api_version"] = json!("9.9")))?
            },
        ),
        Fault {
            without: "Volume.set",
            ..fault(
                "a script is missing that xapi cannot do without",
                "plugin: the scripts are there without which xapi can do nothing with an SR and its disks",
                "Volume.set",
                |_| None,
            )
        },
        Fault {
            without: "Data.mirror",
            ..fault(
                "a feature is advertised without its script",
                "plugin: Plugin.Query advertises only features whose scripts are there",
                "VDI_MIRROR",
                |_: &Call| None,
            )
        },
        fault(
            "a script is there that no feature tells of",
            "features: Volume.revert is there only with the feature VDI_REVERT, without which nobody calls it",
            "not advertised",
            |call| edit_features(call, |features| features.retain(|feature| feature != "VDI_REVERT")),
        ),
        fault(
            "a feature is one that nobody knows",
            "features: every feature is one that xapi knows",
            "VDI_TELEPORT",
            |call| edit_features(call, |features| features.push(json!("VDI_TELEPORT"))),
        ),
        fault(
            "arguments are not understood although VDI_ATTACH_OFFLINE is advertised",
            "quicktest: static_vdis: an SR and a disk are attached by the command line, before xapi runs",
            "SR_BACKEND_FAILURE_115",
            |_: &Call| by_arguments().then(|| Answer::refusal("SR_BACKEND_FAILURE_115")),
        ),
        fault(
            "SRs stay in Plugin.ls when they are detached",
            "plugin: Plugin.ls lists the attached SRs, and no detached one",
            "detached",
            |call| {
                if call.method == "SR.attach" {
                    let answer = call.answer()?;
                    let before = call.noted("attached").unwrap_or_default();
                    call.note("attached", &format!("{before}{}\n", answer.json().as_str()?));
                    return Some(answer);
                }
                let all: Vec<String> =
                    call.noted("attached").unwrap_or_default().lines().map(str::to_owned).collect();
                call.is(&["Plugin.ls"]).then(|| Answer::of(&json!(all)))
            },
        ),
    ]
}

/// Changes the features of the volume plugin.
fn edit_features(call: &Call, change: fn(&mut Vec<Value>)) -> Option<Answer> {
    let answer = call.is(&["Plugin.Query"]).then(|| call.answer())??;
    answer.edit(|query| {
        if let (true, Some(features)) = (query["plugin"] == "qcow2", query["features"].as_array_mut()) {
            change(features);
        }
    })
}
