//! The manual: every command in README.md, docs/ and the manual pages is run, as far as that goes without xapi.
//!
//! The plugins, the administrator's program and the tools of the system are the real ones, on a host and an SR of their own.
//! `xe` is a stand-in (`xe.py`) that takes xapi's forms only and calls the plugins. Of what takes minutes, or would change this
//! machine, only the form is checked: `make`'s targets, the packages, tests and options that are named have to be there.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod commands;

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use commands::{Commands, commands, documents, forms, top};

const OWN: [&str; 4] =
    ["xapi-storage-qcow2", "xapi-storage-qcow2-volume", "xapi-storage-qcow2-datapath", "fake-xapi"];

/// Checks the form of what is not run: `$0` says which program it is in place of.
const STAND_IN: &str = r#"#!/bin/sh
set -eu
fail() { echo "${0##*/}: $*" >&2; exit 1; }
case ${0##*/} in
    make) exec /usr/bin/make -n -C "$TOP" "$@" >/dev/null ;;
    cargo)
        [ "$1" = build ] || [ "$1" = test ] || fail "no such command: $1"
        while [ $# -gt 0 ]; do
            case $1 in
                -p) grep -q "^name = \"$2\"" "$TOP"/*/Cargo.toml || fail "no package $2" ;;
                --test) [ -e "$TOP/tests/tests/$2.rs" ] || [ -e "$TOP/tests/tests/$2/main.rs" ] || fail "no test $2" ;;
            esac
            shift
        done ;;
    rpm)
        version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$TOP/Cargo.toml")
        [ "$*" = "-Uvh xapi-storage-qcow2-$version-1.x86_64.rpm" ] || fail "not the package: $*" ;;
    xe-toolstack-restart) [ $# -eq 0 ] || fail "takes nothing" ;;
    systemctl | journalctl)
        for word in "$@"; do
            case $word in
                list-units | -u | -f | -t | xapi-storage-qcow2 | QCOW2_*=*) ;;
                xapi-storage-qcow2-*)
                    ls "$TOP/packaging/systemd/${word%%@*}"* >/dev/null 2>&1 || [ "$word" = 'xapi-storage-qcow2-*' ] \
                        || fail "no unit $word" ;;
                *) fail "what is $word?" ;;
            esac
        done ;;
    fake-xapi)
        help=$(fake-xapi.real "$1" --help)
        for word in "$@"; do
            case $word in
                --*) printf '%s\n' "$help" | grep -q -e "^ *$word\b" || fail "$1 has no $word" ;;
            esac
        done ;;
    *.sh | *.py) [ -x "$TOP/packaging/${0##*/}" ] || fail "not there"
        for word in "$@"; do grep -q "\b$word)" "$TOP/packaging/${0##*/}" || fail "no $word"; done ;;
    *) fail "what is this?" ;;
esac
"#;

