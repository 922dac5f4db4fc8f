//! What is to break, by lane: a host has one place to order faults of its scripts, and one for its connections.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fake_xapi::conformance::random::Random;
use fake_xapi::host::{Host, WireFault, WireHarm, WireMoment};
use fake_xapi::script::Fault;
use fake_xapi::smapiv2::Sr;

/// Calls that change something.
const METHODS: [&str; 14] = [
    "Volume.create",
    "Volume.snapshot",
    "Volume.clone",
    "Volume.destroy",
    "Volume.revert",
    "Volume.resize",
    "Volume.set",
    "Volume.unset",
    "Datapath.attach",
    "Datapath.activate",
    "Datapath.deactivate",
    "Datapath.detach",
    "Data.mirror",
    "Data.stat",
];

/// A fault of a lane's scripts: of the n-th call of a method from now.
#[derive(Debug, Clone)]
struct Ordered {
    method: &'static str,
    left: usize,
    fault: Fault,
}

#[derive(Debug, Default)]
struct Orders {
    scripts: BTreeMap<String, Ordered>,
    wires: BTreeMap<String, WireFault>,
}

/// The orders of all lanes, by the SR that they are about.
#[derive(Debug, Clone, Default)]
pub struct Breaks(Arc<Mutex<Orders>>);

impl Breaks {
    /// Has the hosts break what is ordered.
    pub fn install(hosts: &[Arc<Host>]) -> Self {
        let breaks = Self::default();
        for host in hosts {
            let orders = breaks.clone();
            host.runner().faults().order(Arc::new(move |site| {
                let mut orders = orders.lock();
                let request = site.request.encode();
                let sr = orders.scripts.keys().find(|sr| request.contains(sr.as_str())).cloned()?;
                let ordered = orders.scripts.get_mut(&sr)?;
                if !ordered.method.eq_ignore_ascii_case(site.request.method) {
                    return None;
                }
                if ordered.left > 0 {
                    ordered.left -= 1;
                    return None;
                }
                orders.scripts.remove(&sr).map(|ordered| ordered.fault)
            }));
            let orders = breaks.clone();
            host.wires().order(move |wire| {
                let mut orders = orders.lock();
                let volume = orders.wires.keys().find(|volume| **volume == wire.source).cloned()?;
                orders.wires.remove(&volume)
            });
        }
        breaks
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Orders> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Orders a fault of some call that is about one of these SRs; tells which.
    pub fn a_script(&self, random: &mut Random, srs: &[&Sr]) -> String {
        let fault = match random.below(6) {
            0 => Fault::FailInstead,
            1 => Fault::FailAfter,
            2 => Fault::TwiceAtOnce,
            3 => Fault::TwiceInARow,
            _ => Fault::Kill(Duration::from_micros(random.below(60_000) as u64)),
        };
        let (method, left) = (*random.pick(&METHODS), random.below(4));
        let told = format!("{fault:?} of {method} after {left}");
        self.lock().scripts.insert(random.pick(srs).0.clone(), Ordered { method, left, fault });
        told
    }

    /// Orders that the next connection which carries a volume breaks; tells how.
    pub fn a_wire(&self, random: &mut Random, volume: &str) -> String {
        let at = if random.below(4) == 0 {
            WireMoment::Handshake
        } else {
            WireMoment::Bytes(random.below(6 << 20) as u64)
        };
        let how = if random.below(4) == 0 { WireHarm::Stall } else { WireHarm::Cut };
        let fault = WireFault { at, how };
        self.lock().wires.insert(volume.to_owned(), fault);
        format!("{fault:?} of {volume}")
    }

    /// Nothing about these breaks any more.
    pub fn none_of(&self, srs: &[&Sr], volumes: &[&str]) {
        let mut orders = self.lock();
        orders.scripts.retain(|sr, _| !srs.iter().any(|one| one.0 == *sr));
        orders.wires.retain(|volume, _| !volumes.contains(&volume.as_str()));
    }
}
