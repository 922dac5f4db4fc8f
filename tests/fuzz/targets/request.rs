//! The target `request` of `plugin::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| plugin::fuzz::run("request", input));
