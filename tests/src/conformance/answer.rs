//! What each method's answer has to be, decoded as strictly as the daemon does.

use crate::wire::{
    Attached, Blocks, ChangedBlocks, Json, Malformed, MirrorStatus, Operation, Plugin, ProbeResult, SrStat, Volume,
};

/// Decodes the answer of a method, whatever it is.
///
/// # Errors
/// Where it is not what xapi-storage-script accepts.
pub fn decode(method: &str, answer: &Json) -> Result<(), Malformed> {
    match method {
        "Plugin.query" => Plugin::decode(answer).map(drop),
        "Plugin.diagnostics" | "SR.attach" | "Datapath.import_activate" => answer.string("answer").map(drop),
        "Plugin.ls" => answer.strings("answer").map(drop),
        "SR.probe" => ProbeResult::decode_list(answer).map(drop),
        "SR.create" => answer.string_map("answer").map(drop),
        "SR.stat" => SrStat::decode(answer, "answer").map(drop),
        "SR.ls" => Volume::decode_list(answer).map(drop),
        "Volume.create" | "Volume.stat" | "Volume.snapshot" | "Volume.clone" | "Volume.copy" => {
            Volume::decode(answer, "answer").map(drop)
        }
        "Volume.list_changed_blocks" => ChangedBlocks::decode(answer).map(drop),
        "Volume.compare" => Blocks::decode(answer).map(drop),
        "Volume.similar_content" => answer.strings("answer").map(drop),
        "Datapath.attach" => Attached::decode(answer).map(drop),
        "Data.mirror" | "Data.copy" => Operation::decode(answer).map(drop),
        "Data.stat" => MirrorStatus::decode(answer).map(drop),
        "Data.ls" => operations(answer).map(drop),
        "Task.stat" => answer.fields("answer").map(drop),
        "Task.ls" => answer.strings("answer").map(drop),
        _ => answer.unit("answer"),
    }
}

/// Decodes the answer of `Data.ls`.
///
/// # Errors
/// If it is no list of operations.
pub fn operations(answer: &Json) -> Result<Vec<Operation>, Malformed> {
    answer.array("operations")?.iter().map(Operation::decode).collect()
}
