//! What is drawn of a tree.

use std::fs;

use serde_json::{Value, json};
use uuid::Uuid;

use crate::program::run;
use crate::support::{Bench, MIB};

#[test]
fn a_tree_is_drawn_with_its_hidden_nodes_as_text_as_json_and_for_graphviz() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    let name = "a \"name\"\nof two lines";
    bench.call("Volume.set_name", json!({"key": volume, "new_name": name}));
    let (hidden, kept) = (bench.snapshot(&volume), bench.snapshot(&volume));
    bench.call("Volume.enable_cbt", json!({"key": volume}));
    bench.destroy(&hidden);
    let other = bench.create(MIB);
    bench.host.call("SR.detach", json!({"sr": bench.sr}));
    let path = bench.path.to_str().unwrap();
    let files = || fs::read_dir(&bench.path).unwrap().count();
    let before = files();

    let text = run(&bench.host, &["tree", path]);
    assert_eq!(text.status, 0, "{}", text.complaint);
    for expected in
        [&volume, &kept, &other, "hidden", "└─", "a \\\"name\\\"\\nof", "4.0 MiB", "changed blocks tracked"]
    {
        assert!(text.text.contains(expected), "{expected}: {}", text.text);
    }
    let dot = run(&bench.host, &["tree", path, "--dot"]);
    assert!(dot.text.starts_with("digraph") && dot.text.matches("->").count() == 2, "{}", dot.text);
    let one = run(&bench.host, &["tree", path, &other]);
    assert!(one.text.contains(&other) && !one.text.contains(&volume), "{}", one.text);

    let json: Value = serde_json::from_str(&run(&bench.host, &["tree", path, &volume, "--json"]).text).unwrap();
    assert_eq!((&json["sr"], &json["path"]), (&json!(bench.sr), &json!(path)));
    let nodes = json["trees"][0]["nodes"].as_array().unwrap();
    assert_eq!(nodes.len(), 3);
    assert!(nodes[0]["hidden"] == json!(true) && nodes[0]["parent"] == Value::Null);
    for pair in nodes.windows(2) {
        assert_eq!(pair[1]["parent"], pair[0]["node"]);
    }
    let top = &nodes[2]["volume"];
    assert_eq!((&top["volume"], &top["name"], &top["cbt"]), (&json!(volume), &json!(name), &json!(true)));
    assert_eq!((&top["active"], nodes[2]["virtual_size"].as_u64()), (&json!([]), Some(4 * MIB)));
    assert!(nodes[2]["physical_size"].as_u64().unwrap() > 0);

    let absent = run(&bench.host, &["tree", path, &Uuid::new_v4().to_string()]);
    assert!(absent.status == 1 && absent.complaint.contains("does not exist"), "{}", absent.complaint);
    // One tree that cannot be read does not keep the others from being seen.
    fs::write(bench.tree_directory(&other).join("tree.json"), "{").unwrap();
    let torn = run(&bench.host, &["tree", path]);
    assert!(torn.text.contains("is damaged") && torn.text.contains(&volume), "{}", torn.text);
    assert_eq!(files(), before);
}
