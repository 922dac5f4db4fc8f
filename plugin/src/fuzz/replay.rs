//! The targets in an ordinary test: over the corpora in tests/fuzz, and over mutations of them.
//!
//! `FUZZ_ROUNDS` says how many mutations a target is given, `FUZZ_SEED` which.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use super::{TARGETS, run};

/// What inputs are made of beside each other: numbers at the edges, and words that somebody waits for.
const WORDS: &[&[u8]] = &[
    &[0],
    &[0xff],
    &[0x7f, 0xff, 0xff, 0xff],
    &[0xff; 8],
    &[0x80, 0, 0, 0, 0, 0, 0, 0],
    &[0, 0, 0, 1],
    &[0, 0, 0, 7],
    b"QFI\xfb",
    b"NBDMAGIC",
    b"IHAVEOPT",
    &[0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9],
    &[0x25, 0x60, 0x95, 0x13],
    &[0x67, 0x44, 0x66, 0x98],
    b"\n",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b",",
    b":",
    b"\\u0000",
    b"null",
    b"-1",
    b"1e999",
    b"18446744073709551616",
    b"\"error\":{\"class\":\"GenericError\",\"desc\":\"x\"}",
    b"\"format\":1",
    b"%2e%2e/",
    b"--json",
];

/// A generator of numbers that are as good as random (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Gives a number below `limit`, which is not zero.
    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// Gives the files of a target's corpus, in order.
fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus").join(target);
    let mut paths: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

/// Makes an input of another.
fn mutated(numbers: &mut Numbers, seeds: &[(PathBuf, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = seeds[numbers.below(seeds.len())].1.clone();
    for _ in 0..=numbers.below(4) {
        let at = numbers.below(bytes.len() + 1);
        let until = (at + numbers.below(32)).min(bytes.len());
        match numbers.below(8) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..until)),
            2 => drop(bytes.splice(at..at, WORDS[numbers.below(WORDS.len())].iter().copied())),
            3 => {
                let word = WORDS[numbers.below(WORDS.len())];
                bytes.splice(at..(at + word.len()).min(bytes.len()), word.iter().copied());
            }
            4 => {
                let other = &seeds[numbers.below(seeds.len())].1;
                bytes.splice(at.., other[numbers.below(other.len() + 1)..].iter().copied());
            }
            5 => {
                let part = bytes[at..until].to_vec();
                bytes.splice(at..at, part);
            }
            _ if at < bytes.len() => bytes[at] ^= 1 << numbers.below(8),
            _ => {}
        }
    }
    bytes
}

/// Runs a target, and keeps an input by which it fails.
fn tried(target: &str, input: &[u8]) {
    if catch_unwind(AssertUnwindSafe(|| run(target, input))).is_err() {
        let mut hasher = DefaultHasher::new();
        input.hash(&mut hasher);
        let kept = std::env::temp_dir().join(format!("fuzz-{target}-{:016x}", hasher.finish()));
        fs::write(&kept, input).unwrap();
        panic!("target {target} fails on {}: copy it to tests/fuzz/corpus/{target} to try it again", kept.display());
    }
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

/// Replays a target's corpus, and tries mutations of it.
fn replay(target: &str, rounds: u64) {
    let seeds = corpus(target);
    assert!(!seeds.is_empty(), "{target} has no corpus");
    for (path, input) in &seeds {
        assert!(catch_unwind(|| run(target, input)).is_ok(), "target {target} fails on {}", path.display());
    }
    let mut numbers = Numbers(number("FUZZ_SEED", 1));
    for _ in 0..number("FUZZ_ROUNDS", rounds) {
        tried(target, &mutated(&mut numbers, &seeds));
    }
}

#[test]
fn no_image_is_taken_for_what_it_is_not() {
    replay("image", 2000);
}

#[test]
fn a_record_is_read_as_it_was_written_or_refused() {
    replay("record", 3000);
}

#[test]
fn no_nbd_server_confuses_the_client() {
    replay("nbd_client", 4000);
}

#[test]
fn no_nbd_client_confuses_the_server() {
    replay("nbd_server", 4000);
}

#[test]
fn a_relay_neither_adds_nor_loses_a_byte() {
    replay("nbd_relay", 4000);
}

#[test]
fn a_monitor_may_say_anything() {
    replay("qmp", 400);
}

#[test]
fn every_call_has_one_answer() {
    replay("request", 3000);
}

#[test]
fn each_target_has_a_corpus_and_each_corpus_a_target() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus");
    let mut found: Vec<String> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    found.sort();
    let mut targets: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
    targets.sort_unstable();
    assert_eq!(found, targets);
}
