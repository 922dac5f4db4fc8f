//! Plugins that compose or forget wrongly.

use serde_json::{Value, json};

use crate::faults::{Fault, fault};
use crate::wrapper::Answer;

const CONTENT: &str = "compose: Volume.compose shows the parent's data where the child was never written";
const CLOSED: &str = "nonpersistent: what was written after open without persistent is gone after close";
const STAYS: &str = "nonpersistent: what was written after open with persistent stays after close";

pub fn faults() -> Vec<Fault> {
    vec![
        fault("compose does nothing", CONTENT, "byte 0 is", |call| {
            call.is(&["Volume.compose"]).then(|| Answer::of(&Value::Null))
        }),
        fault("compose takes the parent for the child", CONTENT, "Volume_does_not_exist", |call| {
            let (child, parent) = (call.text("key"), call.text("key2"));
            let exchanged = json!({"key": parent, "key2": child});
            call.is(&["Volume.compose"]).then(|| call.other("Volume.compose", &exchanged))?
        }),
        fault(
            "compose only destroys the parent",
            "compose: Volume.compose under a snapshot of the fresh child, as in a migration from SMAPIv1",
            "byte 0 is",
            |call| {
                let parent = json!({"key": call.text("key2")});
                call.is(&["Volume.compose"]).then(|| call.other("Volume.destroy", &parent))?
            },
        ),
        fault(
            "compose leaves the parent behind",
            "compose: Volume.compose takes the parent from SR.ls, and destroying it then succeeds",
            "SR.ls lists",
            |call| {
                let parent = json!({"key": call.text("key2")});
                call.is(&["Volume.compose"]).then(|| {
                    call.other("Volume.clone", &parent)?;
                    call.answer()
                })?
            },
        ),
        fault(
            "a compose that is repeated fails",
            "compose: Volume.compose a second time changes nothing",
            "",
            |call| {
                let name = format!("composed {}", call.text("key2"));
                call.is(&["Volume.compose"]).then_some(())?;
                if call.noted(&name).is_some() {
                    return Some(Answer::refusal("SR_BACKEND_FAILURE_24"));
                }
                call.note(&name, "");
                None
            },
        ),
        fault("a disk that is to forget remembers", CLOSED, "byte 0 is", |call| {
            call.is(&["Datapath.open"]).then(|| call.other("Datapath.open", &json!({"persistent": true})))?
        }),
        fault("a disk that is to remember forgets", STAYS, "byte 0 is", |call| {
            call.is(&["Datapath.open"]).then(|| call.other("Datapath.open", &json!({"persistent": false})))?
        }),
        fault("close forgets to forget", CLOSED, "byte 0 is", |call| {
            call.is(&["Datapath.close"]).then(|| Answer::of(&Value::Null))
        }),
        fault(
            "a disk forgets with every detach",
            "nonpersistent: a disk that forgets keeps its data until close, whoever detaches",
            "instead of",
            |call| {
                call.is(&["Datapath.detach"]).then(|| {
                    let answer = call.answer();
                    call.other("Datapath.close", &json!({}));
                    answer
                })?
            },
        ),
    ]
}
