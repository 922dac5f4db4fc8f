//! Plugins whose volumes are not what was asked for.

use serde_json::{Value, json};

use crate::faults::{CREATE, Fault, ISOLATION, fault};
use crate::wrapper::{Answer, Call};

const ABOUT: &[&str] = &["Volume.create", "Volume.stat", "Volume.snapshot", "Volume.clone", "SR.ls"];
const RESIZE: &str = "volume: Volume.resize to the same size succeeds, and to a smaller one is refused";

pub fn faults() -> Vec<Fault> {
    vec![
        fault(
            "a volume's name is cut short",
            "volume: Volume.create stores any name and description exactly",
            "bytes is changed",
            |call| {
                let name: String =
                    call.is(&["Volume.create"]).then(|| call.text("name"))?.chars().take(255).collect();
                call.other("Volume.create", &json!({"name": name}))
            },
        ),
        fault(
            "what is sharable is forgotten",
            "volume: Volume.create remembers that a volume is sharable, or refuses one",
            "sharable",
            |call| call.is(&["Volume.create"]).then(|| call.other("Volume.create", &json!({"sharable": false})))?,
        ),
        fault(
            "a size is rounded down",
            "volume: Volume.create makes at least as many bytes as asked, whatever the alignment",
            "became",
            |call| {
                let size = call.is(&["Volume.create"]).then(|| call.request["size"].as_i64())??;
                call.other("Volume.create", &json!({"size": (size - size % (1 << 20)).max(1)}))
            },
        ),
        fault(
            "a wrong size is made right",
            "xcp-ng-tests: a disk of a wrong size is refused and leaves nothing",
            "not refused",
            |call| {
                let size = call.is(&["Volume.create"]).then(|| call.request["size"].as_i64())??;
                call.other("Volume.create", &json!({"size": size.clamp(1, 1 << 30)}))
            },
        ),
        fault(
            "a volume's uuid is not its key",
            "volume: a volume's key is its uuid, since xapi uses either as the location",
            "uuid",
            |call| {
                let other = |v: &mut Value| v["uuid"] = json!("7d2f3a5e-0000-4000-8000-000000000000");
                call.is(ABOUT).then(|| call.answer()?.edit_volumes(other))?
            },
        ),
        fault("SR.ls tells another name than Volume.stat", CREATE, "ls has", |call| {
            call.is(&["SR.ls"]).then(|| call.answer()?.edit_volumes(|v| v["name"] = json!("")))?
        }),
        fault(
            "an empty value of a key is taken for none",
            "volume: Volume.set and Volume.unset are seen in the keys of stat and ls",
            "an empty value",
            |call| (call.is(&["Volume.set"]) && call.text("v").is_empty()).then(|| Answer::of(&Value::Null)),
        ),
        fault(
            "Volume.unset of an absent key fails",
            "volume: Volume.set replaces a value, and Volume.unset of an absent key succeeds",
            "Volume.unset",
            |call| {
                call.is(&["Volume.unset"]).then(|| {
                    let keys = call.other("Volume.stat", &json!({}))?.json()["keys"].clone();
                    if keys.get(call.text("k")).is_some() {
                        call.answer()
                    } else {
                        Some(Answer::refusal("SR_BACKEND_FAILURE_115"))
                    }
                })?
            },
        ),
        fault(
            "a long value of a key is cut",
            "volume: Volume.set of a value of a mebibyte keeps it exactly",
            "",
            |call| {
                let value: String = call.is(&["Volume.set"]).then(|| call.text("v"))?.chars().take(65536).collect();
                call.other("Volume.set", &json!({"v": value}))
            },
        ),
        fault(
            "Volume.set_name does nothing",
            "volume: Volume.set_name and Volume.set_description are seen in stat and ls",
            "",
            |call| call.is(&["Volume.set_name"]).then(|| Answer::of(&Value::Null)),
        ),
        fault(
            "a clone inherits is_a_snapshot",
            "volume: Volume.clone of a snapshot does not become a snapshot",
            "it is a snapshot",
            |call| {
                let clone = call.is(&["Volume.clone"]).then(|| call.answer())??;
                let key = clone.json()["key"].clone();
                let keys = call.other("Volume.stat", &json!({}))?.json()["keys"].clone();
                for (name, value) in keys.as_object()? {
                    call.other("Volume.set", &json!({"key": key, "k": name, "v": value}))?;
                }
                call.other("Volume.stat", &json!({"key": key}))
            },
        ),
        fault("a snapshot shares the writes of its volume", ISOLATION, "byte", |call| {
            if call.method == "Volume.snapshot" {
                let origin = call.other("Volume.stat", &json!({}))?.json()["uri"].clone();
                let taken = call.answer()?;
                call.note(taken.json()["key"].as_str()?, &origin.to_string());
                return taken.edit(|v| v["uri"] = origin);
            }
            call.is(&["Volume.stat", "SR.ls"]).then(|| {
                call.answer()?.edit_volumes(|v| {
                    let noted = call.noted(v["key"].as_str().unwrap_or_default());
                    if let Some(uri) = noted.and_then(|text| serde_json::from_str(&text).ok()) {
                        v["uri"] = uri;
                    }
                })
            })?
        }),
        fault(
            "a clone shares the writes of its parent",
            "data: a clone of a leaf and the leaf do not see each other's later writes",
            "byte",
            |call| {
                let origin =
                    call.is(&["Volume.clone"]).then(|| call.other("Volume.stat", &json!({})))??.json()["uri"].clone();
                call.answer()?.edit(|v| v["uri"] = origin)
            },
        ),
        fault(
            "snapshots are not in SR.ls",
            "volume: Volume.snapshot answers a new volume and leaves the first as it was",
            "ls has",
            |call| {
                if call.method == "Volume.snapshot" {
                    let taken = call.answer()?;
                    call.note(taken.json()["key"].as_str()?, "a snapshot");
                    return Some(taken);
                }
                call.is(&["SR.ls"]).then(|| {
                    call.answer()?.edit(|listed| {
                        if let Some(volumes) = listed.as_array_mut() {
                            volumes.retain(|v| call.noted(v["key"].as_str().unwrap_or_default()).is_none());
                        }
                    })
                })?
            },
        ),
        fault(
            "a snapshot cannot be snapshotted",
            "volume: Volume.snapshot of a snapshot and of a blank volume succeed",
            "SR_OPERATION_NOT_SUPPORTED",
            |call| {
                if !call.is(&["Volume.snapshot"]) {
                    return None;
                }
                if call.noted(call.text("key")).is_some() {
                    return Some(Answer::refusal("SR_OPERATION_NOT_SUPPORTED"));
                }
                let taken = call.answer()?;
                call.note(taken.json()["key"].as_str()?, "a snapshot");
                Some(taken)
            },
        ),
        fault(
            "a disk in use cannot be snapshotted",
            "quicktest: vdi_snapshot_in_pool: a disk that is active can be snapshotted",
            "SR_BACKEND_FAILURE_24",
            |call| call.is(&["Volume.snapshot"]).then(|| Answer::refusal("SR_BACKEND_FAILURE_24")),
        ),
        fault(
            "Volume.resize does nothing",
            "volume: Volume.resize is seen by stat and ls, and not by snapshots made before",
            "became",
            |call| call.is(&["Volume.resize"]).then(|| Answer::of(&Value::Null)),
        ),
        fault("a volume is shrunk without a word", RESIZE, "not refused", |call| {
            let answer = call.is(&["Volume.resize"]).then(|| call.answer())??;
            Some(if answer.success { answer } else { Answer::of(&Value::Null) })
        }),
        fault("a volume that has its size already is refused", RESIZE, "Volume.resize", |call| {
            let size =
                call.is(&["Volume.resize"]).then(|| call.other("Volume.stat", &json!({})))??.json()["virtual_size"]
                    .clone();
            (size == call.request["new_size"]).then(|| Answer::refusal("SR_BACKEND_FAILURE_79"))
        }),
        fault(
            "a destroy fails the second time",
            "volume: Volume.destroy of an unknown key succeeds",
            "Volume.destroy",
            |call| {
                let stat = call.is(&["Volume.destroy"]).then(|| call.other("Volume.stat", &json!({})))??;
                (!stat.success).then_some(stat)
            },
        ),
        fault(
            "a destroyed volume can be destroyed once",
            "twice: Volume.destroy twice in a row gives the same answer",
            "the second",
            |call| {
                let stat = call.is(&["Volume.destroy"]).then(|| call.other("Volume.stat", &json!({})))??;
                (!stat.success).then_some(stat)
            },
        ),
        fault(
            "Volume.destroy does nothing",
            "volume: Volume.destroy takes a volume from SR.ls, and stat then fails",
            "SR.ls",
            |call| call.is(&["Volume.destroy"]).then(|| Answer::of(&Value::Null)),
        ),
        fault(
            "a volume goes although a guest has it",
            "volume: Volume.destroy of a volume in use by a guest is refused, and it goes on working",
            "not refused",
            |call| {
                let answer = call.is(&["Volume.destroy"]).then(|| call.answer())??;
                Some(if answer.success { answer } else { Answer::of(&Value::Null) })
            },
        ),
        fault(
            "a volume's uri changes with its size",
            "volume: a volume's uri and key do not change while it lives",
            "",
            |call| {
                let sized = |v: &mut Value| {
                    v["uri"] = json!([format!("{}?{}", v["uri"][0].as_str().unwrap_or_default(), v["virtual_size"])])
                };
                call.is(&["Volume.stat"]).then(|| call.answer()?.edit_volumes(sized))?
            },
        ),
        fault(
            "two volumes of one name are one",
            "twice: Volume.create twice in a row makes two volumes",
            "both made",
            |call| {
                let name = call.is(&["Volume.create"]).then(|| call.text("name"))?;
                if let Some(made) = call.noted(name) {
                    return Some(Answer { success: true, text: made.into_bytes() });
                }
                let answer = call.answer()?;
                call.note(name, &String::from_utf8_lossy(&answer.text));
                Some(answer)
            },
        ),
        fault(
            "a volume's type is lost",
            "self-test: the sequence of xapi-storage-script's self-test ends well under the name dummyv5",
            "",
            |call| (call.is(&["Volume.set"]) && call.text("k") == "vdi-type").then(|| Answer::of(&Value::Null)),
        ),
        fault(
            "a revert does nothing",
            "quicktest: vm_snapshot: a disk that is reverted has the snapshot's bytes and its own location",
            "byte",
            |call| call.is(&["Volume.revert"]).then(|| Answer::of(&Value::Null)),
        ),
        fault(
            "Volume.compose does nothing",
            "compose: Volume.compose takes the parent from SR.ls, and destroying it then succeeds",
            "",
            |call| call.is(&["Volume.compose"]).then(|| Answer::of(&Value::Null)),
        ),
        fault(
            "Volume.compose takes the parent without its data",
            "compose: Volume.compose shows the parent's data where the child was never written",
            "byte",
            |call| {
                let parent = call.is(&["Volume.compose"]).then(|| call.request["key2"].clone())?;
                call.other("Volume.destroy", &json!({"key": parent}))
            },
        ),
        fault(
            "a destroyed volume takes its snapshots with it",
            "data: destroying a volume does not change its snapshots and clones",
            "",
            snapshots_go_too,
        ),
    ]
}

fn snapshots_go_too(call: &Call) -> Option<Answer> {
    if call.method == "Volume.snapshot" {
        let taken = call.answer()?;
        call.note(call.text("key"), taken.json()["key"].as_str()?);
        return Some(taken);
    }
    let key = call.is(&["Volume.destroy"]).then(|| call.text("key"))?;
    let answer = call.answer();
    if let Some(snapshot) = call.noted(key) {
        call.other("Volume.destroy", &json!({"key": snapshot}))?;
    }
    answer
}
