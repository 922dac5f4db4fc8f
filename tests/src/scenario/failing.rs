//! A call of a migration that is made to fail, to see what comes of it.

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Stage;
use crate::script::Fault;

/// Which call fails instead of running: `SIDE:METHOD[:N]`, the N-th of its method on that side of the migration, or the
/// first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailAt {
    destination: bool,
    method: String,
    nth: usize,
}

impl FromStr for FailAt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let destination = match parts.next() {
            Some("source") => false,
            Some("destination") => true,
            _ => return Err("it begins with source: or destination:".to_owned()),
        };
        let method = parts.next().filter(|method| method.contains('.'));
        let method = method.ok_or("it names no method, like Volume.snapshot")?.to_owned();
        let nth = match parts.next().map(str::parse) {
            None => 1,
            Some(Ok(nth)) if nth > 0 => nth,
            Some(_) => return Err("calls are counted from 1".to_owned()),
        };
        if parts.next().is_some() {
            return Err("it has more than SIDE:METHOD:N".to_owned());
        }
        Ok(Self { destination, method, nth })
    }
}

impl FailAt {
    /// Orders it on a stage, from now on.
    pub(super) fn order(&self, stage: &Stage) -> Struck {
        let host = if self.destination { &stage.destination } else { &stage.source };
        let (seen, nth, method) = (Arc::new(AtomicUsize::new(0)), self.nth, self.method.clone());
        let counted = Arc::clone(&seen);
        host.runner().faults().order(Arc::new(move |site| {
            let strikes = site.request.method.eq_ignore_ascii_case(&method)
                && counted.fetch_add(1, Ordering::SeqCst) + 1 == nth;
            strikes.then_some(Fault::FailInstead)
        }));
        Struck { seen, nth }
    }
}

/// Whether the call has come.
#[derive(Debug)]
pub(super) struct Struck {
    seen: Arc<AtomicUsize>,
    nth: usize,
}

impl Struck {
    /// True once it has failed.
    pub fn is_over(&self) -> bool {
        self.seen.load(Ordering::SeqCst) >= self.nth
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_named_by_its_side_its_method_and_its_number() {
        let fail = |text: &str| text.parse::<FailAt>();
        let expected = FailAt { destination: true, method: "Volume.snapshot".to_owned(), nth: 2 };
        assert_eq!(fail("destination:Volume.snapshot:2"), Ok(expected));
        assert_eq!(fail("source:Data.stat").map(|fail| (fail.destination, fail.nth)), Ok((false, 1)));
        for wrong in ["", "a:Data.stat", "source", "source:x", "source:Data.stat:0", "source:Data.stat:1:2"] {
            assert!(fail(wrong).is_err(), "{wrong}");
        }
    }
}
