//! The trace that something belongs to: what a task's name carries, and W3C's `traceparent`.

use std::fmt;
use std::str::FromStr;

use serde_json::Value;
use uuid::Uuid;

/// The variable by which xapi-storage-script gives a traced script its place in the trace, as W3C's `traceparent`.
pub const VARIABLE: &str = "TRACEPARENT";

/// Takes `dbg` apart: the task's name in its first line and the `traceparent` behind it, if there is one. What the
/// environment says counts first, as the place of this very script.
///
/// The second line is a JSON object with the context's fields or, from older callers, the `traceparent` alone (xen-api
/// `ocaml/xapi-idl/lib/debug_info.ml`).
pub(crate) fn of(dbg: &str, environment: Option<String>) -> (&str, Option<Parent>) {
    let (task, context) = dbg.split_once('\n').unwrap_or((dbg, ""));
    let parent = environment.and_then(|parent| parent.parse().ok()).or_else(|| {
        let parent = match serde_json::from_str::<Value>(context) {
            Ok(fields) => fields.get("traceparent")?.as_str()?.to_owned(),
            Err(_) => context.to_owned(),
        };
        parent.parse().ok()
    });
    (task, parent)
}

/// A place in a trace, `00-<trace>-<span>-<flags>` (W3C Trace Context, section 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parent {
    /// The trace.
    pub trace: u128,
    /// The span below which others are to hang.
    pub span: u64,
    /// Whether the trace is recorded.
    pub is_sampled: bool,
}

impl FromStr for Parent {
    type Err = ();

    /// Reads version 00. A log is no place for whatever else may stand there.
    fn from_str(text: &str) -> Result<Self, ()> {
        let lengths = [2, 32, 16, 2];
        let parts: Vec<&str> = text.split('-').collect();
        let is_hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let is_formed = parts.len() == lengths.len()
            && parts.iter().zip(lengths).all(|(part, length)| part.len() == length && is_hex(part));
        let &[version, trace, span, flags] = &parts[..] else { return Err(()) };
        if !is_formed || version != "00" {
            return Err(());
        }
        let trace = u128::from_str_radix(trace, 16).map_err(drop)?;
        let span = u64::from_str_radix(span, 16).map_err(drop)?;
        let flags = u8::from_str_radix(flags, 16).map_err(drop)?;
        if trace == 0 || span == 0 {
            return Err(());
        }
        Ok(Self { trace, span, is_sampled: flags & 1 == 1 })
    }
}

impl fmt::Display for Parent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.span, u8::from(self.is_sampled))
    }
}

/// Makes the id of a span. Never zero, which stands for none.
pub(super) fn new_span() -> u64 {
    let (high, low) = Uuid::new_v4().as_u64_pair();
    // The fixed bits of a uuid are in different places of its halves.
    (high ^ low).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn the_task_and_the_trace_are_told_apart_in_each_form() {
        let parent = PARENT.parse().ok();
        let json = format!("task\n{{\"traceparent\":\"{PARENT}\"}}");
        assert_eq!(of(&json, None), ("task", parent));
        assert_eq!(of(&format!("task\n{PARENT}"), None), ("task", parent));
        assert_eq!(of("task", Some(PARENT.to_owned())), ("task", parent));
        assert_eq!(of("task", None), ("task", None));
        assert_eq!(parent.unwrap().to_string(), PARENT);
    }

    #[test]
    fn what_is_no_trace_is_left_out() {
        for dbg in ["task\n", "task\n{}", "task\n{\"traceparent\":1}", "task\nwords of\nothers"] {
            assert_eq!(of(dbg, Some("\u{1b}[2J".to_owned())), ("task", None), "{dbg:?}");
        }
        for text in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333-101",
            "00-0af7651916cd43dd8448eb211c80319c-+7ad6b7169203331-01",
        ] {
            assert_eq!(text.parse::<Parent>(), Err(()), "{text}");
        }
    }
}
