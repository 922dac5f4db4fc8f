//! The record of every script call.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::fault::Fault;
use crate::wire::{Failure, Json, Request};

/// One script call.
#[derive(Debug, Clone)]
pub struct CallRecord {
    /// The host that made it.
    pub host: String,
    /// The method.
    pub method: &'static str,
    /// The request as it was sent.
    pub request: String,
    /// The answer; `None` while it runs.
    pub answer: Option<Result<Json, Failure>>,
    /// A second answer that a fault made and the caller did not see.
    pub discarded: Option<Result<Json, Failure>>,
    /// The fault that struck.
    pub fault: Option<String>,
    /// When it began, since the log did.
    pub started: Duration,
    /// When it ended, since the log began.
    pub ended: Option<Duration>,
}

/// A log that several hosts share; clones are the same log.
#[derive(Debug, Clone)]
pub struct CallLog {
    epoch: Instant,
    calls: Arc<Mutex<Vec<CallRecord>>>,
}

impl Default for CallLog {
    fn default() -> Self {
        Self { epoch: Instant::now(), calls: Arc::default() }
    }
}

impl CallLog {
    /// When the log began, from which its times are counted.
    #[must_use]
    pub fn epoch(&self) -> Instant {
        self.epoch
    }

    /// All calls so far, in the order they began.
    #[must_use]
    pub fn calls(&self) -> Vec<CallRecord> {
        self.lock().clone()
    }

    /// The number of calls so far, to look at later ones with [`CallLog::since`].
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether nothing was called yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// The calls from a number on.
    #[must_use]
    pub fn since(&self, number: usize) -> Vec<CallRecord> {
        self.lock().get(number..).unwrap_or_default().to_vec()
    }

    /// The calls from a number on as `host method`, one each.
    #[must_use]
    pub fn order_since(&self, number: usize) -> Vec<String> {
        self.since(number).iter().map(|c| format!("{} {}", c.host, c.method)).collect()
    }

    pub(super) fn begin(&self, host: &str, request: &Request) -> usize {
        let started = self.epoch.elapsed();
        let mut calls = self.lock();
        calls.push(CallRecord {
            host: host.to_owned(),
            method: request.method,
            request: request.encode(),
            answer: None,
            discarded: None,
            fault: None,
            started,
            ended: None,
        });
        calls.len() - 1
    }

    pub(super) fn end(
        &self,
        number: usize,
        answer: &Result<Json, Failure>,
        fault: Option<&Fault>,
        discarded: Option<Result<Json, Failure>>,
    ) {
        let ended = self.epoch.elapsed();
        if let Err(failure) = answer {
            tracing::debug!(number, %failure, "script failed");
        }
        if let Some(call) = self.lock().get_mut(number) {
            call.answer = Some(answer.clone());
            call.fault = fault.map(|f| format!("{f:?}"));
            call.discarded = discarded;
            call.ended = Some(ended);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<CallRecord>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
