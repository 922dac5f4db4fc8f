//! One damage at a time: it is found and named, and put right where that is promised, without a byte of any volume changed.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use uuid::Uuid;

use crate::program::{assert_well, check};
use crate::scene::{Copy, Random, random_sr};
use crate::support::{Bench, Host};

/// What is to become of a damage.
#[derive(Clone, Copy, PartialEq)]
enum End {
    /// A repair puts it right.
    Repaired,
    /// A person has to.
    Left,
}

/// A kind of damage: what it is, what becomes of it, and how it is done; gives the file that has to be named.
type Damage = (&'static str, End, fn(&Copy, &mut Random) -> PathBuf);

/// Those that only a look into the images finds.
const INSIDE: [&str; 2] = ["clusters that are taken and not used", "reference counts that are too small"];

const DAMAGES: &[Damage] = &[
    ("a record cut off", End::Repaired, |sr, random| {
        let path = random.pick(&sr.files("tree.json")).clone();
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..random.below(bytes.len() - 1)]).unwrap();
        path
    }),
    ("a record of garbage", End::Repaired, |sr, random| {
        let path = random.pick(&sr.files("tree.json")).clone();
        fs::write(&path, (0..random.below(5000)).map(|_| random.below(256) as u8).collect::<Vec<_>>()).unwrap();
        path
    }),
    ("a record that is gone", End::Repaired, |sr, random| removed(random.pick(&sr.files("tree.json")))),
    ("a record that means nothing", End::Repaired, |sr, random| {
        edited(random.pick(&sr.trees()), |record| record["volumes"] = json!({}))
    }),
    ("a newer record", End::Left, |sr, random| {
        edited(random.pick(&sr.trees()), |record| record["format"] = json!(99))
    }),
    ("a newer record cut off", End::Left, |sr, random| {
        let path = random.pick(&sr.files("tree.json")).clone();
        fs::write(&path, "{\"format\":99,\"nodes\":").unwrap();
        path
    }),
    ("an SR's record cut off", End::Left, |sr, random| {
        let path = sr.path.join("sr.json");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..random.below(bytes.len() - 1)]).unwrap();
        path
    }),
    ("a symlink that is gone", End::Repaired, |sr, random| removed(random.pick(&sr.links()))),
    ("a symlink to another tree", End::Repaired, |sr, random| {
        let link = random.pick(&sr.links()).clone();
        let tree = fs::canonicalize(&link).unwrap();
        let other = sr.trees().into_iter().find(|other| *other != tree).unwrap();
        relinked(&link, &Path::new("../trees").join(other.file_name().unwrap()))
    }),
    ("a symlink to a tree that is gone", End::Repaired, |sr, random| {
        relinked(random.pick(&sr.links()), &PathBuf::from(format!("../trees/{}", Uuid::new_v4())))
    }),
    ("a symlink out of the SR", End::Repaired, |sr, random| relinked(random.pick(&sr.links()), Path::new("/etc"))),
    ("a symlink of no volume", End::Repaired, |sr, random| {
        let tree = random.pick(&sr.trees()).clone();
        let link = sr.path.join("volumes").join(Uuid::new_v4().to_string());
        symlink(Path::new("../trees").join(tree.file_name().unwrap()), &link).unwrap();
        link
    }),
    ("a symlink of no volume out of the SR", End::Repaired, |sr, _| {
        let link = sr.path.join("volumes").join(Uuid::new_v4().to_string());
        symlink("/etc", &link).unwrap();
        link
    }),
    ("a directory in a symlink's place", End::Left, |sr, random| {
        let link = removed(random.pick(&sr.links()));
        fs::create_dir(&link).unwrap();
        link
    }),
    ("no symlinks at all", End::Repaired, |sr, _| {
        let volumes = sr.path.join("volumes");
        fs::remove_dir_all(&volumes).unwrap();
        volumes
    }),
    ("a file of no node", End::Repaired, |sr, random| {
        let path = random.pick(&sr.trees()).join(format!("{}.qcow2", Uuid::new_v4()));
        fs::copy(random.pick(&sr.files(".qcow2")), &path).unwrap();
        path
    }),
    ("a record that was not finished", End::Repaired, |sr, random| {
        let path = random.pick(&sr.trees()).join(".new-abc");
        fs::write(&path, "{").unwrap();
        path
    }),
    ("a tree that was not finished", End::Repaired, |sr, random| {
        let path = sr.path.join(format!("trees/.{}-{}", random.pick(&["new", "old"]), Uuid::new_v4()));
        fs::create_dir(&path).unwrap();
        fs::write(path.join("lock"), "").unwrap();
        path
    }),
    ("something else among the trees", End::Left, |sr, _| {
        let path = sr.path.join("trees/notes");
        fs::create_dir(&path).unwrap();
        path
    }),
    ("a file that others may read", End::Repaired, |sr, random| {
        let suffix = *random.pick(&[".qcow2", "tree.json", "spare"]);
        let path = random.pick(&sr.files(suffix)).clone();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        path
    }),
    ("an image that is gone", End::Left, |sr, random| removed(random.pick(&sr.files(".qcow2")))),
    ("a symlink in an image's place", End::Left, |sr, random| {
        let path = removed(random.pick(&sr.files(".qcow2")));
        symlink("/etc/passwd", &path).unwrap();
        path
    }),
    ("an image cut off in its header", End::Left, |sr, random| {
        let path = random.pick(&sr.files(".qcow2")).clone();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(random.below(100) as u64).unwrap();
        path
    }),
    ("a header with another size", End::Left, |sr, random| {
        patched(random.pick(&sr.files(".qcow2")), 24, &(8_u64 << 20).to_be_bytes())
    }),
    ("a header with a feature that is not known", End::Left, |sr, random| {
        patched(random.pick(&sr.files(".qcow2")), 72, &(1_u64 << 40).to_be_bytes())
    }),
    ("a header that says corrupt", End::Left, |sr, random| {
        patched(random.pick(&sr.files(".qcow2")), 72, &2_u64.to_be_bytes())
    }),
    ("a header with an internal snapshot", End::Left, |sr, random| {
        patched(random.pick(&sr.files(".qcow2")), 60, &1_u32.to_be_bytes())
    }),
    ("a header with another backing file", End::Repaired, |sr, random| {
        let path = random.pick(&sr.files(".qcow2")).clone();
        let name = random.pick(&["elsewhere.qcow2", "/etc/passwd"]);
        let mut rebase = Command::new("qemu-img");
        rebase.args(["rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", name]).arg(&path);
        assert!(rebase.status().unwrap().success());
        path
    }),
    ("clusters that are taken and not used", End::Repaired, |sr, random| {
        let path = random.pick(&sr.files(".qcow2")).clone();
        let clusters = fs::metadata(&path).unwrap().len().div_ceil(cluster(&path));
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len((clusters + 1) * cluster(&path)).unwrap();
        patched(&path, 2 * cluster(&path) + 2 * clusters, &1_u16.to_be_bytes())
    }),
    ("reference counts that are too small", End::Left, |sr, random| {
        let path = random.pick(&sr.files(".qcow2")).clone();
        patched(&path, 2 * cluster(&path) + 2 * 3, &0_u16.to_be_bytes())
    }),
    ("no record of changes", End::Left, |sr, random| removed(random.pick(&sr.files(".changed.json")))),
    ("a record of changes cut off", End::Left, |sr, random| {
        let path = random.pick(&sr.files(".changed.json")).clone();
        fs::write(&path, "{\"format\":1,").unwrap();
        path
    }),
    ("no blocks set aside", End::Repaired, |sr, random| removed(random.pick(&sr.files("spare")))),
    ("a merge that was begun", End::Repaired, |sr, random| {
        let mut pairs: Vec<(PathBuf, String, String)> = Vec::new();
        for tree in sr.trees() {
            let record = Copy::record(&tree);
            let nodes = record["nodes"].as_object().unwrap();
            let is_named =
                |id: &String| record["volumes"].as_object().unwrap().values().any(|volume| volume["node"] == **id);
            for (lower, _) in nodes.iter().filter(|(id, _)| !is_named(id)) {
                let on: Vec<&String> =
                    nodes.iter().filter(|(_, node)| node["parent"] == **lower).map(|(id, _)| id).collect();
                if let [upper] = on[..] {
                    pairs.push((tree.clone(), lower.clone(), upper.clone()));
                }
            }
        }
        let (tree, lower, upper) = random.pick(&pairs).clone();
        edited(tree, |record| {
            record["format"] = json!(4);
            record["merge"] = json!({"lower": lower, "upper": upper, "direction": "up"});
        })
    }),
    ("a resize that was begun", End::Repaired, |sr, random| {
        edited(random.pick(&sr.trees()), |record| {
            let (key, node) = some_volume(record);
            record["intent"] = json!({"resize": {"volume": key, "node": node, "virtual_size": 64 << 20}});
        })
    }),
];

