//! The page of a migration, looked at by a real browser: what is on it, what the console says, how it is laid out.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod browser;
mod crowd;

use std::path::Path;
use std::process::Command;

use browser::Browser;
use serde_json::json;

/// Names that would be something else than text on a page that takes them as they are.
const NAMES: [&str; 5] = [
    "<script>window.struck = 1</script>",
    "\"'></title></svg></style><img src=x onerror=\"window.struck = 2\">",
    "&lt;b&gt; & \\ \u{202e}desrever\u{2069} \u{7} مرحبا 日本語日本語日本語日本語日本語日本語日本語日本語日本語日本語",
    "</text><a href=\"javascript:window.struck = 3\">x</a><!--",
    "a very long name that has no end, so that it is cut where there is no room for it and whole where there is; \
     a very long name that has no end, and_a_part_without_any_blank_in_which_a_line_could_be_broken_by_itself_at_all",
];

/// A small disk with a branch, under a guest, whose snapshots have these names.
fn plan() -> String {
    let mut steps = Vec::new();
    for (index, name) in NAMES.iter().enumerate() {
        steps.push(json!({"write": {"offset": index * 262_144, "length": 196_608, "seed": index + 1}}));
        steps.push(json!({ "snapshot": name }));
        if index == 2 {
            steps.push(json!({ "revert": NAMES[0] }));
        }
    }
    json!({"size": 8 << 20, "steps": steps, "guest": {"writes_per_second": 300}}).to_string()
}

