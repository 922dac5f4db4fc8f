//! Daemons that die or hang, calls that are killed, and disks that are full.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use plugin::error::Error;
use plugin::store::Mode;
use rustix::process::Signal;
use serde_json::json;
use uuid::Uuid;

use super::scene::{Scene, as_domain};

#[test]
fn a_killed_daemon_is_replaced_and_what_was_flushed_is_there() {
    let scene = Scene::new();
    let chain = [scene.image(), scene.image()];
    scene.activate("7", Mode::ReadWrite, &chain);
    assert!(scene.io(false, &["write -P 1 0 1M", "flush"]));
    let first = scene.daemons();
    scene.signal_daemon(Signal::KILL);
    super::scene::wait_until("the daemon is gone", || scene.daemons().is_empty());
    let attachment = scene.attachment();
    assert!(!attachment.is_alive() && attachment.open_mode().is_none());
    assert_eq!(attachment.domains().len(), 1);
    drop(attachment);
    assert!(scene.top().is_none());
    scene.activate("7", Mode::ReadWrite, &chain);
    assert!(scene.io(false, &["read -P 1 0 1M", "write -P 2 1M 1M"]));
    assert_ne!(scene.daemons(), first);
    scene.signal_daemon(Signal::KILL);
    super::scene::wait_until("the daemon is gone", || scene.daemons().is_empty());
    scene.deactivate("7");
    scene.detach("7");
    assert!(!scene.host.volume_dir(scene.uri.volume).exists());
}

#[test]
fn a_daemon_that_hangs_makes_bounded_errors_and_never_a_second_one() {
    let scene = Scene::with_settings(r#"{"qmp_seconds": 1}"#);
    let chain = [scene.image()];
    scene.attach("7");
    scene.signal_daemon(Signal::STOP);
    let started = Instant::now();
    scene.attach("8");
    for _ in 0..4 {
        assert!(matches!(scene.try_activate("7", Mode::ReadWrite, &chain), Err(Error::Timeout { .. })));
    }
    assert!(started.elapsed() < Duration::from_secs(20));
    assert_eq!(scene.daemons().len(), 1);
    scene.signal_daemon(Signal::CONT);
    scene.activate("7", Mode::ReadWrite, &chain);
    assert!(scene.io(false, &["write -P 1 0 64k"]));
    scene.signal_daemon(Signal::STOP);
    assert!(matches!(scene.try_deactivate("7"), Err(Error::Timeout { .. })));
    scene.signal_daemon(Signal::CONT);
    scene.deactivate("7");
    scene.activate("7", Mode::ReadOnly, &chain);
    assert!(scene.io(true, &["read -P 1 0 64k"]));
}

#[test]
fn a_daemon_that_hangs_is_killed_by_the_last_detach() {
    let scene = Scene::with_settings(r#"{"qmp_seconds": 1}"#);
    scene.activate("7", Mode::ReadWrite, &[scene.image()]);
    scene.signal_daemon(Signal::STOP);
    let started = Instant::now();
    scene.detach("7");
    assert!(started.elapsed() < Duration::from_secs(30));
    assert!(scene.daemons().is_empty());
    assert!(!scene.host.volume_dir(scene.uri.volume).exists());
}

#[test]
fn a_daemon_that_no_record_tells_of_does_not_live_beside_another() {
    let scene = Scene::new();
    scene.attach("7");
    let first = scene.daemons();
    scene.edit_state(|state| state["daemon"] = json!(null));
    scene.activate("7", Mode::ReadWrite, &[scene.image()]);
    assert_eq!(scene.daemons().len(), 1);
    assert_ne!(scene.daemons(), first);
    assert!(scene.io(false, &["write -P 1 0 64k"]));
}

#[test]
fn what_a_killed_call_left_half_done_is_finished() {
    let scene = Scene::new();
    let chain = [scene.image(), scene.image()];
    for phase in ["opening", "closing", "removing"] {
        scene.activate("7", Mode::ReadWrite, &chain);
        scene.edit_state(|state| state["open"]["phase"] = json!(phase));
        assert_eq!(scene.open_mode(), None, "{phase}");
        assert!(!scene.io(true, &["read 0 64k"]));
        scene.deactivate("7");
    }
    scene.activate("7", Mode::ReadWrite, &chain);
    scene.edit_state(|state| state["open"]["phase"] = json!("exporting"));
    assert_eq!(scene.open_mode(), Some(Mode::ReadWrite));
    assert!(scene.io(false, &["write -P 1 0 64k"]));
    // Opened, and killed before it was written down.
    scene.edit_state(|state| state["open"] = json!(null));
    scene.activate("7", Mode::ReadWrite, &chain);
    assert!(scene.io(false, &["read -P 1 0 64k"]));
}

#[test]
fn after_a_power_cycle_nothing_is_known() {
    let scene = Scene::new();
    scene.activate("7", Mode::ReadWrite, &[scene.image()]);
    let directory = scene.host.root().join("proc/sys/kernel/random");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("boot_id"), Uuid::new_v4().to_string()).unwrap();
    let attachment = scene.attachment();
    assert!(attachment.domains().is_empty() && attachment.open_mode().is_none() && !attachment.is_alive());
}

#[test]
fn a_torn_record_is_an_error_that_names_the_file() {
    let scene = Scene::new();
    scene.attach("7");
    let path = scene.host.volume_dir(scene.uri.volume).join("state.json");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let error = plugin::attachment::Attachment::lock(&scene.host, scene.uri).unwrap_err();
    assert!(error.to_string().contains("state.json"), "{error}");
    fs::write(&path, whole).unwrap();
    scene.detach("7");
}

/// A small file system in memory, unmounted in the end.
struct SmallFileSystem<'a>(&'a Path);

impl<'a> SmallFileSystem<'a> {
    fn mount(path: &'a Path) -> Self {
        fs::create_dir(path).unwrap();
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "none"]).arg(path).status();
        assert!(status.unwrap().success());
        Self(path)
    }

    fn fill(&self) {
        let mut file = fs::File::create(self.0.join("filling")).unwrap();
        while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
    }
}

impl Drop for SmallFileSystem<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[test]
fn a_flush_that_fails_is_an_error_and_no_later_call_makes_a_success_of_it() {
    let scene = Scene::new();
    let path = scene.path("small");
    let small = SmallFileSystem::mount(&path);
    let chain = [scene.image_in(&path)];
    scene.activate("7", Mode::ReadWrite, &chain);
    scene.client(false).write(1, "0", "64k");
    // What QEMU still has to write now needs room again, and there is none.
    fs::OpenOptions::new().write(true).open(&chain[0].path).unwrap().set_len(0).unwrap();
    small.fill();
    for _ in 0..2 {
        let mut attachment = scene.attachment();
        let error = plugin::qemu::block_on(attachment.deactivate(&as_domain("7"))).unwrap_err();
        assert!(error.chain().contains("space"), "{error}");
        assert_eq!(attachment.open_mode(), None);
        assert_eq!(attachment.take_closed(), None, "what is in the file is not known");
    }
    fs::remove_file(path.join("filling")).unwrap();
    assert!(scene.try_deactivate("7").is_err());
    scene.activate("7", Mode::ReadWrite, &[scene.image()]);
    scene.deactivate("7");
    assert!(scene.attachment().domains().contains_key(&as_domain("7")));
    scene.detach("7");
    assert!(scene.daemons().is_empty());
}
