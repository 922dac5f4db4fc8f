//! The writers of a guest and what they share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::time::MissedTickBehavior;

use super::latency::Histogram;
use super::ledger::{Ledger, Mark};
use super::record::{self, BLOCK};
use super::{Account, Settings};
use crate::nbd::{Client, Error};

/// How many errors are kept word for word.
const ERRORS_KEPT: usize = 8;
/// A guest does not ask again at once after an error that its disk answered.
const AFTER_ERROR: Duration = Duration::from_millis(20);

/// What the writers of one guest share.
#[derive(Debug)]
pub(super) struct Shared {
    stopping: AtomicBool,
    next_record: AtomicU64,
    first_start: Instant,
    memory: Mutex<Memory>,
}

#[derive(Debug)]
struct Memory {
    ledger: Ledger,
    latency: Histogram,
    /// When each writer's command in flight was sent.
    in_flight: Vec<Option<Instant>>,
    acknowledged: u64,
    flushes: u64,
    failed: u64,
    errors: Vec<String>,
    started: Option<Instant>,
    wrote_for: Duration,
}

impl Shared {
    pub(super) fn new(ledger: Ledger) -> Self {
        Self::from(ledger, 1)
    }

    pub(super) fn from(ledger: Ledger, next_record: u64) -> Self {
        let memory = Memory {
            ledger,
            latency: Histogram::default(),
            in_flight: Vec::new(),
            acknowledged: 0,
            flushes: 0,
            failed: 0,
            errors: Vec::new(),
            started: None,
            wrote_for: Duration::ZERO,
        };
        Self {
            stopping: AtomicBool::new(false),
            next_record: AtomicU64::new(next_record),
            first_start: Instant::now(),
            memory: Mutex::new(memory),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self) {
        self.lock().started = Some(Instant::now());
        self.stopping.store(false, Ordering::Release);
    }

    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    pub(super) fn end(&self) {
        let mut memory = self.lock();
        memory.in_flight.clear();
        if let Some(started) = memory.started.take() {
            memory.wrote_for += started.elapsed();
        }
    }

    pub(super) fn crashed(&self) {
        self.lock().ledger.crashed();
    }

    pub(super) fn first_start(&self) -> Instant {
        self.first_start
    }

    pub(super) fn closed(&self) {
        self.lock().ledger.closed();
    }

    pub(super) fn next_record(&self) -> u64 {
        self.next_record.load(Ordering::Relaxed)
    }

    pub(super) fn acknowledged(&self) -> u64 {
        self.lock().acknowledged
    }

    pub(super) fn waiting(&self) -> Duration {
        self.lock().waiting()
    }

    pub(super) fn ledger(&self) -> Ledger {
        self.lock().ledger.clone()
    }

    /// Gives a copy of the ledger, which from now on forgets nothing, or again what is not needed.
    pub(super) fn ledger_that_keeps(&self, keeps: bool) -> Ledger {
        let ledger = &mut self.lock().ledger;
        ledger.keep(keeps);
        ledger.clone()
    }

    pub(super) fn account(&self) -> Account {
        let memory = self.lock();
        let running = memory.started.map(|started| started.elapsed()).unwrap_or_default();
        Account {
            acknowledged: memory.acknowledged,
            flushes: memory.flushes,
            failed: memory.failed,
            errors: memory.errors.clone(),
            seconds: (memory.wrote_for + running).as_secs_f64(),
            latency: memory.latency.summary(memory.waiting()),
        }
    }
}

impl Memory {
    fn waiting(&self) -> Duration {
        self.in_flight.iter().flatten().map(Instant::elapsed).max().unwrap_or_default()
    }

    fn sent(&mut self, writer: usize) {
        if self.in_flight.len() <= writer {
            self.in_flight.resize(writer + 1, None);
        }
        self.in_flight[writer] = Some(Instant::now());
    }

    fn answered(&mut self, writer: usize, first_start: Instant) {
        if let Some(sent) = self.in_flight.get_mut(writer).and_then(Option::take) {
            self.latency.add(first_start.elapsed(), sent.elapsed());
        }
    }

