//! Spans for xapi's observers: what a process did, and what in it took its time.
//!
//! ```text
//!   xapi's span ── call ──┬── QMP blockdev-snapshot
//!                         ├── qemu-img create
//!                         ├── lock tree
//!                         └── mirror           of a process that outlives the call, as are copy, import and gc
//! ```
//!
//! Nothing is recorded, and nothing costs anything, unless xapi has an observer of storage and the trace is one that it
//! records. A process has one span of its own and, hanging from it, those of what it waited for; all are written when it
//! ends.

mod context;
mod observer;
mod zipkin;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::Error;
use crate::host::Host;
use context::new_span;
pub(crate) use context::of;
pub use context::{Parent, VARIABLE};
use observer::Observer;
use zipkin::Span;

/// What takes less is no span of its own.
const WORTH_TELLING: Duration = Duration::from_millis(1);

/// The most spans of one process. A mirror asks its job for days.
const MOST: usize = 500;

static RECORDER: OnceLock<Recorder> = OnceLock::new();

/// What a process records.
struct Recorder {
    host: Host,
    /// The observers' directory, as it was given.
    directory: PathBuf,
    observers: Vec<Observer>,
    trace: u128,
    /// The process's own span, as far as it is known.
    own: Mutex<Span>,
    begun: Instant,
    spans: Mutex<Vec<Span>>,
}

/// What makes a later process's span hang from this one's: kept in its record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The `traceparent` of the span that it hangs from.
    pub parent: String,
    /// The directory of xapi's observers.
    pub observers: PathBuf,
}

/// Begins to record this process, if xapi's observers want that: by what xapi-storage-script puts into the environment, or
/// the call that started it ([`environment`]).
pub fn begin(host: &Host) {
    let Some(directory) = std::env::var_os(observer::VARIABLE).and_then(|value| value.into_string().ok()) else {
        return;
    };
    // As observer.py does: xapi may have quoted it for a shell.
    let directory = PathBuf::from(directory.trim_matches('\''));
    let parent = std::env::var(VARIABLE).ok().and_then(|parent| parent.parse().ok());
    record(host, directory, parent);
}

/// Begins to record this process as something that another one began.
pub fn begin_from(host: &Host, origin: &Origin) {
    record(host, origin.observers.clone(), origin.parent.parse().ok());
}

fn record(host: &Host, directory: PathBuf, parent: Option<Parent>) {
    if parent.is_some_and(|parent| !parent.is_sampled) {
        return;
    }
    let observers = Observer::all(host, &directory);
    if observers.is_empty() {
        return;
    }
    let own = Span {
        id: new_span(),
        parent: parent.map(|parent| parent.span),
        name: "call".to_owned(),
        began: SystemTime::now(),
        duration: 0,
        tags: Vec::new(),
        annotations: Vec::new(),
        error: None,
    };
    let trace = parent.map_or_else(|| Uuid::new_v4().as_u128(), |parent| parent.trace);
    let recorder = Recorder {
        host: host.clone(),
        directory,
        observers,
        trace,
        own: Mutex::new(own),
        begun: Instant::now(),
        spans: Mutex::default(),
    };
    // A process begins once.
    drop(RECORDER.set(recorder));
}

/// Gives what a process that is started now needs to go on with the trace; nothing where none is recorded.
pub fn origin() -> Option<Origin> {
    let recorder = RECORDER.get()?;
    let parent = Parent { trace: recorder.trace, span: lock(&recorder.own).id, is_sampled: true };
    Some(Origin { parent: parent.to_string(), observers: recorder.directory.clone() })
}

/// Gives the variables by which a process that is started now goes on with the trace, as xapi-storage-script's do for a
/// script: nothing where none is recorded.
pub fn environment() -> Vec<(&'static str, OsString)> {
    let Some(origin) = origin() else { return Vec::new() };
    vec![(VARIABLE, origin.parent.into()), (observer::VARIABLE, origin.observers.into())]
}

/// Names this process's span.
pub fn name(name: &str) {
    with_own(|own| name.clone_into(&mut own.name));
}

/// Says something with this process's span.
pub fn tag(key: &'static str, value: impl ToString) {
    with_own(|own| own.tags.push((key, value.to_string())));
}

/// Notes in this process's span that something happens now.
pub fn note(what: &str) {
    with_own(|own| own.annotations.push((SystemTime::now(), what.to_owned())));
}

/// Notes that what this process did has failed.
pub fn fail(error: &Error) {
    with_own(|own| own.error = Some(error.chain()));
}

fn with_own(change: impl FnOnce(&mut Span)) {
    if let Some(recorder) = RECORDER.get() {
        change(&mut lock(&recorder.own));
    }
}

/// Writes what was recorded, at the end of the process.
pub fn end() {
    let Some(recorder) = RECORDER.get() else { return };
    let mut spans = std::mem::take(&mut *lock(&recorder.spans));
    let mut own = lock(&recorder.own).clone();
    own.duration = micros(recorder.begun.elapsed());
    spans.push(own);
    for observer in &recorder.observers {
        if let Err(error) = zipkin::write(&recorder.host, observer, recorder.trace, &spans) {
            tracing::warn!(%error, directory = %observer.directory.display(), "spans are not written");
        }
    }
}

/// Something that takes its time, until it is dropped.
#[must_use]
#[derive(Debug)]
pub struct Timed {
    running: Option<(String, SystemTime, Instant)>,
}

/// Begins something that takes its time: a kind of thing, and which.
pub fn timed(kind: &str, which: &str) -> Timed {
    let begins = |_: &Recorder| (format!("{kind} {which}").trim().to_owned(), SystemTime::now(), Instant::now());
    Timed { running: RECORDER.get().map(begins) }
}

impl Drop for Timed {
    fn drop(&mut self) {
        let (Some((name, began, begun)), Some(recorder)) = (self.running.take(), RECORDER.get()) else { return };
        let elapsed = begun.elapsed();
        let mut spans = lock(&recorder.spans);
        if elapsed < WORTH_TELLING || spans.len() >= MOST {
            return;
        }
        let parent = Some(lock(&recorder.own).id);
        let duration = micros(elapsed);
        spans.push(Span {
            id: new_span(),
            parent,
            name,
            began,
            duration,
            tags: Vec::new(),
            annotations: Vec::new(),
            error: None,
        });
    }
}

/// Locks what is never left half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
