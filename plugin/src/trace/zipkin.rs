//! Spans as xapi's observer writes them: lists in Zipkin's JSON, version 2, one a line, in files that are there whole or not
//! at all.

use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::time::SystemTime;

use serde_json::{Map, Value, json};

use super::observer::Observer;
use crate::clock;
use crate::host::Host;

/// The characters that the observer keeps of a tag's value (opentelemetry-exporter-zipkin-json,
/// DEFAULT_MAX_TAG_VALUE_LENGTH).
const TAG_CHARACTERS: usize = 128;

/// How often a file gets another name when there is one of that name.
const ATTEMPTS: u32 = 8;

/// What the file's name begins with until it is complete. Nobody reads files of names like this.
const TEMPORARY: &str = ".xapi-storage-qcow2-";

/// A span that has ended.
#[derive(Clone, Debug)]
pub(super) struct Span {
    pub id: u64,
    pub parent: Option<u64>,
    pub name: String,
    pub began: SystemTime,
    /// Microseconds.
    pub duration: u64,
    pub tags: Vec<(&'static str, String)>,
    /// What happened when.
    pub annotations: Vec<(SystemTime, String)>,
    /// Why it failed.
    pub error: Option<String>,
}

/// Writes spans of one trace for an observer, in a file of their own: a hidden one at first, which gets its name when it is
/// complete.
///
/// # Errors
///
/// When that fails; there is no file then.
pub(super) fn write(host: &Host, observer: &Observer, trace: u128, spans: &[Span]) -> io::Result<()> {
    let directory = host.below_root(&observer.directory);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
    let list: Vec<Value> = spans.iter().map(|span| encode(span, trace, observer)).collect();
    let mut file = tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(&directory)?;
    file.write_all(format!("{}\n", Value::from(list)).as_bytes())?;
    let mut attempt = 1;
    loop {
        match file.persist_noclobber(directory.join(file_name(observer, SystemTime::now()))) {
            Ok(_) => return Ok(()),
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists && attempt < ATTEMPTS => {
                file = error.file;
                attempt += 1;
            }
            Err(error) => return Err(error.error),
        }
    }
}

/// Names a file as the observer does; what it takes from TRACESTATE is never there for a script.
fn file_name(observer: &Observer, time: SystemTime) -> String {
    let name = format!("{}-{}-unknown-{}.ndjson", observer.service, observer.host(), clock::rfc3339(time));
    name.replace('/', "_")
}

fn encode(span: &Span, trace: u128, observer: &Observer) -> Value {
    let mut tags = Map::new();
    let mut tag = |key: &str, value: &str| {
        tags.insert(key.to_owned(), value.chars().take(TAG_CHARACTERS).collect::<String>().into());
    };
    span.tags.iter().for_each(|(key, value)| tag(key, value));
    observer.attributes.iter().for_each(|(key, value)| tag(key, value));
    for (key, value) in [
        ("otel.library.name", crate::log::IDENTIFIER),
        ("otel.library.version", env!("CARGO_PKG_VERSION")),
        ("otel.scope.name", crate::log::IDENTIFIER),
        ("otel.scope.version", env!("CARGO_PKG_VERSION")),
    ] {
        tag(key, value);
    }
    if let Some(error) = &span.error {
        tag("otel.status_code", "ERROR");
        tag("error", error);
    }
    let mut encoded = json!({
        "traceId": format!("{trace:032x}"),
        "id": format!("{:016x}", span.id),
        "name": span.name,
        "timestamp": micros(span.began),
        "duration": span.duration,
        "localEndpoint": {"serviceName": observer.service},
        "kind": null,
        "tags": tags,
        "debug": true,
    });
    if let Some(parent) = span.parent {
        encoded["parentId"] = format!("{parent:016x}").into();
    }
    if !span.annotations.is_empty() {
        let annotation = |(time, value): &(SystemTime, String)| json!({"timestamp": micros(*time), "value": value});
        encoded["annotations"] = span.annotations.iter().map(annotation).collect();
    }
    encoded
}

fn micros(time: SystemTime) -> u64 {
    u64::try_from(clock::since_1970(time).as_micros()).unwrap_or(u64::MAX)
}
