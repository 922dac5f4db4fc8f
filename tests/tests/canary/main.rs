//! A canary for secrets: strings that were sent wherever a caller can send one are looked for wherever one could come out.
//!
//! Every method of both plugins is called, as a real executable on real SRs, with gc, mirrors, an import and a block device
//! going on, and with umask 0. Which string may come out where is [`words::WORDS`], as docs/operations.md has it; all that was
//! executed meanwhile, arguments and environment, is in strace's records. Everything is logged that can be.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "../seeing/listener.rs"]
mod listener;
mod places;
mod site;
mod tour;
mod words;

use site::Site;
use words::Place;

#[test]
fn no_secret_comes_out_anywhere_and_nothing_below_run_is_open_to_others() {
    let site = Site::new();
    tour::all(&site);
    site.logged();
    site.traced();
    site.executed(&[
        "/qemu-img\"",
        "/qemu-storage-daemon\"",
        "\"gc\"",
        "\"mirror-supervisor\"",
        "\"import-relay\"",
        if site.has_devices { "\"device-server\"" } else { "" },
    ]);
    let missed: Vec<String> = site.listed().difference(&site.called()).cloned().collect();
    assert!(missed.is_empty(), "{missed:?} were not called, or never well");
    let (found, seen) = site.verdict();
    assert!(found.is_empty(), "{}", found.join("\n"));
    // What was not looked at was not clean.
    for place in [
        Place::Answer,
        Place::Refusal,
        Place::Stderr,
        Place::Log,
        Place::Span,
        Place::Runtime,
        Place::Failures,
        Place::Executed,
        Place::Process,
        Place::Diagnostics,
        Place::Status,
        Place::Tree,
        Place::Check,
    ] {
        assert!(seen.contains(&place), "nothing was found at {place:?}");
    }
    for name in places::NAMES {
        assert!(site.has_seen_file(name), "{name} was not looked at");
    }
}

#[test]
fn a_word_where_it_may_not_be_is_found() {
    let word = words::WORDS.iter().find(|word| word.what == "a device-config's password").unwrap();
    let text = format!("x{}y", word.text);
    assert_eq!(words::judge(Place::Answer, "SR.create", text.as_bytes()), Vec::<String>::new());
    assert_eq!(words::judge(Place::Log, "SR.create", text.as_bytes()).len(), 1);
    assert_eq!(words::judge(Place::Answer, "SR.stat", text.as_bytes()).len(), 1);
}
