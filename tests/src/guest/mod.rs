//! A guest: it writes numbered, checksummed records to its disk and can tell later whether any acknowledged one is missing.
//!
//! ```text
//! Guest::start(uri) ─ writers ──► begin(block, record) ─ NBD write ─► acknowledge(block)      the ledger
//!        ▲                                                                                      │
//!        └── resume at the same or another disk ◄── suspend(): drains, disconnects              ▼
//!                                                            verify(export | raw image) ─► Verdict
//! ```
//!
//! A record is one block of 4 KiB: number, place, seed, filling, checksum. Each writer owns every n-th block of the region, so
//! that no block ever has two commands in flight and the order of its records is known.

mod latency;
mod ledger;
mod record;
mod verify;
mod writer;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::Serialize;
use tokio::task::JoinHandle;

use crate::nbd::{Client, Uri};
use crate::plan::Extent;

pub use latency::{Latency, Moment};
pub use ledger::{Durability, Ledger, Mark, Violation};
pub use record::BLOCK;
pub use verify::{Verdict, Verifier, verify_export, verify_raw};

use writer::{Shared, Writer};

/// How a guest writes.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The bytes it may write, whole blocks of 4 KiB.
    pub region: Extent,
    /// What makes its records and its choice of blocks its own.
    pub seed: u64,
    /// Writes a second; `None` is as fast as it can.
    pub writes_per_second: Option<u64>,
    /// How many commands it keeps in flight.
    pub depth: usize,
    /// Commands between two flushes; 0 never flushes.
    pub flush_every: u64,
    /// Whether one command in 32 zeroes its block instead.
    pub zeroes: bool,
    /// Whether one command in 64 trims its block instead.
    pub trims: bool,
}

impl Settings {
    /// As fast as it can, 16 commands in flight, a flush every 1,000 commands, now and then a zeroed block.
    pub fn new(region: Extent, seed: u64) -> Self {
        Self { region, seed, writes_per_second: None, depth: 16, flush_every: 1000, zeroes: true, trims: false }
    }
}

/// A guest, writing or suspended.
#[derive(Debug)]
pub struct Guest {
    settings: Settings,
    shared: Arc<Shared>,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    client: Client,
    writers: Vec<JoinHandle<()>>,
}

/// What a guest went through.
#[derive(Debug, Clone, Serialize)]
pub struct Account {
    /// Commands that were acknowledged, flushes not counted.
    pub acknowledged: u64,
    /// Flushes that were acknowledged.
    pub flushes: u64,
    /// Commands that failed.
    pub failed: u64,
    /// What the first failed commands said.
    pub errors: Vec<String>,
    /// Seconds that it was writing, suspensions not counted.
    pub seconds: f64,
    /// How long commands took.
    pub latency: Latency,
}

impl Guest {
    /// A guest that has not written yet.
    ///
    /// # Errors
    /// If the region is not whole blocks, or has fewer than there are commands in flight.
    pub fn new(settings: Settings) -> Result<Self> {
        let Extent { offset, length } = settings.region;
        ensure!(
            offset % BLOCK == 0 && length % BLOCK == 0,
            "the guest's region is not whole blocks of {BLOCK} bytes"
        );
        ensure!(settings.depth > 0, "a guest without commands in flight writes nothing");
        ensure!(
            length / BLOCK >= settings.depth as u64,
            "the guest's region has fewer blocks than commands in flight"
        );
        let ledger = Ledger::new(settings.region, settings.seed, settings.flush_every > 0);
        Ok(Self { settings, shared: Arc::new(Shared::new(ledger)), running: None })
    }

    /// A guest that goes on from what another knew, or knew once, of a disk; it writes no record that the other has written.
    ///
    /// # Errors
    /// As [`Guest::new`].
    pub fn succeeding(&self, ledger: Ledger) -> Result<Self> {
        let mut guest = Self::new(Settings { region: ledger.region(), ..self.settings.clone() })?;
        guest.shared = Arc::new(Shared::from(ledger, self.shared.next_record()));
        Ok(guest)
    }

    /// Gives a copy of what it remembers; it forgets nothing from now on, until [`Guest::after_snapshot`].
    pub fn before_snapshot(&self) -> Ledger {
        self.shared.ledger_that_keeps(true)
    }

    /// Gives a copy of what it remembers, with all since [`Guest::before_snapshot`]: what a snapshot that was taken between
    /// the two holds is [`Ledger::between`] them.
    pub fn after_snapshot(&self) -> Ledger {
        self.shared.ledger_that_keeps(false)
    }

    /// The disk was closed in an orderly way: all that was acknowledged is durable.
    pub fn closed(&mut self) {
        self.shared.closed();
    }

    /// Starts to write, or goes on after [`Guest::suspend`], there or on another disk.
    ///
    /// # Errors
    /// If the export cannot be had or is too small; or the guest is writing already.
    pub async fn start(&mut self, uri: &Uri) -> Result<()> {
        ensure!(self.running.is_none(), "the guest is writing already");
        let client = Client::connect(uri).await?;
        let size = client.export().size;
        ensure!(self.settings.region.end() <= size, "the guest's region ends behind the disk's {size} bytes");
        self.shared.begin();
        let writers = (0..self.settings.depth)
            .map(|index| {
                let writer = Writer::new(index, &self.settings, Arc::clone(&self.shared), client.clone());
                tokio::spawn(writer.run())
            })
            .collect();
        self.running = Some(Running { client, writers });
        Ok(())
    }

    /// Stops writing: nothing new is sent, what is in flight is waited for, the connection is closed. No flush is sent, as a
    /// suspended VM sends none. A guest that does not write is left alone.
    pub async fn suspend(&mut self) {
        self.shared.stop();
        if let Some(Running { client, writers }) = self.running.take() {
            for writer in writers {
                // A writer that panicked has left its command unacknowledged, which verifying allows for.
                let _ = writer.await;
            }
            client.disconnect().await;
            self.shared.end();
        }
    }

    /// Pulls the plug: the connection is cut and what is in flight stays unacknowledged.
    pub async fn cut(&mut self) {
        self.shared.stop();
        if let Some(Running { client, writers }) = self.running.take() {
            for writer in &writers {
                writer.abort();
            }
            for writer in writers {
                let _ = writer.await;
            }
            drop(client);
            self.shared.end();
        }
    }

    /// The disk's daemon was killed: the connection is cut, and what no flush covered may be lost.
    pub async fn crash(&mut self) {
        self.cut().await;
        self.shared.crashed();
    }

    /// Whether it was started and not suspended since.
    pub fn is_started(&self) -> bool {
        self.running.is_some()
    }

    /// Whether at least one writer still writes.
    pub fn is_writing(&self) -> bool {
        self.running.as_ref().is_some_and(|running| running.writers.iter().any(|writer| !writer.is_finished()))
    }

    /// How many commands were acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged()
    }

    /// When its series of latencies begins.
    pub fn first_start(&self) -> Instant {
        self.shared.first_start()
    }

    /// How long the oldest command in flight has been waiting.
    pub fn waiting(&self) -> Duration {
        self.shared.waiting()
    }

    /// What it went through so far; a command still in flight counts in the longest latency.
    pub fn account(&self) -> Account {
        self.shared.account()
    }

    /// A copy of what it remembers, to verify a disk against.
    pub fn ledger(&self) -> Ledger {
        self.shared.ledger()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.shared.stop();
        for writer in self.running.iter().flat_map(|running| &running.writers) {
            writer.abort();
        }
    }
}
