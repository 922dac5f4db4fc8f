//! Faults that a suite orders and the runner carries out.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::wire::Request;

/// What is done when a fault strikes.
pub type Action = Arc<dyn Fn(&CallSite<'_>) + Send + Sync>;

/// What happens to one call.
#[derive(Clone)]
pub enum Fault {
    /// It fails without having run.
    FailInstead,
    /// It runs, and its failure is reported.
    FailAfter,
    /// It runs twice at the same time.
    TwiceAtOnce,
    /// It runs twice, one after the other.
    TwiceInARow,
    /// The script gets SIGKILL this long after its start.
    Kill(Duration),
    /// Nobody hears of it any more: the caller waits for ever, before the script ran or after it, and another is told.
    Lost {
        /// Whether the script runs.
        after: bool,
        /// Who is told when it has, or would have.
        told: Arc<Notify>,
    },
    /// Something is done before it runs.
    Before(Action),
    /// Something is done after it has run.
    After(Action),
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FailInstead => f.write_str("FailInstead"),
            Self::FailAfter => f.write_str("FailAfter"),
            Self::TwiceAtOnce => f.write_str("TwiceAtOnce"),
            Self::TwiceInARow => f.write_str("TwiceInARow"),
            Self::Kill(after) => f.debug_tuple("Kill").field(after).finish(),
            Self::Lost { after, .. } => f.debug_struct("Lost").field("after", after).finish(),
            Self::Before(_) => f.write_str("Before"),
            Self::After(_) => f.write_str("After"),
        }
    }
}

/// The call about to be made.
#[derive(Debug, Clone, Copy)]
pub struct CallSite<'a> {
    /// Its number since the log began, counted over all hosts of the log.
    pub number: usize,
    /// The host that makes it.
    pub host: &'a str,
    /// The request.
    pub request: &'a Request,
}

/// Decides about every call; `None` lets it be.
pub type FaultHook = Arc<dyn Fn(&CallSite<'_>) -> Option<Fault> + Send + Sync>;

/// The faults in force; clones share them.
#[derive(Clone, Default)]
pub struct Faults {
    hook: Arc<Mutex<Option<FaultHook>>>,
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Faults")
    }
}

impl Faults {
    /// Lets a function decide about every call from now on.
    pub fn order(&self, hook: FaultHook) {
        *self.hook.lock().unwrap_or_else(PoisonError::into_inner) = Some(hook);
    }

    /// No more faults.
    pub fn clear(&self) {
        *self.hook.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// One fault at the n-th call from now that a predicate matches, counted from 0.
    pub fn nth(&self, n: usize, fault: Fault, matches: impl Fn(&CallSite<'_>) -> bool + Send + Sync + 'static) {
        let seen = std::sync::atomic::AtomicUsize::new(0);
        self.order(Arc::new(move |site| {
            (matches(site) && seen.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == n).then(|| fault.clone())
        }));
    }

    /// One fault at the n-th call from now of a method on a host, counted from 0.
    pub fn nth_of(&self, host: &str, method: &str, n: usize, fault: Fault) {
        let (host, method) = (host.to_owned(), method.to_owned());
        self.nth(n, fault, move |site| site.host == host && site.request.method.eq_ignore_ascii_case(&method));
    }

    pub(super) fn strike(&self, site: &CallSite<'_>) -> Option<Fault> {
        let hook = self.hook.lock().unwrap_or_else(PoisonError::into_inner).clone();
        hook.and_then(|hook| hook(site))
    }
}
