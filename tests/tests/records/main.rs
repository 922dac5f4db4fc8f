//! Records of older versions are understood and go on to be used, and newer ones are refused, by every call.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod newer;
mod older;
mod running;

use std::collections::BTreeSet;
use std::fs;

use older::{ALL, Site, files};
use serde_json::{Value, json};

/// Sees that each tree is written in the oldest format that can hold it, so that older versions go on to read it.
fn in_the_oldest_format(site: &Site) {
    for (path, tree) in site.trees() {
        let has = |field: &str| {
            tree.get(field).is_some_and(|value| !value.as_object().is_some_and(serde_json::Map::is_empty))
        };
        let any =
            |of: &str, field: &str| tree[of].as_object().unwrap().values().any(|item| item.get(field).is_some());
        let oldest = match () {
            () if has("merge") => 5,
            () if any("volumes", "importing") => 4,
            () if any("nodes", "content") => 3,
            () if ["composed", "scratch", "history"].into_iter().any(has) || any("volumes", "data_destroyed") => 2,
            () => 1,
        };
        assert_eq!(tree["format"], oldest, "{}: {tree}", path.display());
    }
}

/// Goes through the life of an SR that an older version left.
fn goes_on(version: &str) {
    let site = Site::of(version);
    let expected = &site.expected;
    let formats: BTreeSet<_> = site.trees().values().map(|tree| tree["format"].as_u64().unwrap()).collect();
    assert_eq!(formats.into_iter().collect::<Vec<_>>(), expected.formats, "the files are what they are said to be");

    site.attach();
    let listed = site.call("SR.ls", json!({}));
    let keys: BTreeSet<&str> =
        listed.as_array().unwrap().iter().map(|volume| volume["key"].as_str().unwrap()).collect();
    let known: BTreeSet<&str> = expected.contents.keys().map(String::as_str).collect();
    assert!(known.is_subset(&keys), "{:?} are not listed", known.difference(&keys));
    // A snapshot that was begun may have been ended, and a volume that was to go may still be there.
    for volume in listed.as_array().unwrap().iter().filter(|volume| !known.contains(volume["key"].as_str().unwrap()))
    {
        assert!(volume["name"] == "switched" || volume["name"] == "being composed onto", "{volume}");
    }
    let named = listed.as_array().unwrap().iter().find(|volume| volume["key"] == site.volume("disk")).unwrap();
    assert_eq!((&named["name"], &named["keys"]["a key"]), (&json!("disk"), &json!("a value")));

    // What was begun is ended.
    in_the_oldest_format(&site);
    for (path, tree) in site.trees() {
        assert!(tree.get("intent").is_none(), "{}: {tree}", path.display());
    }
    // The claims of a host that died, and a merge that was begun.
    let repaired = site.output(&["check", site.path.to_str().unwrap(), "--repair"], &Value::Null);
    assert!(String::from_utf8_lossy(&repaired.stdout).contains("all is well"), "{repaired:?}");
    let gc = site.output(&["gc", &expected.sr], &Value::Null);
    assert!(gc.status.success(), "{gc:?}");
    let report = site.admin(&["check", site.path.to_str().unwrap()]);
    assert!(report.contains("all is well"), "{report}");
    assert!(site.trees().values().all(|tree| tree.get("merge").is_none()));
    for (volume, content) in &expected.contents {
        if let Some(content) = content {
            assert_eq!(site.content(volume), *content, "volume {volume}");
        }
    }

    let disk = site.volume("disk");
    let snapshot = site.snapshot(disk);
    site.call("Volume.set_name", json!({"key": disk, "new_name": "renamed"}));
    in_the_oldest_format(&site);
    site.datapath(&["attach", "activate"], disk, "9");
    site.io(disk, "write -P 99 0 64k");
    site.io(disk, "read -P 3 256k 64k");
    site.datapath(&["deactivate", "detach"], disk, "9");
    assert_eq!(Some(&site.content(&snapshot)), expected.contents[disk].as_ref());
    if let Some(destroyed) = expected.named.get("destroyed") {
        let changed = json!({"key": destroyed, "key2": site.volume("tracked"), "offset": 0, "length": 1 << 20});
        let changed = site.call("Volume.list_changed_blocks", changed);
        assert!(changed["bitmap"].as_str().is_some_and(|bitmap| bitmap.starts_with("IA")), "{changed}");
    }
    if let Some(importing) = expected.named.get("importing") {
        let request = json!({"uri": site.uri(importing), "domain": "9"});
        site.call("Datapath.attach", request.clone());
        assert!(site.try_call("Datapath.activate", request.clone()).is_err(), "its import never ended");
        site.call("Datapath.detach", request);
    }
    site.call("Volume.destroy", json!({"key": snapshot}));
    site.call("SR.detach", json!({}));
}

/// A test for each version.
macro_rules! versions {
    ($($name:ident: $version:literal,)*) => {
        $(#[test]
        fn $name() {
            goes_on($version);
        })*

        #[test]
        fn every_version_that_left_files_is_tried() {
            let tried = BTreeSet::from([$($version),*]);
            let there = fs::read_dir(files("")).unwrap().map(|entry| entry.unwrap().path());
            let there = there.filter(|path| path.is_dir()).map(|path| path.file_name().unwrap().to_str().unwrap().to_owned());
            assert_eq!(there.collect::<BTreeSet<_>>(), tried.iter().map(ToString::to_string).collect());
            assert_eq!(tried, BTreeSet::from(ALL));
            let intents: BTreeSet<String> = tried.iter().flat_map(|version| Site::of(version).expected.intents.clone()).collect();
            assert_eq!(intents.into_iter().collect::<Vec<_>>(), ["compose", "merge", "relink", "resize", "switch"]);
        }
    };
}

versions! {
    an_sr_of_format_1_goes_on: "533b700",
    an_sr_of_format_2_goes_on: "73da036",
    an_sr_of_format_3_goes_on: "e2fd61c",
    an_sr_of_format_4_goes_on: "b874d62",
    an_sr_of_format_5_goes_on_in_the_middle_of_a_merge: "422c3de-merge",
    an_sr_of_format_5_goes_on_after_a_merge: "422c3de-relink",
    an_sr_of_format_6_goes_on_after_a_merge_under_a_guest: "a5ce434-open",
}
