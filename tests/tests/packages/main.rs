//! The RPM and the .deb in a root of their own: what they install, upgrade in the middle of a migration, and remove.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, clippy::print_stdout, reason = "a test talks to people")]

mod booted;
mod scratch;
mod service;
#[path = "../world/mod.rs"]
mod world;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use fake_xapi::host::{Host, PluginSource};
use fake_xapi::script::CallLog;
use fake_xapi::smapiv2::Sr;
use fake_xapi::sxm::{Event, Flow};
use scratch::{Kind, Scratch, build, old_build, package, plugins, run};
use world::{BRANCHES, World};

const DBG: &str = "OpaqueRef:packages";
/// What xapi-storage-script watches, with the packages installed.
const WATCHED: [&str; 4] = ["datapath", "datapath/qsd", "volume", "volume/org.xen.xapi.storage.qcow2"];
/// The volume that is on its way when the package is upgraded: the second of the tree flow is mirrored for a snapshot,
/// from a daemon and by a supervisor of the old package.
const UPGRADED_AT: u32 = 2;

/// Only root may change its root directory, own files as root, and be asked by package managers to.
fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("skipped: only root installs packages");
    }
    is_root
}

fn words(list: &[&str]) -> BTreeSet<String> {
    list.iter().map(|word| (*word).to_owned()).collect()
}

fn inodes(root: &Path) -> [u64; 2] {
    plugins(root).map(|directory| fs::metadata(directory).unwrap().ino())
}

/// What a host's plugins have running, but for scripts: daemons and supervisors.
fn daemons(host: &Host) -> BTreeSet<u32> {
    let stays = |command: &str| command.contains("qemu-storage-daemon") || command.contains("mirror-supervisor");
    host.leftovers().processes.into_iter().filter(|(_, command)| stays(command)).map(|(pid, _)| pid).collect()
}

async fn life(kind: Kind) -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let files = tempfile::tempdir()?;
    let older = package(kind, &old_build(), 1, files.path())?;
    let newer = package(kind, &build(), 2, files.path())?;
    let scratch = Arc::new(Scratch::new(kind)?);

    scratch.install(&older).context("installation")?;
    ensure!(scratch.watched() == words(&WATCHED), "installed: {:?}", scratch.watched());
    upgrade_in_the_middle(&scratch, &newer).await?;
    ensure!(scratch.watched() == words(&WATCHED), "upgraded: {:?}", scratch.watched());
    removal(&scratch).await
}

/// Upgrades while a tree is on its way: what runs goes on, and the migration ends as one that nothing disturbed.
async fn upgrade_in_the_middle(scratch: &Arc<Scratch>, newer: &Path) -> Result<()> {
    let mut world = World::installed(scratch.root(), BRANCHES, Flow::Tree).await?;
    let before = inodes(scratch.root());
    let outcome = Arc::new(Mutex::new(None));
    let (seen, started) = (Arc::clone(&outcome), AtomicU32::new(0));
    let (root, package) = (Arc::clone(scratch), newer.to_owned());
    let hosts = [Arc::clone(&world.stage.source), Arc::clone(&world.stage.destination)];
    world.player.at(move |event| {
        if matches!(event, Event::Started { .. }) && started.fetch_add(1, Ordering::SeqCst) + 1 == UPGRADED_AT {
            let running = || hosts.iter().flat_map(|host| daemons(host)).collect::<BTreeSet<u32>>();
            let before = running();
            let installed = root.install(&package);
            // A mirror may have ended meanwhile; the guest's daemon has not.
            let gone: Vec<u32> = before.difference(&running()).copied().collect();
            *seen.lock().unwrap() = Some((installed, before.len(), gone.len()));
        }
    });
    world.migrate_well().await.context("a migration with an upgrade in the middle")?;
    let (installed, running, gone) = outcome.lock().unwrap().take().context("the package was never upgraded")?;
    installed.context("upgrade")?;
    ensure!(running >= 2 && gone < running, "{running} daemons ran, of which {gone} are gone");
    let after = inodes(scratch.root());
    ensure!(before.iter().zip(after).all(|(old, new)| *old != new), "a directory was not exchanged");
    Ok(())
}

