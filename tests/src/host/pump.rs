//! The raw byte pump of the NBD proxies: counts what goes over the wire, and breaks it on request.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;

use super::lock;

/// Bytes that a pump holds in each direction, as xapi's does.
const BUFFER: usize = 64 * 1024;
/// Samples of a wire are at least this far apart.
const SAMPLE_EVERY: Duration = Duration::from_millis(100);

/// One connection of a mirror or a copy, from the source host's side.
#[derive(Debug)]
pub struct Wire {
    /// The domain of the mirror at the destination, like `MIR0123ab`.
    pub vm: String,
    /// The source volume.
    pub source: String,
    /// The destination volume.
    pub destination: String,
    started: Instant,
    to_destination: AtomicU64,
    from_destination: AtomicU64,
    samples: Mutex<Vec<Sample>>,
}

/// How much had gone over a wire at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Since the connection was accepted.
    pub at: Duration,
    /// Bytes to the destination.
    pub to_destination: u64,
    /// Bytes from the destination.
    pub from_destination: u64,
}

impl Wire {
    fn new(vm: &str, source: &str, destination: &str) -> Self {
        Self {
            vm: vm.to_owned(),
            source: source.to_owned(),
            destination: destination.to_owned(),
            started: Instant::now(),
            to_destination: AtomicU64::new(0),
            from_destination: AtomicU64::new(0),
            samples: Mutex::default(),
        }
    }

    /// When the connection was accepted.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Bytes that went to the destination so far.
    #[must_use]
    pub fn to_destination(&self) -> u64 {
        self.to_destination.load(Ordering::Relaxed)
    }

    /// Bytes that came from the destination so far.
    #[must_use]
    pub fn from_destination(&self) -> u64 {
        self.from_destination.load(Ordering::Relaxed)
    }

    /// The counts over time, about ten a second while something moves, and one at the end.
    #[must_use]
    pub fn samples(&self) -> Vec<Sample> {
        lock(&self.samples).clone()
    }

    fn count(&self, outward: bool, bytes: u64) -> u64 {
        let counter = if outward { &self.to_destination } else { &self.from_destination };
        counter.fetch_add(bytes, Ordering::Relaxed);
        self.sample(SAMPLE_EVERY);
        self.to_destination() + self.from_destination()
    }

    /// Notes the counts, unless that was done less than `apart` ago.
    fn sample(&self, apart: Duration) {
        let at = self.started.elapsed();
        let mut samples = lock(&self.samples);
        if samples.last().is_none_or(|last| at >= last.at + apart) {
            let (to_destination, from_destination) = (self.to_destination(), self.from_destination());
            samples.push(Sample { at, to_destination, from_destination });
        }
    }
}

/// When a wire breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WireMoment {
    /// Before the server's first byte is passed on.
    Handshake,
    /// Once this many bytes have passed, both directions together.
    Bytes(u64),
    /// At [`Wires::tell`].
    Told,
}

/// How a wire breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WireHarm {
    /// Both ends see the connection closed.
    Cut,
    /// Nothing moves any more and nobody is told.
    Stall,
}

/// A break.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireFault {
    /// When.
    pub at: WireMoment,
    /// How.
    pub how: WireHarm,
}

type WireHook = Arc<dyn Fn(&Wire) -> Option<WireFault> + Send + Sync>;

/// All wires that leave a host; clones are the same.
#[derive(Clone)]
pub struct Wires {
    all: Arc<Mutex<Vec<Arc<Wire>>>>,
    hook: Arc<Mutex<Option<WireHook>>>,
    told: watch::Sender<u64>,
    /// Bytes a second in one direction, 0 for no limit.
    limit: Arc<AtomicU64>,
}

impl Default for Wires {
    fn default() -> Self {
        Self { all: Arc::default(), hook: Arc::default(), told: watch::Sender::new(0), limit: Arc::default() }
    }
}

impl fmt::Debug for Wires {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Wires").field(&lock(&self.all)).finish()
    }
}

