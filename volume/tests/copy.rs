//! Volume.copy, compare and similar_content: volumes held against each other.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "a test says why it is skipped")]

mod support;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use plugin::activation;
use plugin::host::Host;
use plugin::id::{Domain, VolumeUri};
use plugin::store::Mode;
use serde_json::json;
use support::{Bench, MIB, assert_reads, key, names, write};

/// Copies a volume and gives the copy's key.
fn copy(bench: &Bench, volume: &str, destination: &Bench) -> String {
    key(&bench.call("Volume.copy", json!({"key": volume, "dest_sr": destination.sr})))
}

/// Sees that two chains read the same, by qemu-img.
fn assert_same(one: &Path, other: &Path) {
    let status = Command::new("qemu-img").args(["compare", "-U", "-q", "-s"]).args([one, other]).status().unwrap();
    assert!(status.success());
}

#[test]
fn a_copy_is_a_volume_of_its_own_with_the_same_content() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    bench.call("Volume.set_name", json!({"key": volume, "new_name": "disk"}));
    bench.call("Volume.set", json!({"key": volume, "k": "snapshot_of", "v": "x"}));
    bench.call("Volume.set", json!({"key": volume, "k": "vdi-type", "v": "user"}));
    bench.call("Volume.enable_cbt", json!({"key": volume}));
    write(&bench.node_file(&volume), 1, 0, MIB);
    let snapshot = bench.snapshot(&volume);
    write(&bench.node_file(&volume), 2, MIB, MIB);
    for source in [&volume, &snapshot] {
        let copied = copy(&bench, source, &bench);
        assert_ne!(bench.tree_directory(&copied), bench.tree_directory(source));
        assert_same(&bench.node_file(&copied), &bench.node_file(source));
        let record = bench.call("Volume.stat", json!({"key": copied}));
        assert_eq!(record["name"], json!("disk"));
        assert_eq!(record["keys"], json!({"vdi-type": "user"}));
        assert_eq!(record["cbt_enabled"], json!(false));
        bench.destroy(&copied);
    }
    let copied = copy(&bench, &volume, &bench);
    write(&bench.node_file(&copied), 3, 0, 4 * MIB);
    assert_reads(&bench.node_file(&volume), 1, 0, MIB);
    bench.destroy(&volume);
    bench.destroy(&snapshot);
    assert_reads(&bench.node_file(&copied), 3, 0, 4 * MIB);
    bench.check();
    // Nothing of the daemon that it was read through is left.
    assert!(names(&bench.host.root.join("run/xapi-storage-qcow2/volumes")).is_empty());
}

#[test]
fn a_copy_may_be_in_another_sr() {
    let (bench, mut other) = (Bench::new(), Bench::without_sr());
    // Both SRs are of one host.
    other.host.root.clone_from(&bench.host.root);
    other.create_sr();
    let volume = bench.create(4 * MIB);
    write(&bench.node_file(&volume), 1, MIB, MIB);
    let copied = copy(&bench, &volume, &other);
    assert_eq!(other.keys(), std::slice::from_ref(&copied));
    assert_eq!(bench.keys(), std::slice::from_ref(&volume));
    assert_same(&other.node_file(&copied), &bench.node_file(&volume));
    assert_eq!(bench.code("Volume.copy", json!({"key": volume, "dest_sr": "none"})), "Sr_not_attached");
    bench.check();
    other.check();
}

/// A file system whose files can share blocks, unmounted when this is dropped.
struct Sharing(PathBuf);

impl Sharing {
    /// Makes and mounts one; `None`, with the reason printed, where this process or kernel cannot.
    fn mount(directory: &Path) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can mount a file system");
            return None;
        }
        let (image, at) = (directory.join("image"), directory.join("xfs"));
        File::create(&image).unwrap().set_len(320 * MIB).unwrap();
        std::fs::create_dir(&at).unwrap();
        assert!(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&image).status().unwrap().success());
        let mounted = Command::new("mount").args(["-t", "xfs", "-o", "loop"]).args([&image, &at]).output().unwrap();
        if !mounted.status.success() {
            println!("skipped: XFS cannot be mounted here: {}", String::from_utf8_lossy(&mounted.stderr));
            return None;
        }
        Some(Self(at))
    }

    /// Gives the bytes that are in use, once everything is written back.
    fn used(&self) -> u64 {
        rustix::fs::syncfs(File::open(&self.0).unwrap()).unwrap();
        let space = rustix::fs::statvfs(&self.0).unwrap();
        (space.f_blocks - space.f_bfree) * space.f_frsize
    }
}

