//! The trace that a call belongs to, for the log.

use serde_json::Value;

/// The variable by which xapi-storage-script gives a traced script its place in the trace, as W3C's `traceparent`.
pub(super) const VARIABLE: &str = "TRACEPARENT";

/// Takes `dbg` apart: the task's name in its first line and the `traceparent` behind it, if there is one. What the
/// environment says counts first, as the place of this very script.
///
/// The second line is a JSON object with the context's fields or, from older callers, the `traceparent` alone (xen-api
/// `ocaml/xapi-idl/lib/debug_info.ml`).
pub(super) fn of(dbg: &str, environment: Option<String>) -> (&str, Option<String>) {
    let (task, context) = dbg.split_once('\n').unwrap_or((dbg, ""));
    let parent = environment.filter(|parent| is_parent(parent)).or_else(|| {
        let parent = match serde_json::from_str::<Value>(context) {
            Ok(fields) => fields.get("traceparent")?.as_str()?.to_owned(),
            Err(_) => context.to_owned(),
        };
        is_parent(&parent).then_some(parent)
    });
    (task, parent)
}

/// Whether a text can be a `traceparent`: a log is no place for whatever else may stand there.
fn is_parent(text: &str) -> bool {
    (1..=128).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn the_task_and_the_trace_are_told_apart_in_each_form() {
        let json = format!("task\n{{\"traceparent\":\"{PARENT}\"}}");
        assert_eq!(of(&json, None), ("task", Some(PARENT.to_owned())));
        assert_eq!(of(&format!("task\n{PARENT}"), None), ("task", Some(PARENT.to_owned())));
        assert_eq!(of("task", Some(PARENT.to_owned())), ("task", Some(PARENT.to_owned())));
        assert_eq!(of("task", None), ("task", None));
    }

    #[test]
    fn what_is_no_trace_is_left_out() {
        for dbg in ["task\n", "task\n{}", "task\n{\"traceparent\":1}", "task\nwords of\nothers"] {
            assert_eq!(of(dbg, Some("\u{1b}[2J".to_owned())), ("task", None), "{dbg:?}");
        }
    }
}
