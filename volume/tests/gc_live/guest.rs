//! A guest that writes one block of 4 KiB after the other over NBD, and knows what its disk has to hold.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What it writes at once, in bytes.
pub const UNIT: u64 = 4096;

/// How often it flushes.
const FLUSH_EVERY: u64 = 64;

/// A connection to an export.
struct Nbd {
    stream: UnixStream,
    handle: u64,
}

impl Nbd {
    fn connect(socket: &Path, export: &str) -> Self {
        let mut stream = UnixStream::connect(socket).unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        let mut hello = vec![0, 0, 0, 3];
        // NBD_OPT_GO without any information asked.
        hello.extend(b"IHAVEOPT\0\0\0\x07");
        hello.extend(u32::try_from(export.len() + 6).unwrap().to_be_bytes());
        hello.extend(u32::try_from(export.len()).unwrap().to_be_bytes());
        hello.extend(export.as_bytes());
        hello.extend([0, 0]);
        stream.write_all(&hello).unwrap();
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head).unwrap();
            let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
            let length = u32::from_be_bytes(head[16..20].try_into().unwrap());
            stream.read_exact(&mut vec![0; length as usize]).unwrap();
            if kind == 1 {
                return Self { stream, handle: 0 };
            }
            assert_eq!(kind, 3, "the export is refused");
        }
    }

    /// Makes a request; `None` when the connection has ended.
    fn ask(&mut self, command: u16, offset: u64, data: &[u8], answer: &mut [u8]) -> Option<()> {
        self.handle += 1;
        let length = if answer.is_empty() { data.len() } else { answer.len() };
        let mut request = vec![0x25, 0x60, 0x95, 0x13, 0, 0];
        request.extend(command.to_be_bytes());
        request.extend(self.handle.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(u32::try_from(length).unwrap().to_be_bytes());
        request.extend(data);
        self.stream.write_all(&request).ok()?;
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).ok()?;
        assert_eq!(head[4..8], [0; 4], "request {command} at {offset} failed");
        self.stream.read_exact(answer).ok()
    }
}

/// What a block may hold.
#[derive(Clone, Debug)]
struct Block {
    /// What a flush has covered.
    durable: u64,
    /// What was written since.
    later: Vec<u64>,
}

/// What a disk has to hold, by block; a block is one number over and over.
#[derive(Clone, Debug, Default)]
pub struct Model {
    blocks: BTreeMap<u64, Block>,
    /// What it held at first.
    before: Vec<u8>,
    next: u64,
}

impl Model {
    /// Starts from what a disk holds.
    pub fn of(before: Vec<u8>) -> Self {
        Self { before, ..Self::default() }
    }

    fn expected(&self, at: u64) -> Option<u64> {
        self.blocks.get(&at).map(|block| block.later.last().copied().unwrap_or(block.durable))
    }

    fn flushed(&mut self) {
        for block in self.blocks.values_mut() {
            block.durable = block.later.last().copied().unwrap_or(block.durable);
            block.later.clear();
        }
    }

    /// Gives what a disk has to hold from now on whose daemon has died, by what it was found to hold.
    pub fn after_death(&self, found: &[u8]) -> Self {
        Self { blocks: BTreeMap::new(), before: found.to_vec(), next: self.next }
    }

    /// Sees that a disk holds what was written; with `all` everything, else at least what was flushed.
    pub fn assert_holds(&self, found: &[u8], all: bool) {
        assert_eq!(found.len(), self.before.len());
        for (at, (found, before)) in found.chunks(4096).zip(self.before.chunks(4096)).enumerate() {
            match self.blocks.get(&(at as u64)) {
                None => assert!(found == before, "block {at} was not written to and has changed"),
                Some(block) => {
                    let number = u64::from_be_bytes(found[..8].try_into().unwrap());
                    let latest = block.later.last().copied().unwrap_or(block.durable);
                    let is_old = !all && block.durable == 0 && found == before;
                    let is_known =
                        number == latest || (!all && (number == block.durable || block.later.contains(&number)));
                    assert!(
                        is_old || (is_known && found == filled(number)),
                        "block {at} holds {number:x} instead of {block:?}"
                    );
                }
            }
        }
    }
}

fn filled(number: u64) -> Vec<u8> {
    number.to_be_bytes().repeat(512)
}

/// What a guest has gone through.
pub struct Account {
    /// What its disk has to hold.
    pub model: Model,
    /// How many requests it made.
    pub requests: u64,
    /// The longest that one took.
    pub longest: Duration,
    /// Whether its disk has gone away under it.
    pub lost: bool,
}

/// A guest that writes until it is told to stop.
pub struct Guest {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Account>>,
}

impl Guest {
    /// Starts to write to the given part of a disk, in bytes. Now and then it reads what it wrote.
    pub fn start(socket: &Path, export: &str, model: Model, region: std::ops::Range<u64>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let nbd = Nbd::connect(socket, export);
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || write(nbd, model, region, &told));
        Self { stop, thread: Some(thread) }
    }

    /// Tells it to stop, and gives what it went through.
    pub fn end(mut self) -> Account {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Guest {
    /// Waits until its disk has gone away under it, and gives what it went through.
    pub fn bereft(mut self) -> Account {
        let account = self.thread.take().unwrap().join().unwrap();
        assert!(account.lost);
        account
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn write(mut nbd: Nbd, mut model: Model, region: std::ops::Range<u64>, stop: &AtomicBool) -> Account {
    let (first, count) = (region.start / UNIT, (region.end - region.start) / UNIT);
    let mut account = Account { model: Model::default(), requests: 0, longest: Duration::ZERO, lost: false };
    let mut random = 0x9e37_79b9_7f4a_7c15_u64 ^ model.next;
    model.next = model.next.max(1 << 32);
    while !stop.load(Ordering::Relaxed) && !account.lost {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let at = first + random % count;
        let began = Instant::now();
        let answered = match account.requests % FLUSH_EVERY {
            0 => nbd.ask(3, 0, &[], &mut []).map(|()| model.flushed()),
            1 => {
                let mut found = vec![0; 4096];
                let answered = nbd.ask(0, at * UNIT, &[], &mut found);
                if answered.is_some() {
                    let place = usize::try_from(at * UNIT).unwrap();
                    let expected =
                        model.expected(at).map_or_else(|| model.before[place..place + 4096].to_vec(), filled);
                    assert!(found == expected, "block {at} reads as {:x?}", &found[..8]);
                }
                answered
            }
            _ => {
                model.next += 1;
                let number = model.next;
                let block = model.blocks.entry(at).or_insert(Block { durable: 0, later: Vec::new() });
                block.later.push(number);
                nbd.ask(1, at * UNIT, &filled(number), &mut [])
            }
        };
        account.lost = answered.is_none();
        account.requests += 1;
        account.longest = account.longest.max(began.elapsed());
    }
    if !account.lost && nbd.ask(3, 0, &[], &mut []).is_some() {
        model.flushed();
        // NBD_CMD_DISC has no answer.
        let _ = nbd.stream.write_all(&[&[0x25, 0x60, 0x95, 0x13, 0, 0, 0, 2], &[0; 20][..]].concat());
    }
    account.model = model;
    account
}
