//! Plugins whose SRs do not live as they should.

use serde_json::{Value, json};

use crate::faults::{Fault, fault};
use crate::wrapper::{Answer, Call};

const STAT: &str = "sr: SR.stat tells name, description, uuid, space and health";

pub fn faults() -> Vec<Fault> {
    vec![
        fault("health is a bare tag", STAT, "health", |call| {
            edit_stat(call, |stat| stat["health"] = json!("Healthy"))
        }),
        fault("more space is free than there is", STAT, "free_space", |call| {
            edit_stat(call, |stat| stat["free_space"] = json!(stat["total_space"].as_i64().unwrap_or(0) + 1))
        }),
        fault("an SR that works is unhealthy", STAT, "Unavailable", |call| {
            edit_stat(call, |stat| stat["health"] = json!(["Unavailable", "so it seems"]))
        }),
        fault(
            "an SR that is gone is listed as empty",
            "sr faults: an SR whose directory is gone is an error and not an empty SR",
            "",
            |call| {
                let answer = call.is(&["SR.ls"]).then(|| call.answer())??;
                Some(if answer.success { answer } else { Answer::of(&json!([])) })
            },
        ),
        fault(
            "SR.attach of an attached SR gives it another name",
            "sr: SR.attach of an attached SR gives the same answer",
            "then",
            |call| {
                let answer = call.is(&["SR.attach"]).then(|| call.answer())??;
                if call.noted("attached").is_none() {
                    call.note("attached", "");
                    return Some(answer);
                }
                answer.edit(|name| *name = json!(name.as_str().unwrap_or_default().to_uppercase()))
            },
        ),
        fault("SR.detach fails the second time", "sr: SR.detach of a detached SR succeeds", "SR.detach", |call| {
            let name = format!("detached {}", call.is(&["SR.detach"]).then(|| call.text("sr"))?);
            if call.noted(&name).is_some() {
                return Some(Answer::refusal("Sr_not_attached"));
            }
            call.note(&name, "");
            None
        }),
        fault(
            "a detached SR still answers",
            "sr: a detached SR refuses SR.stat, SR.ls and Volume calls",
            "not refused",
            |call| {
                let answer = call.is(&["SR.ls"]).then(|| call.answer())??;
                Some(if answer.failed_with("Sr_not_attached") { Answer::of(&json!([])) } else { answer })
            },
        ),
        fault(
            "SR.destroy destroys an SR with its volumes",
            "sr: SR.destroy of an SR with volumes is refused and leaves them all, or destroys them all",
            "not refused",
            |call| {
                let answer = call.is(&["SR.destroy"]).then(|| call.answer())??;
                Some(if answer.success { answer } else { Answer::of(&Value::Null) })
            },
        ),
        fault(
            "SR.create takes a directory that is another SR's",
            "sr: SR.create where another SR is fails and leaves that one alone",
            "not refused",
            |call| {
                let answer = call.is(&["SR.create"]).then(|| call.answer())??;
                let taken = answer.failed_with("SR_BACKEND_FAILURE_42");
                Some(if taken { Answer::of(&call.request["configuration"]) } else { answer })
            },
        ),
        fault(
            "a device-config has a number in it",
            "sr: SR.create answers a device-config with which the SR can be attached",
            "SR.create",
            |call| call.is(&["SR.create"]).then(|| call.answer()?.edit(|config| config["port"] = json!(2049)))?,
        ),
        fault("an SR that is not there is null", "sr: SR.probe of an empty place finds no SR", "sr", |call| {
            let null = |found: &mut Value| found[0]["sr"] = Value::Null;
            call.is(&["SR.probe"]).then(|| call.answer()?.edit(null))?
        }),
        fault(
            "an SR is found without its uuid",
            "sr: SR.probe finds an SR with its uuid and what SR.stat tells of it",
            "sr_uuid",
            |call| {
                call.is(&["SR.probe"]).then(|| {
                    call.answer()?.edit(|found| {
                        if let Some(config) = found[0]["configuration"].as_object_mut() {
                            config.remove("sr_uuid");
                        }
                    })
                })?
            },
        ),
        fault(
            "a directory above SRs is offered as a place",
            "sr: SR.probe of a directory above SRs finds each, and offers it as no place",
            "complete: true",
            |call| {
                let complete = |found: &mut Value| {
                    found.as_array_mut().into_iter().flatten().for_each(|entry| entry["complete"] = json!(true));
                };
                call.is(&["SR.probe"]).then(|| call.answer()?.edit(complete))?
            },
        ),
        fault(
            "an SR that is gone is healthy",
            "sr: SR.stat of an SR that is gone is Unavailable and says what to do",
            "Healthy",
            |call| edit_stat(call, |stat| stat["health"] = json!(["Healthy", ""])),
        ),
        fault(
            "SR.destroy that was killed cannot be finished",
            "sr: SR.destroy that was killed can be made again",
            "SR_BACKEND_FAILURE_47",
            |call| {
                let sr = call.is(&["SR.destroy"]).then(|| call.text("sr"))?;
                if call.noted(sr).is_some() {
                    return Some(Answer::refusal("SR_BACKEND_FAILURE_47"));
                }
                call.note(sr, "");
                None
            },
        ),
        fault(
            "SR.set_name is forgotten",
            "sr: SR.set_name and SR.set_description are seen by SR.stat and survive a detachment",
            "SrStat",
            |call| call.is(&["SR.set_name"]).then(|| Answer::of(&Value::Null)),
        ),
        fault(
            "a volume is found through any SR",
            "sr: a volume of one SR is unknown in another",
            "not refused",
            |call| {
                if call.method == "SR.attach" {
                    let answer = call.answer()?;
                    let before = call.noted("srs").unwrap_or_default();
                    call.note("srs", &format!("{before}{}\n", answer.json().as_str()?));
                    return Some(answer);
                }
                let answer = call.is(&["Volume.stat"]).then(|| call.answer())??;
                if answer.success {
                    return Some(answer);
                }
                let srs = call.noted("srs").unwrap_or_default();
                let mut found = srs.lines().filter_map(|sr| call.other("Volume.stat", &json!({"sr": sr})));
                found.find(|found| found.success).or(Some(answer))
            },
        ),
        fault(
            "a missing device-config is just a bad request",
            "xcp-ng-tests: SR.create without its device-config says what sm says: error 90 in its words",
            "SR_BACKEND_FAILURE_115",
            |call| {
                let answer = call.is(&["SR.create"]).then(|| call.answer())??;
                if answer.success { Some(answer) } else { Some(Answer::refusal("SR_BACKEND_FAILURE_115")) }
            },
        ),
        fault(
            "an SR that was unplugged is not found",
            "quicktest: sr_probe: an SR that was unplugged is found by its PBD's device-config",
            "is not in",
            |call| call.is(&["SR.probe"]).then(|| Answer::of(&json!([]))),
        ),
    ]
}

fn edit_stat(call: &Call, change: fn(&mut Value)) -> Option<Answer> {
    call.is(&["SR.stat"]).then(|| call.answer()?.edit(change))?
}