fn removed(path: impl AsRef<Path>) -> PathBuf {
    fs::remove_file(&path).unwrap();
    path.as_ref().to_owned()
}

fn relinked(link: impl AsRef<Path>, target: &Path) -> PathBuf {
    fs::remove_file(&link).unwrap();
    symlink(target, &link).unwrap();
    link.as_ref().to_owned()
}

fn patched(path: impl AsRef<Path>, offset: u64, bytes: &[u8]) -> PathBuf {
    fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(bytes, offset).unwrap();
    path.as_ref().to_owned()
}

fn edited(tree: impl AsRef<Path>, change: impl FnOnce(&mut Value)) -> PathBuf {
    let tree = tree.as_ref();
    let mut record = Copy::record(tree);
    change(&mut record);
    let path = tree.join("tree.json");
    fs::write(&path, record.to_string()).unwrap();
    path
}

/// Gives a volume that has data, and its node.
fn some_volume(record: &Value) -> (String, Value) {
    let volumes = record["volumes"].as_object().unwrap();
    let with_data = |(_, volume): &(&String, &Value)| record["nodes"].get(volume["node"].as_str().unwrap()).is_some();
    let (key, volume) = volumes.iter().find(with_data).unwrap();
    (key.clone(), volume["node"].clone())
}

/// Reads the size of an image's clusters.
fn cluster(path: &Path) -> u64 {
    let mut bits = [0; 4];
    fs::File::open(path).unwrap().read_exact_at(&mut bits, 20).unwrap();
    1 << u32::from_be_bytes(bits)
}