/// A host on which the commands are run, one after the other.
struct World {
    directory: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("fx-").tempdir_in("/tmp").unwrap();
        let world = Self { directory };
        for name in ["bin", "h/run", "h/etc", "sr", "other", "w/packaging", "w/target/debug"] {
            std::fs::create_dir_all(world.at(name)).unwrap();
        }
        std::fs::write(
            world.at("h/etc/xensource-inventory"),
            "INSTALLATION_UUID='11111111-1111-1111-1111-111111111111'\n",
        )
        .unwrap();
        for name in OWN {
            let from = Path::new(env!("CARGO_BIN_EXE_fake-xapi")).with_file_name(name);
            symlink(from, world.at(&format!("bin/{}", if name == "fake-xapi" { "fake-xapi.real" } else { name })))
                .unwrap();
        }
        symlink(top().join("tests/tests/manual/xe.py"), world.at("bin/xe")).unwrap();
        let stand_ins = ["make", "cargo", "rpm", "systemctl", "journalctl", "xe-toolstack-restart", "fake-xapi"]
            .map(|name| format!("bin/{name}"));
        let scripts = std::fs::read_dir(top().join("packaging")).unwrap().map(|entry| entry.unwrap().file_name());
        let scripts = scripts.map(|name| format!("w/packaging/{}", name.to_str().unwrap()));
        for name in stand_ins.into_iter().chain(scripts.filter(|name| name.ends_with(".sh") || name.ends_with(".py")))
        {
            std::fs::write(world.at(&name), STAND_IN).unwrap();
            std::fs::set_permissions(world.at(&name), PermissionsExt::from_mode(0o755)).unwrap();
        }
        world.stand_for_xapi();
        world
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The stand-in's host and VM, and another SR with a volume that nobody needs.
    fn stand_for_xapi(&self) {
        let state = r#"{"host": "11111111-1111-1111-1111-111111111111", "vm": "22222222-2222-2222-2222-222222222222",
            "disks": [], "srs": {}, "pbds": {}}"#;
        std::fs::write(self.at("state"), state).unwrap();
        let other = "OTHER_SR=$(xe sr-create type=qcow2 name-label=other device-config:uri=file:///mnt/other)\n\
            LEFT=$(xe vdi-create sr-uuid=$OTHER_SR name-label=left virtual-size=1MiB)\n\
            sed -i \"s/\\\"$LEFT\\\"//\" $XE_STATE\n";
        self.run(other, "the other SR").unwrap();
    }

    /// Runs commands as root's shell would; what variables they set is there for the next ones.
    fn run(&self, text: &str, title: &str) -> Result<(), String> {
        let place = |name: &str| self.at(name).display().to_string();
        let text = text
            .replace("/mnt/fast", &place("sr"))
            .replace("/mnt/other", &place("other"))
            .replace("/run/xapi-storage-qcow2", &place("h/run/xapi-storage-qcow2"));
        let variables = place("variables");
        let script = format!(
            "set -eu\ntouch {variables}\n. {variables}\n{text}\nset >{variables}.new\n\
             grep -E '^(SR|VDI|PBD|OTHER_SR|LEFT)=' {variables}.new >{variables}\n"
        );
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", place("bin"));
        let output = Command::new("/bin/sh")
            .args(["-c", &script])
            .env_clear()
            .envs([("PATH", path), ("XE_STATE", place("state")), ("TOP", top().display().to_string())])
            .envs([("XAPI_STORAGE_QCOW2_ROOT", place("h")), ("HOST", "11111111-1111-1111-1111-111111111111".into())])
            .envs([("VM", "22222222-2222-2222-2222-222222222222"), ("MASTER", "192.0.2.1"), ("PASSWORD", "a word")])
            .current_dir(self.at("w"))
            .output()
            .unwrap();
        let told = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (stdout, stderr) = (told(&output.stdout), told(&output.stderr));
        output.status.success().then_some(()).ok_or_else(|| format!("{title}: {text}\n{stdout}{stderr}"))
    }
}

/// What has to be so before a block can be run, which its document says in words.
fn before(block: &Commands) -> &'static str {
    if block.text.contains("sr-introduce") {
        // The SR was made by README.md; here it comes from another machine.
        "xe pbd-unplug uuid=$(xe pbd-list sr-uuid=$SR --minimal)\nxe sr-forget uuid=$SR\n"
    } else if block.text.contains("flock lock python3") {
        "VOLUME=$VDI\n"
    } else if block.text.contains(">/mnt/fast/sr.json") {
        "UUID=$SR\n"
    } else {
        ""
    }
}

