//! The target `image` of `plugin::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| plugin::fuzz::run("image", input));