/// Sees that a damage is found by a line that names the file.
fn found(host: &Host, sr: &Copy, name: &str, place: &Path, options: &[&str]) -> Value {
    let (status, report) = check(host, &sr.path, options);
    assert_eq!(status, 1, "{name}: {report:#}");
    let names = |finding: &Value| Path::new(finding["path"].as_str().unwrap()) == place;
    let findings = report["findings"].as_array().unwrap();
    assert!(findings.iter().any(names), "{name}: {} is not named: {report:#}", place.display());
    report
}

#[test]
fn every_damage_is_found_and_what_can_be_put_right_is() {
    let mut random = Random::new(1);
    let bench = random_sr(&mut random);
    let host = &bench.host;
    assert_well(host, &bench.path, &[]);
    // While one SR is attached, a copy of it is one too many.
    let copy = Copy::of(&bench, "copy");
    found(
        host,
        &copy,
        "a copy",
        &host.root.join(format!("run/xapi-storage-qcow2/srs/{}.json", bench.sr)),
        &["--fast"],
    );
    host.call("SR.detach", json!({"sr": bench.sr}));
    for (name, end, damage) in DAMAGES {
        let sr = Copy::of(&bench, "copy");
        let before = sr.content();
        let place = damage(&sr, &mut random);
        // What is inside the images is compared where the damage is not in one.
        let is_image = place.extension().is_some_and(|extension| extension == "qcow2");
        let options: &[&str] = if INSIDE.contains(name) { &["--repair"] } else { &["--repair", "--fast"] };
        let report = found(host, &sr, name, &place, &options[1..]);
        let (status, repaired) = check(host, &sr.path, options);
        match end {
            End::Repaired => {
                assert_eq!((status, &repaired["findings"]), (0, &json!([])), "{name}: {repaired:#}");
                assert!(!repaired["repaired"].as_array().unwrap().is_empty(), "{name}");
                assert_well(host, &sr.path, &["--fast"]);
                if is_image {
                    sound(&sr);
                } else {
                    assert!(sr.content() == before, "{name}");
                }
            }
            End::Left => {
                assert_eq!(status, 1, "{name}: {repaired:#}");
                let left = &repaired["findings"];
                let kept =
                    |finding: &Value| left.as_array().unwrap().iter().any(|other| other["path"] == finding["path"]);
                assert!(report["findings"].as_array().unwrap().iter().any(kept), "{name}: {repaired:#}");
            }
        }
    }
}

/// Sees that every image is sound with all it lies on, by its own header.
fn sound(sr: &Copy) {
    for file in sr.files(".qcow2") {
        let output = Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(&file).output().unwrap();
        assert!(output.status.success(), "{}: {output:?}", file.display());
    }
}

#[test]
fn a_claim_that_nothing_stands_behind_is_taken_back_and_another_hosts_is_not() {
    let bench = Bench::new();
    let volume = bench.create(1 << 20);
    let tree = bench.tree_directory(&volume);
    let inventory = fs::read_to_string(bench.host.root.join("etc/xensource-inventory")).unwrap();
    let this = inventory.split('\'').nth(1).unwrap();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    for boot_id in [boot.trim(), &Uuid::new_v4().to_string()] {
        let claims = json!([{"host": this, "boot_id": boot_id, "mode": "rw"}]);
        edited(&tree, |record| record["volumes"][&volume]["active"] = claims);
        fs::set_permissions(tree.join("tree.json"), fs::Permissions::from_mode(0o600)).unwrap();
        let (status, report) = check(&bench.host, &bench.path, &["--fast"]);
        assert!(status == 1 && report["findings"][0]["what"].as_str().unwrap().contains(&volume), "{report:#}");
        assert_eq!(check(&bench.host, &bench.path, &["--fast", "--repair"]).0, 0);
        assert_eq!(bench.tree(&volume)["volumes"][&volume].get("active"), None);
    }
    let claims = json!([{"host": Uuid::new_v4(), "boot_id": Uuid::new_v4(), "mode": "rw"}]);
    edited(&tree, |record| record["volumes"][&volume]["active"] = claims.clone());
    assert_well(&bench.host, &bench.path, &["--repair"]);
    assert_eq!(bench.tree(&volume)["volumes"][&volume]["active"], claims);
}
