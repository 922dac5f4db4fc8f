//! Plugins whose datapaths and mirrors do not what xapi relies on.

use serde_json::{Value, json};

use crate::faults::{Fault, SAME_ANSWER, fault};
use crate::wrapper::Answer;

const AT_ONCE: &str = "order: the export accepts connections from the moment that activate returns";
const UNKNOWN: &str = "mirror: Data.stat of an unknown key says failed and not complete, and does not fail";

pub fn faults() -> Vec<Fault> {
    vec![
        fault("each domain gets another export", SAME_ANSWER, "then", |call| {
            let domain = call.text("domain").to_owned();
            call.is(&["Datapath.attach"]).then(|| {
                call.answer()?.edit(|answer| {
                    nbd(answer, |uri| if domain == "7" { uri.to_owned() } else { format!("{uri}-{domain}") })
                })
            })?
        }),
        fault("attach answers no XenDisk", SAME_ANSWER, "no VBD", |call| {
            call.is(&["Datapath.attach"]).then(|| call.answer()?.edit(|answer| keep(answer, "Nbd")))?
        }),
        fault("a XenDisk has no extra", SAME_ANSWER, "extra", |call| {
            call.is(&["Datapath.attach"]).then(|| {
                call.answer()?.edit(|answer| {
                    for implementation in answer["implementations"].as_array_mut().into_iter().flatten() {
                        if let Some(fields) = implementation[1].as_object_mut() {
                            fields.remove("extra");
                        }
                    }
                })
            })?
        }),
        fault("an implementation has a tag of its own", SAME_ANSWER, "Vhost", |call| {
            call.is(&["Datapath.attach"]).then(|| {
                call.answer()?.edit(|answer| {
                    if let Some(list) = answer["implementations"].as_array_mut() {
                        list.push(json!(["Vhost", {"path": "/run/x"}]));
                    }
                })
            })?
        }),
        fault("an NBD URI has five parts", AT_ONCE, "", |call| {
            call.is(&["Datapath.attach"])
                .then(|| call.answer()?.edit(|answer| nbd(answer, |uri| format!("{uri}:tls"))))?
        }),
        fault("activate returns before it has done anything", AT_ONCE, "", |call| {
            call.is(&["Datapath.activate"]).then(|| Answer::of(&Value::Null))
        }),
        fault("deactivate leaves the export open", AT_ONCE, "still exported", |call| {
            call.is(&["Datapath.deactivate"]).then(|| Answer::of(&Value::Null))
        }),
        fault(
            "detach of what was never attached fails",
            "order: detach, deactivate and close of what was never attached succeed",
            "Datapath.detach",
            |call| {
                let name = format!("{} {}", call.text("uri"), call.text("domain"));
                match call.method.as_str() {
                    "Datapath.attach" => call.note(&name, ""),
                    "Datapath.detach" if call.noted(&name).is_none() => {
                        return Some(Answer::refusal("SR_BACKEND_FAILURE_24"));
                    }
                    _ => {}
                }
                None
            },
        ),
        fault(
            "deactivate of what was never activated fails",
            "order: deactivate of an attached volume that was never activated succeeds",
            "Datapath.deactivate",
            |call| {
                let name = format!("{} {}", call.text("uri"), call.text("domain"));
                match call.method.as_str() {
                    "Datapath.activate" | "Datapath.activate_readonly" => call.note(&name, ""),
                    "Datapath.deactivate" if call.noted(&name).is_none() => {
                        return Some(Answer::refusal("SR_BACKEND_FAILURE_24"));
                    }
                    _ => {}
                }
                None
            },
        ),
        fault(
            "one domain's deactivate ends every activation",
            "order: one domain's deactivate and detach leave another domain's activation alone",
            "",
            |call| {
                call.is(&["Datapath.deactivate"]).then(|| {
                    for domain in ["7", "8", "MIR0a1b2c"] {
                        call.other("Datapath.deactivate", &json!({"domain": domain}))?;
                    }
                    call.answer()
                })?
            },
        ),
        fault(
            "activate_readonly activates for writing",
            "data: an export that is activated read-only refuses writes",
            "",
            |call| call.is(&["Datapath.activate_readonly"]).then(|| call.other("Datapath.activate", &json!({})))?,
        ),
        fault(
            "a disk that should forget does not",
            "nonpersistent: what was written after open without persistent is gone after close",
            "byte",
            |call| call.is(&["Datapath.open"]).then(|| call.other("Datapath.open", &json!({"persistent": true})))?,
        ),
        fault(
            "a volume that is gone is attached all the same",
            "order: a volume that is gone refuses attach and activate, and not deactivate and detach",
            "not refused",
            |call| {
                let answer = call.is(&["Datapath.activate"]).then(|| call.answer())??;
                Some(if answer.success { answer } else { Answer::of(&Value::Null) })
            },
        ),
        fault(
            "another host's activation is told without its tag",
            "order: a volume active for writing on another host says Activated_on_another_host",
            "Datapath.activate",
            |call| {
                let answer = call.answer()?;
                if !answer.failed_with("Activated_on_another_host") {
                    return Some(answer);
                }
                answer.edit(|error| error["params"] = json!([error["params"][1]]))
            },
        ),
        fault(
            "what a script started holds its output",
            "process: what scripts leave running holds no descriptor of theirs, nor a terminal",
            "held open",
            |call| {
                if call.is(&["Datapath.attach"]) {
                    let _ = std::process::Command::new("sleep").arg("8").spawn();
                }
                None
            },
        ),
        fault("Data.stat of an unknown mirror fails", UNKNOWN, "Data.stat", |call| {
            call.is(&["Data.stat"]).then(|| Answer::refusal("SR_BACKEND_FAILURE_144"))
        }),
        fault("an unknown mirror is complete and failed", UNKNOWN, "", |call| {
            call.is(&["Data.stat"]).then(|| call.answer()?.edit(|status| status["complete"] = json!(true)))?
        }),
        fault(
            "an unknown mirror is complete",
            "mirror: Data.stat of a malformed key says failed and not complete, and does not fail",
            "",
            |call| call.is(&["Data.stat"]).then(|| Answer::of(&json!({"complete": true, "failed": false}))),
        ),
        fault(
            "a mirror that is complete has copied nothing",
            "mirror: Data.mirror of an inactive leaf, as of a halted VM, completes with the same bytes",
            "",
            |call| match call.method.as_str() {
                "Data.mirror" => Some(Answer::of(&json!(["MirrorV1", "00000000-0000-4000-8000-000000000000"]))),
                "Data.stat" => Some(Answer::of(&json!({"complete": true, "failed": false}))),
                _ => None,
            },
        ),
        fault(
            "progress goes from nought to a hundred",
            "mirror: Data.stat's progress stays between 0 and 1 and does not go back",
            "progress",
            |call| call.is(&["Data.stat"]).then(|| call.answer()?.edit(|status| status["progress"] = json!(37.5)))?,
        ),
        fault("Data.ls knows no mirror", "mirror: Data.ls lists a mirror", "is not just", |call| {
            call.is(&["Data.ls"]).then(|| Answer::of(&json!([])))
        }),
        fault(
            "Data.cancel answers something",
            "mirror's end: Data.cancel and Data.destroy of an unknown operation do no harm",
            "Data.cancel",
            |call| call.is(&["Data.cancel"]).then(|| Answer::of(&json!("cancelled"))),
        ),
    ]
}

/// Changes the NBD URIs of what attach answered.
fn nbd(answer: &mut Value, change: impl Fn(&str) -> String) {
    for implementation in answer["implementations"].as_array_mut().into_iter().flatten() {
        if implementation[0] == "Nbd" {
            let uri = change(implementation[1]["uri"].as_str().unwrap_or_default());
            implementation[1]["uri"] = json!(uri);
        }
    }
}

/// Leaves one kind of implementation in what attach answered.
fn keep(answer: &mut Value, tag: &str) {
    if let Some(list) = answer["implementations"].as_array_mut() {
        list.retain(|implementation| implementation[0] == tag);
    }
}