/// Removes the package: in vain while an SR is attached on the host, then with everything.
async fn removal(scratch: &Scratch) -> Result<()> {
    let host = Host::start("c", scratch.root(), &PluginSource::at(scratch.root()), &CallLog::default()).await?;
    let sr = Sr(uuid::Uuid::new_v4().to_string());
    let path = scratch.root().join("sr");
    fs::create_dir(&path)?;
    let config = [("uri".to_owned(), format!("file://{}", path.display()))];
    let config = host.sr_create(DBG, "qcow2", &sr, &config, "sr", "").await?;
    host.sr_attach(DBG, "qcow2", &sr, &config).await?;
    let before = inodes(scratch.root());
    let refused = scratch.remove().expect_err("it was removed while an SR was attached").to_string();
    ensure!(refused.contains(&sr.0) && refused.contains("pbd-unplug"), "{refused}");
    ensure!(scratch.watched() == words(&WATCHED), "after the refusal: {:?}", scratch.watched());
    // Debian's package manager has the package configure itself again.
    ensure!(scratch.kind() == Kind::Deb || inodes(scratch.root()) == before, "the refusal changed something");
    host.sr_detach(DBG, &sr).await?;
    host.close();
    scratch.remove()?;
    ensure!(scratch.watched() == words(&["datapath", "volume"]), "removed: {:?}", scratch.watched());
    let remains: Vec<_> =
        scratch.remains().into_iter().filter(|path| !path.ends_with("etc/xapi-storage-qcow2.json")).collect();
    ensure!(remains.is_empty(), "removed, but {remains:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_rpm_is_installed_upgraded_in_the_middle_of_a_migration_and_removed_once_nothing_is_attached() {
    life(Kind::Rpm).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deb_is_installed_upgraded_in_the_middle_of_a_migration_and_removed_once_nothing_is_attached() {
    life(Kind::Deb).await.unwrap();
}

#[test]
fn executables_that_need_shared_libraries_are_not_packed() {
    let out = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/package.sh");
    let beside = Path::new(env!("CARGO_BIN_EXE_fake-xapi")).parent().unwrap();
    let output = Command::new(script).arg("deb").arg(out.path()).env("BUILD", beside).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("is not linked statically"), "{output:?}");
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
}

/// Both judges, run where the sources and everything that was built of them cannot be seen.
#[test]
#[ignore = "minutes: make sweep"]
fn conformance_and_the_demo_pass_from_an_installed_package_and_nothing_of_the_build_tree() {
    if !is_root() {
        return;
    }
    for kind in [Kind::Rpm, Kind::Deb] {
        let files = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(kind).unwrap();
        scratch.install(&package(kind, &build(), 1, files.path()).unwrap()).unwrap();
        drop(files);
        let judge = scratch.root().join("fake-xapi");
        fs::copy(env!("CARGO_BIN_EXE_fake-xapi"), &judge).unwrap();
        let hidden = fs::canonicalize(Path::new(env!("CARGO_MANIFEST_DIR")).join("..")).unwrap();
        let script = "mount -t tmpfs tmpfs \"$1\" && [ ! -e \"$1/Cargo.toml\" ] && shift && cd / && exec \"$@\"";
        let installed = |arguments: &[&str]| {
            let mut command = Command::new("unshare");
            command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]).arg(&hidden).arg(&judge);
            run(command.args(arguments).arg("--root").arg(scratch.root())).unwrap()
        };
        installed(&["conformance", "--volume", "qcow2", "--config", "uri=file://{dir}"]);
        for flow in ["tree", "base", "leaf"] {
            installed(&["demo", "--flow", flow]);
        }
    }
}