#[test]
fn every_command_in_the_documents_runs_or_has_the_form_that_its_program_takes() {
    let world = World::new();
    let blocks: Vec<Commands> = documents().iter().flat_map(|document| commands(document)).collect();
    assert!(blocks.len() > 40, "{} commands were found", blocks.len());
    for program in ["make", "xe ", "xapi-storage-qcow2 ", "xapi-storage-qcow2-volume", "fake-xapi", "rpm"] {
        assert!(blocks.iter().any(|block| block.text.contains(program)), "no {program} in the documents");
    }
    let failed: Vec<String> = blocks
        .iter()
        .filter_map(|block| {
            let title = format!("{}:{}", block.document, block.line);
            world.run(&format!("{}{}", before(block), block.text), &title).err()
        })
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn a_command_that_is_wrong_is_noticed() {
    let world = World::new();
    for wrong in [
        "make nonsense",
        "cargo test -p fake-xapi --test nonsense",
        "rpm -Uvh xapi-storage-qcow2-9.9.9-1.x86_64.rpm",
        "fake-xapi demo --nonsense",
        "systemctl list-units 'xapi-storage-qcow2-nonsense@*'",
        "journalctl -u nonsense",
        "packaging/dependencies.sh nonsense",
        "xapi-storage-qcow2 tree /mnt/nonsense",
        "xe sr-create type=qcow2 device-config:uri=file:///mnt/fast",
        "xe sr-create type=qcow2 name-label=x nonsense=1 device-config:uri=file:///mnt/fast",
        "xe sr-create type=qcow2 name-label=x device-config:url=file:///mnt/fast",
        "xe sr-scan $OTHER_SR",
        "xe vm-migrate uuid=$VM live=true",
        "xe nonsense",
    ] {
        assert!(world.run(wrong, "").is_err(), "{wrong} was taken");
    }
}

#[test]
fn every_form_of_a_command_has_the_options_that_the_program_has() {
    let help = |program: &str, arguments: &[&str]| {
        let path = Path::new(env!("CARGO_BIN_EXE_fake-xapi")).with_file_name(program);
        String::from_utf8(Command::new(path).args(arguments).arg("--help").output().unwrap().stdout).unwrap()
    };
    let options = |text: &str| -> std::collections::BTreeSet<String> {
        let words = text.split(|c: char| c.is_whitespace() || "[]|,()".contains(c));
        words.filter(|word| word.len() > 2 && word.starts_with("--")).map(str::to_owned).collect()
    };
    let (mut found, own) = (0, help("xapi-storage-qcow2", &[]));
    for document in documents() {
        for form in forms(&document, "xapi-storage-qcow2 ") {
            let line = own
                .lines()
                .find(|line| form.split(' ').nth(1).is_some_and(|word| line.contains(&format!(" {word} "))));
            assert_eq!(Some(options(&form)), line.map(options), "{}: {form}", document.display());
            found += 1;
        }
        for form in forms(&document, "fake-xapi ") {
            let there = options(&help("fake-xapi", &[form.split(' ').nth(1).unwrap()]));
            let named = options(&form);
            assert!(named.is_subset(&there), "{}: {form}: {there:?}", document.display());
            found += 1;
        }
    }
    assert!(found > 6, "{found} forms were found");
    // The manual page of fake-xapi has every option there is.
    let page = std::fs::read_to_string(top().join("packaging/man/fake-xapi.1")).unwrap();
    for command in ["demo", "migrate", "conformance", "bench"] {
        for option in options(&help("fake-xapi", &[command])).iter().filter(|option| *option != "--help") {
            assert!(
                page.contains(&format!("Fl Fl {}", &option[2..])),
                "{command} {option} is not in the manual page"
            );
        }
    }
    let page = std::fs::read_to_string(top().join("packaging/man/xapi-storage-qcow2.8")).unwrap();
    for option in options(&own) {
        assert!(page.contains(&format!("Fl Fl {}", &option[2..])), "{option} is not in the manual page");
    }
}

#[test]
fn every_setting_is_in_its_manual_page_and_in_the_operators_manual() {
    let source = std::fs::read_to_string(top().join("plugin/src/host/settings.rs")).unwrap();
    let fields = source.lines().filter_map(|line| {
        let (name, _) = line.trim().strip_prefix("pub ")?.split_once(": ")?;
        name.chars().all(|c| c.is_ascii_lowercase() || c == '_').then_some(name)
    });
    let fields: Vec<&str> = fields.collect();
    let page = std::fs::read_to_string(top().join("packaging/man/xapi-storage-qcow2.json.5")).unwrap();
    let manual = std::fs::read_to_string(top().join("docs/operations.md")).unwrap();
    assert!(fields.contains(&"drain_seconds") && fields.contains(&"verify"), "{fields:?}");
    for field in fields {
        assert!(page.contains(&format!(".It Cm {field}\n")), "{field} is not in the manual page");
        assert!(manual.contains(&format!("| `{field}` |")), "{field} is not in docs/operations.md");
    }
}

#[test]
fn the_manual_pages_are_without_fault() {
    let mandoc = "/usr/bin/mandoc";
    assert!(Path::new(mandoc).exists(), "no mandoc here: packaging/dependencies.sh test installs it");
    let pages = documents().into_iter().filter(|path| path.parent().unwrap().ends_with("man"));
    let pages: Vec<PathBuf> = pages.collect();
    assert!(pages.len() > 4, "{pages:?}");
    let lint = |page: &Path| {
        let output = Command::new(mandoc).args(["-Tlint", "-W", "warning"]).arg(page).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    for page in pages {
        let text = std::fs::read_to_string(&page).unwrap();
        match text.strip_prefix(".so ") {
            // Another name of a page.
            Some(other) => assert!(page.with_file_name(other.trim().rsplit('/').next().unwrap()).exists(), "{text}"),
            None => assert_eq!(lint(&page), ""),
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let wrong = directory.path().join("wrong.8");
    std::fs::write(&wrong, ".Dd November 23, 2026\n.Dt WRONG 8\n.Os\n.Sh NAME\n.Nx\n.Nonsense\n").unwrap();
    assert!(lint(&wrong).contains("skipping unknown macro"), "{}", lint(&wrong));
}