/// Migrates by the program, as people do; gives whether it ended well and the page.
fn migrated(directory: &Path, name: &str, arguments: &[&str]) -> (bool, std::path::PathBuf) {
    let (plan_file, page) = (directory.join("a <b>plan & more.json"), directory.join(format!("{name}.html")));
    std::fs::write(&plan_file, plan()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_fake-xapi"));
    command.arg("migrate").arg("--plan").arg(&plan_file).arg("--report").arg(&page).args(arguments);
    let output = command.output().unwrap();
    assert!(page.exists(), "{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.success(), page)
}

/// What is on a page that a browser shows, once it has nothing to complain of.
fn shown(browser: &mut Browser, page: &Path) -> String {
    let size = std::fs::metadata(page).unwrap().len();
    assert!(size < 1 << 20, "the page has {size} bytes");
    browser.open(page);
    assert_eq!(browser.noise(), [""; 0]);
    assert_eq!(browser.looks(), [""; 0]);
    assert!(browser.print() > 10_000);
    let facts = "({struck: window.struck ?? null, scripts: document.scripts.length, images: document.images.length, \
         comments: document.documentElement.outerHTML.includes('<!--'), \
         links: [...document.links].filter((a) => !document.querySelector(a.getAttribute('href'))).length})";
    let expected = json!({"struck": null, "scripts": 1, "images": 0, "comments": false, "links": 0});
    assert_eq!(browser.evaluate(facts), expected);
    assert_eq!(browser.noise(), [""; 0]);
    browser.evaluate("document.body.textContent").as_str().unwrap().to_owned()
}

#[test]
fn a_migration_is_shown_whatever_its_volumes_are_called() {
    let directory = tempfile::tempdir().unwrap();
    let (ok, page) = migrated(directory.path(), "done", &[]);
    assert!(ok);
    let mut browser = Browser::start();
    let text = shown(&mut browser, &page);
    for name in NAMES {
        assert!(text.contains(&name.replace('\u{7}', "\u{fffd}")), "{name} is not on the page");
    }
    assert!(text.contains("Migration of a <b>plan & more.json by the flow tree"), "{text}");
    for words in
        ["Everything holds.", "downtime", "the VM did not run", "✓ identical", "Volume.snapshot", "99 of 100"]
    {
        assert!(text.contains(words), "{words} is not on the page");
    }
    // Six nodes at each side, six mirrors, calls on both hosts, and one guest's latencies.
    let count = |browser: &mut Browser, what: &str| {
        browser.evaluate(&format!("document.querySelectorAll('{what}').length")).as_u64().unwrap()
    };
    assert_eq!(count(&mut browser, "#trees .snapshot, #trees .leaf"), 12);
    assert_eq!(count(&mut browser, "#mirrors .so-far"), 6);
    assert_eq!(count(&mut browser, "#properties .good"), 5);
    assert!(count(&mut browser, "#latency .worst") >= 2);
    assert!(count(&mut browser, "#calls figure [data-c]") > 40);
    assert!(count(&mut browser, "rect.down") >= 4);

    // A bar is told when it has the focus, and so is the next one.
    let detail = "document.getElementById('detail').textContent";
    browser.evaluate("document.querySelector('[data-c]').focus()");
    let first = browser.evaluate(detail);
    assert!(first.as_str().unwrap().contains("on host a"), "{first}");
    browser.press("ArrowRight");
    let second = browser.evaluate(detail);
    assert!(second != first && second.as_str().unwrap().contains("on host"), "{second}");
    browser.press("Escape");
    assert_eq!(browser.evaluate("document.getElementById('detail').hidden"), json!(true));
}

#[test]
fn a_migration_that_failed_is_shown_with_what_failed_and_what_was_cleaned_up() {
    let directory = tempfile::tempdir().unwrap();
    let (ok, page) = migrated(directory.path(), "failed", &["--fail", "destination:Volume.snapshot:2"]);
    assert!(!ok);
    let mut browser = Browser::start();
    let text = shown(&mut browser, &page);
    for words in [
        "The migration failed in the phase “mirror”.",
        "INJECTED [\"Volume.snapshot\", \"instead of running\"]",
        "made to fail: FailInstead",
        "xapi’s own clean-up left nothing for anybody to destroy.",
        "Volume.destroy on host b",
        "not judged",
        "The VM went on at the source",
    ] {
        assert!(text.contains(words), "{words} is not on the page");
    }
    let facts = "[document.querySelectorAll('#calls .cross').length, \
         document.querySelector('#problems a').hash === '#' + document.querySelector('tr.bad').id, \
         document.querySelectorAll('#properties .bad').length, document.querySelectorAll('.empty').length]";
    assert_eq!(browser.evaluate(facts), json!([1, true, 0, 1]));
}

#[test]
fn a_page_about_thousands_of_everything_stays_small_and_in_its_place() {
    let directory = tempfile::tempdir().unwrap();
    let page = directory.path().join("crowd.html");
    let (report, story) = crowd::crowd();
    std::fs::write(&page, fake_xapi::page::render(&report, &story)).unwrap();
    let text = shown(&mut Browser::start(), &page);
    // The worst of all moments, the one call that took longest, and how much is not shown.
    for words in ["at most 31,337 ms", "77,777", "rows are not here", "more are not drawn", "are drawn."] {
        assert!(text.contains(words), "{words} is not on the page");
    }
}

#[test]
fn what_is_wrong_with_a_page_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let page = directory.path().join("wrong.html");
    let wrong = "<!doctype html><meta charset=utf-8><title>x</title><body style='background:#fff'>\
        <p style='width:3000px;color:#999'>wide and faint</p><img src=nowhere.png>\
        <div style='height:900px;break-inside:avoid'></div>\
        <svg role=img width=100 height=50><text x=90 y=20>sticking out</text><text x=95 y=22>over</text></svg>\
        <script>console.log('said'); throw new Error('thrown')</script>";
    std::fs::write(&page, wrong).unwrap();
    let mut browser = Browser::start();
    browser.open(&page);
    let (noise, looks) = (browser.noise().join("\n"), browser.looks().join("\n"));
    for words in ["said", "thrown", "nowhere.png"] {
        assert!(noise.contains(words), "{words}: {noise}");
    }
    for words in ["the page is", "sticks out of its drawing", "lies on", "contrast", "not to be broken"] {
        assert!(looks.contains(words), "{words}: {looks}");
    }
}
