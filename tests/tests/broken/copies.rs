//! Plugins that copy and compare wrongly.

use serde_json::{Value, json};

use crate::faults::{Fault, fault};
use crate::wrapper::Answer;

const CONTENT: &str = "volume copy: Volume.copy makes another volume with the same bytes and the same size";
const ELSEWHERE: &str = "volume copy: Volume.copy into another SR makes the copy there and changes nothing here";
const COMPARED: &str = "volume copy: Volume.compare lists every block that differs from a snapshot";
const SIMILAR: &str = "volume copy: Volume.similar_content names other volumes of the SR, each once";

pub fn faults() -> Vec<Fault> {
    vec![
        fault("a copy is the volume itself", CONTENT, "has the volume's key", |call| {
            call.is(&["Volume.copy"]).then(|| call.other("Volume.stat", &json!({})))?
        }),
        fault("a copy is blank", CONTENT, "is 0x0, not 0x1", |call| {
            let new = json!({"name": "", "description": "", "size": 4 << 20, "sharable": false});
            call.is(&["Volume.copy"]).then(|| call.other("Volume.create", &new))?
        }),
        fault(
            "a copy and its volume are one",
            "volume copy: what is written to a volume or to its copy is not seen in the other",
            "",
            |call| call.is(&["Volume.copy"]).then(|| call.other("Volume.stat", &json!({})))?,
        ),
        fault(
            "a copy has what its volume has since",
            "volume copy: Volume.copy of a snapshot has what the snapshot has, and outlives it",
            "is 0x9, not 0x1",
            |call| {
                call.is(&["Volume.copy"]).then_some(())?;
                let volumes = call.other("SR.ls", &json!({}))?.json();
                let all = volumes.as_array()?.iter();
                let other = all.map(|volume| &volume["key"]).find(|key| key.as_str() != Some(call.text("key")))?;
                call.other("Volume.copy", &json!({"key": other}))
            },
        ),
        fault("a copy stays in the SR of its volume", ELSEWHERE, "the volume's SR has", |call| {
            let here = json!({"dest_sr": call.text("sr")});
            call.is(&["Volume.copy"]).then(|| call.other("Volume.copy", &here))?
        }),
        fault(
            "a copy into an unknown SR stays here",
            "volume copy: Volume.copy of an unknown volume, or into an unknown SR, is refused",
            "",
            |call| {
                let here = json!({"dest_sr": call.text("sr")});
                call.is(&["Volume.copy"]).then(|| call.other("Volume.copy", &here))?
            },
        ),
        fault("nothing differs", COMPARED, "is not listed", |call| {
            call.is(&["Volume.compare"]).then(|| Answer::of(&json!({"blocksize": 65536, "ranges": []})))
        }),
        fault("blocks are listed by their bytes", COMPARED, "behind the volume's end", |call| {
            let bytes = |list: &mut Value| {
                for range in list["ranges"].as_array_mut().into_iter().flatten() {
                    *range = json!([range[0].as_i64().unwrap_or(0) << 16, range[1].as_i64().unwrap_or(0) << 16]);
                }
            };
            call.is(&["Volume.compare"]).then(|| call.answer()?.edit(bytes))?
        }),
        fault(
            "a volume that is compared with nothing is empty",
            "volume copy: Volume.compare with an unknown volume lists every block that is not empty",
            "is not listed",
            |call| call.is(&["Volume.compare"]).then(|| Answer::of(&json!({"blocksize": 65536, "ranges": []}))),
        ),
        fault("a volume is similar to itself", SIMILAR, "similar to itself", |call| {
            let mine = call.text("key");
            call.is(&["Volume.similar_content"]).then(|| Answer::of(&json!([mine])))
        }),
    ]
}