impl Wires {
    /// Every wire there ever was, oldest first.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Wire>> {
        lock(&self.all).clone()
    }

    /// Lets a function decide how every wire opened from now on breaks.
    pub fn order(&self, hook: impl Fn(&Wire) -> Option<WireFault> + Send + Sync + 'static) {
        *lock(&self.hook) = Some(Arc::new(hook));
    }

    /// Wires opened from now on do not break.
    pub fn clear(&self) {
        *lock(&self.hook) = None;
    }

    /// Breaks the open wires that wait to be told.
    pub fn tell(&self) {
        self.told.send_modify(|n| *n += 1);
    }

    /// Limits every wire to this many bytes a second in each direction; `None` lifts the limit.
    pub fn limit(&self, bytes_per_second: Option<u64>) {
        self.limit.store(bytes_per_second.unwrap_or(0), Ordering::Relaxed);
    }

    /// Pumps between the plugin of this host and the other host until both have said all, or the order strikes.
    pub(super) async fn pump<N, F>(&self, vm: &str, source: &str, destination: &str, near: N, far: F)
    where
        N: AsyncRead + AsyncWrite + Unpin,
        F: AsyncRead + AsyncWrite + Unpin,
    {
        let wire = Arc::new(Wire::new(vm, source, destination));
        let hook = lock(&self.hook).clone();
        let fault = hook.and_then(|hook| hook(&wire));
        let mut told = self.told.subscribe();
        lock(&self.all).push(Arc::clone(&wire));

        let (near_read, near_write) = tokio::io::split(near);
        let (far_read, far_write) = tokio::io::split(far);
        let after = match fault.map(|f| f.at) {
            Some(WireMoment::Handshake) => Some(0),
            Some(WireMoment::Bytes(n)) => Some(n),
            _ => None,
        };
        let outward = Direction { wire: &wire, outward: true, break_after: after, limit: &self.limit };
        let inward = Direction { wire: &wire, outward: false, break_after: after, limit: &self.limit };
        let broken = {
            let both = async {
                let (a, b) = tokio::join!(outward.run(near_read, far_write), inward.run(far_read, near_write));
                a || b
            };
            tokio::pin!(both);
            match fault {
                None => both.await,
                Some(fault) => tokio::select! {
                    // A stalled direction never ends; a cut one ends the pump at once.
                    broken = &mut both => broken,
                    () = first_break(&wire, after, fault) => true,
                    _ = told.changed(), if fault.at == WireMoment::Told => {
                        if fault.how == WireHarm::Stall {
                            std::future::pending::<()>().await;
                        }
                        true
                    }
                },
            }
        };
        wire.sample(Duration::ZERO);
        tracing::debug!(vm, source, broken, to = wire.to_destination(), "wire closed");
    }
}

/// Ends once the bytes of the order have passed, unless the order is to stall.
async fn first_break(wire: &Wire, after: Option<u64>, fault: WireFault) {
    let Some(after) = after else { return std::future::pending().await };
    loop {
        let passed = wire.to_destination() + wire.from_destination();
        // At the handshake nothing has passed yet, so that the first byte offered is what counts.
        if fault.how == WireHarm::Cut && passed >= after && (after > 0 || wire.offered()) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

impl Wire {
    fn offered(&self) -> bool {
        !lock(&self.samples).is_empty()
    }

    fn offer(&self) {
        let mut samples = lock(&self.samples);
        if samples.is_empty() {
            samples.push(Sample { at: self.started.elapsed(), to_destination: 0, from_destination: 0 });
        }
    }
}

struct Direction<'a> {
    wire: &'a Wire,
    outward: bool,
    break_after: Option<u64>,
    limit: &'a AtomicU64,
}

impl Direction<'_> {
    /// Copies until the end of the file, then says so to the other side. True if it broke.
    async fn run<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(&self, mut from: R, mut to: W) -> bool {
        let mut buffer = vec![0; BUFFER];
        loop {
            let count = match from.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(count) => count,
            };
            self.wire.offer();
            let mut allowed = count;
            if let Some(after) = self.break_after {
                let passed = self.wire.to_destination() + self.wire.from_destination();
                allowed = count.min(usize::try_from(after.saturating_sub(passed)).unwrap_or(usize::MAX));
            }
            if to.write_all(&buffer[..allowed]).await.is_err() {
                break;
            }
            self.wire.count(self.outward, allowed as u64);
            if allowed < count {
                // The break itself is the pump's; this direction only holds its breath.
                std::future::pending::<()>().await;
            }
            let limit = self.limit.load(Ordering::Relaxed);
            if let Some(pause) = (count as u64 * 1_000_000).checked_div(limit) {
                tokio::time::sleep(Duration::from_micros(pause)).await;
            }
        }
        let _ = to.shutdown().await;
        false
    }
}
