//! The target `record` of `plugin::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| plugin::fuzz::run("record", input));
