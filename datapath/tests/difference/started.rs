//! A mirror that starts while its guest writes to blocks that nothing was written to before.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use plugin::id::ContentId;
use plugin::mirror::{Base, Phase};
use serde_json::json;

use super::guest::Guest;
use super::scene::{Target, announce};
use super::site::{MIB, Site, assert_same};

/// The unit of what a mirror follows.
const BLOCK: u64 = 64 << 10;

/// What one second-level table of an image describes: to look whether something in it is allocated, it has to be read.
const TABLE: u64 = 512 * MIB;

/// So many tables that the job takes a while to look at them all.
const SIZE: u64 = 128 * TABLE;

/// QEMU's job loses some of these writes in most of its starts (docs/qemu.md).
const STARTS: usize = 3;

#[test]
fn a_first_write_to_a_block_while_the_mirror_starts_is_not_lost() {
    let directory = tempfile::Builder::new().prefix("ds-").tempdir_in("/tmp").unwrap();
    let site = Site::new(directory.path(), "s", &json!({}));
    let before: Vec<String> = (0..SIZE / TABLE).map(|table| format!("write -q -P 1 {} 4k", table * TABLE)).collect();
    let before: Vec<&str> = before.iter().map(String::as_str).collect();
    for start in 0..STARTS {
        let leaf = site.create(SIZE);
        site.write(leaf, &before);
        // Opened anew: none of the tables is in memory.
        site.activate(leaf, "7");
        let image = directory.path().join(format!("{start}.qcow2"));
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2"]).arg(&image).arg(SIZE.to_string());
        assert!(create.status().unwrap().success());
        let blank = announce(ContentId::random(), Base::Blank);
        let mut target = Target::start(directory.path(), image, Some(&blank));
        let is_ready = &AtomicBool::new(false);
        let mut guest = Guest::connect(&site, leaf);
        let key = thread::scope(|scope| {
            scope.spawn(|| {
                for block in (1..TABLE / BLOCK).take_while(|_| !is_ready.load(Ordering::Relaxed)) {
                    guest.command(&format!("write -P 2 {} 4k", block * BLOCK));
                }
            });
            let key = site.mirror(leaf, "7", "e", &target.socket);
            site.wait(key, Phase::Ready);
            is_ready.store(true, Ordering::Relaxed);
            key
        });
        drop(guest);
        site.finish(key);
        site.release(leaf, "7");
        target.stop();
        assert_same(&site.chain(leaf), target.image.to_str().unwrap());
    }
}