    fn failed(&mut self, error: &Error) {
        self.failed += 1;
        if self.errors.len() < ERRORS_KEPT {
            self.errors.push(error.to_string());
        }
    }
}

/// One writer: never more than one command in flight, on blocks that only it writes.
pub(super) struct Writer {
    index: usize,
    settings: Settings,
    shared: Arc<Shared>,
    client: Client,
    random: u64,
}

impl Writer {
    pub(super) fn new(index: usize, settings: &Settings, shared: Arc<Shared>, client: Client) -> Self {
        // Never zero, which would stay zero.
        let random = (settings.seed ^ (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1;
        Self { index, settings: settings.clone(), shared, client, random }
    }

    pub(super) async fn run(mut self) {
        let mut pace = self.settings.writes_per_second.map(|rate| {
            let each = |commands: usize| Duration::from_secs_f64(commands as f64 / rate.max(1) as f64);
            let first = tokio::time::Instant::now() + each(self.index);
            let mut pace = tokio::time::interval_at(first, each(self.settings.depth));
            pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
            pace
        });
        loop {
            if let Some(pace) = &mut pace {
                tokio::select! {
                    _ = pace.tick() => {}
                    () = self.stopped() => {}
                }
            }
            if self.shared.stopping.load(Ordering::Acquire) {
                return;
            }
            match self.command().await {
                Ok(()) => {}
                Err(error) if error.is_fatal() => return,
                Err(_) => tokio::time::sleep(AFTER_ERROR).await,
            }
        }
    }

    /// Returns soon after the guest was stopped, so that a slow guest does not sleep through it.
    async fn stopped(&self) {
        while !self.shared.stopping.load(Ordering::Acquire) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn command(&mut self) -> Result<(), Error> {
        let number = self.shared.next_record.fetch_add(1, Ordering::Relaxed);
        let every = self.settings.flush_every;
        if every > 0 && number.is_multiple_of(every) {
            self.flush().await?;
        }
        let block = self.next_block();
        let offset = self.settings.region.offset + block as u64 * BLOCK;
        let mark = self.next_mark(number);
        {
            let mut memory = self.shared.lock();
            memory.ledger.begin(block, mark);
            memory.sent(self.index);
        }
        let result = match mark {
            Mark::Record(number) => {
                self.client.write(offset, Bytes::from(record::make(number, offset, self.settings.seed))).await
            }
            Mark::Zeroes => self.client.write_zeroes(offset, BLOCK as u32).await,
            Mark::Trimmed => self.client.trim(offset, BLOCK as u32).await,
        };
        let mut memory = self.shared.lock();
        memory.answered(self.index, self.shared.first_start);
        match &result {
            Ok(()) => {
                memory.acknowledged += 1;
                memory.ledger.acknowledge(block);
            }
            Err(error) => memory.failed(error),
        }
        result
    }

    async fn flush(&mut self) -> Result<(), Error> {
        let coverage = {
            let mut memory = self.shared.lock();
            memory.sent(self.index);
            memory.ledger.coverage()
        };
        let result = self.client.flush().await;
        let mut memory = self.shared.lock();
        memory.answered(self.index, self.shared.first_start);
        match &result {
            Ok(()) => {
                memory.flushes += 1;
                memory.ledger.flushed(coverage);
            }
            Err(error) => memory.failed(error),
        }
        result
    }

    /// One of this writer's own blocks: every `depth`-th of the region.
    fn next_block(&mut self) -> usize {
        let blocks = (self.settings.region.length / BLOCK) as usize;
        let own = (blocks - self.index).div_ceil(self.settings.depth);
        self.index + (self.next_random() as usize % own) * self.settings.depth
    }

    fn next_mark(&mut self, number: u64) -> Mark {
        let draw = self.next_random();
        if self.settings.zeroes && draw.is_multiple_of(32) {
            Mark::Zeroes
        } else if self.settings.trims && draw % 64 == 1 {
            Mark::Trimmed
        } else {
            Mark::Record(number)
        }
    }

    /// George Marsaglia's xorshift64.
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random >> 8
    }
}