impl Drop for Sharing {
    fn drop(&mut self) {
        // Lazily: a failed test may have left something running.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn where_files_can_share_blocks_a_copy_of_a_chain_takes_no_space() {
    let directory = tempfile::Builder::new().prefix("vt-").tempdir_in("/tmp").unwrap();
    let Some(sharing) = Sharing::mount(directory.path()) else { return };
    let mut bench = Bench::without_sr();
    bench.path = sharing.0.join("sr");
    std::fs::create_dir(&bench.path).unwrap();
    bench.create_sr();
    let volume = bench.create(64 * MIB);
    write(&bench.node_file(&volume), 1, 0, 16 * MIB);
    let snapshot = bench.snapshot(&volume);
    write(&bench.node_file(&volume), 2, 8 * MIB, 16 * MIB);
    for source in [&volume, &snapshot] {
        let before = sharing.used();
        let copied = copy(&bench, source, &bench);
        let after = sharing.used();
        assert!(after < before + MIB, "a copy took {} bytes", after - before);
        assert_same(&bench.node_file(&copied), &bench.node_file(source));
        // Shared until written to.
        write(&bench.node_file(&copied), 3, 0, MIB);
        assert_reads(&bench.node_file(&snapshot), 1, 0, 16 * MIB);
        bench.destroy(&copied);
    }
    // Into an SR of another file system it is a copy all the same, of every byte.
    let mut other = Bench::without_sr();
    other.host.root.clone_from(&bench.host.root);
    other.create_sr();
    let copied = copy(&bench, &volume, &other);
    assert_same(&other.node_file(&copied), &bench.node_file(&volume));
    bench.check();
    other.check();
}

#[test]
fn what_a_guest_writes_to_is_not_copied() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    let (host, domain): (_, Domain) = (Host::at(&bench.host.root), "7".parse().unwrap());
    let uri: VolumeUri = format!("qsd://{}/{volume}", bench.sr).parse().unwrap();
    activation::attach(&host, uri, &domain).unwrap();
    activation::activate(&host, uri, &domain, Mode::ReadWrite).unwrap();
    let request = json!({"key": volume, "dest_sr": bench.sr});
    assert_eq!(bench.code("Volume.copy", request), "SR_BACKEND_FAILURE_24");
    let snapshot = bench.snapshot(&volume);
    copy(&bench, &snapshot, &bench);
    activation::release(&host, uri, &domain).unwrap();
    assert_eq!(bench.keys().len(), 3);
    bench.check();
}

#[test]
fn a_copy_that_finds_no_source_leaves_nothing() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    write(&bench.node_file(&volume), 1, 0, MIB);
    let image = bench.node_file(&volume);
    let header = std::fs::read(&image).unwrap();
    std::fs::write(&image, b"no image").unwrap();
    let request = json!({"key": volume, "dest_sr": bench.sr});
    assert_eq!(bench.code("Volume.copy", request), "SR_BACKEND_FAILURE_46");
    std::fs::write(&image, header).unwrap();
    assert_eq!(bench.keys(), [volume]);
    bench.check();
}

#[test]
fn volumes_are_compared_by_what_was_written_since_they_parted() {
    let bench = Bench::new();
    let volume = bench.create(4 * MIB);
    write(&bench.node_file(&volume), 1, 0, MIB);
    let snapshot = bench.snapshot(&volume);
    write(&bench.node_file(&volume), 2, MIB / 2, MIB);
    let compare = |one: &str, other: &str| bench.call("Volume.compare", json!({"key": one, "key2": other}));
    assert_eq!(compare(&volume, &snapshot), json!({"blocksize": 65536, "ranges": [[8, 16]]}));
    assert_eq!(compare(&snapshot, &volume), json!({"blocksize": 65536, "ranges": [[8, 16]]}));
    assert_eq!(compare(&volume, &volume), json!({"blocksize": 65536, "ranges": []}));
    let other = bench.create(4 * MIB);
    for unrelated in [&other, "00000000-0000-4000-8000-000000000000", "no uuid"] {
        assert_eq!(compare(&volume, unrelated), json!({"blocksize": 65536, "ranges": [[0, 24]]}));
    }
    assert_eq!(compare(&other, &volume), json!({"blocksize": 65536, "ranges": []}));
}

#[test]
fn similar_volumes_are_listed_the_nearest_first() {
    let bench = Bench::new();
    let volume = bench.create(MIB);
    let first = bench.snapshot(&volume);
    let second = bench.snapshot(&volume);
    let clone = bench.clone_of(&first);
    let other = bench.create(MIB);
    let similar = |volume: &str| bench.call("Volume.similar_content", json!({"key": volume}));
    assert_eq!(similar(&volume), json!([second, first, clone]));
    assert_eq!(similar(&other), json!([]));
    for key in [&volume, &other] {
        bench.call("Volume.set", json!({"key": key, "k": "content_id", "v": "same"}));
    }
    assert_eq!(similar(&volume), json!([other, second, first, clone]));
    assert_eq!(similar(&other), json!([volume]));
    assert_eq!(
        bench.try_call("Volume.similar_content", json!({"key": "none"})).unwrap_err().code,
        "Volume_does_not_exist"
    );
}
