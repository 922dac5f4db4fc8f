//! A migration on one page of HTML that needs nothing but itself: for screens, for paper, for those who listen.
//!
//! ```text
//! verdict and figures ── what went wrong ── properties ── trees ── calls over time ── mirrors ── guests ── every call
//! ```
//!
//! Everything is there without its script, which only shows what the pointer or the focus is on. Charts share their
//! horizontal axis. However much happened, the page stays small: what is joined or left out is said where it is, and lines
//! keep their smallest and largest values. Whatever a volume is called, it is text on the page and nothing else.

mod axis;
mod calls;
mod fold;
mod latency;
mod markup;
mod mirrors;
mod summary;
mod trees;

use axis::Axis;
use markup::text;

use crate::report::Report;
use crate::story::Story;

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");
/// Of exactly this script, so that no other runs; a browser says so in its console if it is not.
const SCRIPT_HASH: &str = "sha256-EmAW5+wshjjpD9HMZdrlvoUFgegkIeLrLMIHE/e6pjw=";

/// Patterns that all drawings share.
const PATTERNS: &str = "<svg width=\"0\" height=\"0\" style=\"position:absolute\" aria-hidden=\"true\"><defs>\
    <pattern id=\"down\" width=\"6\" height=\"6\" patternUnits=\"userSpaceOnUse\" patternTransform=\"rotate(45)\">\
    <rect width=\"6\" height=\"6\" class=\"down-ground\"/><rect width=\"2\" height=\"6\" class=\"down-line\"/></pattern>\
    <pattern id=\"judged\" width=\"5\" height=\"5\" patternUnits=\"userSpaceOnUse\">\
    <circle cx=\"1.5\" cy=\"1.5\" r=\"1\" class=\"judged-dot\"/></pattern></defs></svg>";

/// Makes the page of a run.
#[must_use]
pub fn render(report: &Report, story: &Story) -> String {
    let axis = Axis::new(0.0, story.ended);
    let title = format!("Migration of {} by the flow {}", story.title, report.flow);
    let sections = [
        summary::verdict(report, story),
        summary::problems(report, story),
        summary::properties(report, story),
        trees::section(report, story),
        calls::section(story, axis),
        mirrors::section(story, axis),
        latency::section(report, story, axis),
        summary::phases(story),
        calls::table(story),
    ];
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; \
         script-src '{SCRIPT_HASH}'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{PATTERNS}\n\
         <header><h1>{heading}</h1></header>\n<main>\n{sections}</main>\n<footer>\
         <p>Times are milliseconds from the beginning of the migration. Written by fake-xapi {version}.</p></footer>\n\
         <p id=\"detail\" role=\"status\" hidden></p>\n<script>{SCRIPT}</script>\n</body>\n</html>\n",
        title = text(&title),
        heading = text(&title),
        sections = sections.concat(),
        version = env!("CARGO_PKG_VERSION"),
    )
}
