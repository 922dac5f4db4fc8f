//! What a call is about, for whoever looks at what happened: the log, the last failures, the observers' spans.

use std::time::Duration;

use serde_json::Value;
use tracing::{Span, error_span};

use crate::error::Error;
use crate::failures::Failure;
use crate::host::Host;
use crate::id::{Domain, MirrorKey, SrUuid, VolumeKey, VolumeUri};
use crate::trace::{self, Parent};

/// The characters of a task's name that are shown.
const TASK_CHARACTERS: usize = 100;

/// What a call is about. Of a request only what is an identifier of ours is taken: what else there is may be a secret.
#[derive(Clone, Debug, Default)]
pub(super) struct About {
    method: &'static str,
    sr: Option<SrUuid>,
    volume: Option<VolumeKey>,
    mirror: Option<MirrorKey>,
    domain: Option<Domain>,
    /// The caller's name for its task.
    task: String,
    trace: Option<Parent>,
}

impl About {
    /// Reads a request.
    pub fn of(method: &'static str, request: &Value) -> Self {
        let field = |name: &str| request.get(name).and_then(Value::as_str).unwrap_or_default();
        let uri = field("uri").parse::<VolumeUri>().ok();
        let key = ["key", "child_key", "from_key"].into_iter().find_map(|name| field(name).parse().ok());
        let sr = [field("sr"), if method == "SR.create" { field("uuid") } else { "" }];
        let operation = request.pointer("/operation/1").and_then(Value::as_str);
        let (task, trace) = trace::of(field("dbg"), std::env::var(trace::VARIABLE).ok());
        Self {
            method,
            sr: sr.into_iter().find_map(|sr| sr.parse().ok()).or(uri.map(|uri| uri.sr)),
            volume: key.or(uri.map(|uri| uri.volume)),
            mirror: operation.unwrap_or_else(|| field("id")).parse().ok(),
            domain: field("domain").parse().ok(),
            task: task.escape_debug().take(TASK_CHARACTERS).collect(),
            trace,
        }
    }

    /// Makes the span that says, with whatever is logged in it, for which call it is.
    pub fn span(&self) -> Span {
        let Self { method, sr, volume, mirror, domain, task, trace } = self;
        trace::name(if method.is_empty() { "call" } else { method });
        if !task.is_empty() {
            trace::tag("qcow2.dbg", task);
        }
        let tags = [
            ("qcow2.sr", sr.as_ref().map(ToString::to_string)),
            ("qcow2.volume", volume.as_ref().map(ToString::to_string)),
            ("qcow2.mirror", mirror.as_ref().map(ToString::to_string)),
            ("qcow2.domain", domain.as_ref().map(ToString::to_string)),
        ];
        for (key, value) in tags {
            value.into_iter().for_each(|value| trace::tag(key, value));
        }
        // Of the level of an error, so that it is there whatever is chosen to be logged.
        error_span!(
            "call",
            method,
            sr = sr.as_ref().map(tracing::field::display),
            volume = volume.as_ref().map(tracing::field::display),
            mirror = mirror.as_ref().map(tracing::field::display),
            domain = domain.as_ref().map(tracing::field::display),
            dbg = task,
            traceparent = trace.as_ref().map(tracing::field::display),
        )
    }

    /// Tells everybody how the call ended: the log by the call's one line.
    pub fn ended(&self, host: &Host, duration: Duration, failed: Option<&Error>) {
        let ms = format!("{:.1}", duration.as_secs_f64() * 1000.0);
        let Some(error) = failed else {
            tracing::info!(ms, outcome = "ok", "done");
            return;
        };
        let (code, _) = error.code();
        trace::tag("qcow2.code", &code);
        trace::fail(error);
        tracing::error!(ms, outcome = code, error = error.chain(), "failed");
        let failure = Failure::of(if self.method.is_empty() { "?" } else { self.method }, error);
        let (sr, volume) = (self.sr.map(|sr| sr.to_string()), self.volume.map(|volume| volume.to_string()));
        Failure { sr, volume, dbg: self.task.clone(), ..failure }.keep(host);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_request_is_about_is_found_wherever_it_stands() {
        let (sr, volume, mirror) = (SrUuid::random(), VolumeKey::random(), MirrorKey::random());
        let about = About::of("Volume.stat", &json!({"sr": sr, "key": volume, "dbg": "task\n{}"}));
        assert_eq!((about.sr, about.volume, about.task.as_str()), (Some(sr), Some(volume), "task"));
        let about = About::of("Datapath.attach", &json!({"uri": format!("qsd://{sr}/{volume}"), "domain": "7"}));
        assert_eq!((about.sr, about.volume), (Some(sr), Some(volume)));
        assert_eq!(about.domain, "7".parse().ok());
        let about = About::of("Data.stat", &json!({"operation": ["MirrorV1", mirror]}));
        assert_eq!(about.mirror, Some(mirror));
        let about = About::of("SR.create", &json!({"uuid": sr}));
        assert_eq!(about.sr, Some(sr));
        let about = About::of("Volume.compose", &json!({"child_key": volume}));
        assert_eq!(about.volume, Some(volume));
    }

    #[test]
    fn what_is_no_identifier_is_not_told() {
        let request =
            json!({"sr": "secret", "key": ["secret"], "uri": "nfs://u:secret@h/", "configuration": "secret"});
        assert!(!format!("{:?}", About::of("SR.attach", &request)).contains("secret"));
    }
}
