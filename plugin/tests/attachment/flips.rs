//! Reading, writing, and the domains that do.

use plugin::attachment::Use;
use plugin::error::Error;
use plugin::qemu::block_on;
use plugin::store::Mode;
use serde_json::json;

use super::scene::{Scene, as_domain, wait_until};

#[test]
fn a_volume_goes_from_reading_to_writing_and_back() {
    let scene = Scene::new();
    let chain = [scene.image(), scene.image()];
    scene.attach("7");
    for pattern in [1, 2] {
        scene.activate("7", Mode::ReadOnly, &chain);
        assert_eq!(scene.info("is_read_only"), json!(true));
        assert!(!scene.io(false, &["write -P 99 0 64k"]));
        scene.deactivate("7");
        scene.activate("7", Mode::ReadWrite, &chain);
        assert!(scene.io(false, &[&format!("write -P {pattern} 0 64k")]));
        scene.deactivate("7");
        scene.deactivate("7");
        assert!(!scene.io(true, &["read 0 64k"]));
    }
    scene.activate("7", Mode::ReadOnly, &chain);
    assert!(scene.io(true, &["read -P 2 0 64k"]));
}

#[test]
fn a_reader_is_served_by_the_writers_export() {
    let scene = Scene::new();
    let chain = [scene.image()];
    scene.activate("7", Mode::ReadWrite, &chain);
    let mut writer = scene.client(false);
    scene.activate("8", Mode::ReadOnly, &chain);
    writer.write(5, "0", "64k");
    assert!(scene.io(true, &["read -P 5 0 64k"]));
    scene.deactivate("8");
    writer.write(6, "0", "64k");
}

#[test]
fn when_the_last_writer_goes_the_volume_is_flushed_and_only_read() {
    let scene = Scene::new();
    let chain = [scene.image()];
    scene.activate("7", Mode::ReadWrite, &chain);
    scene.activate("8", Mode::ReadOnly, &chain);
    scene.client(false).write(5, "0", "64k");
    scene.deactivate("7");
    assert_eq!(scene.open_mode(), Some(Mode::ReadOnly));
    assert_eq!(scene.info("is_read_only"), json!(true));
    assert!(scene.io(true, &["read -P 5 0 64k"]));
    scene.activate("7", Mode::ReadWrite, &chain);
    assert!(scene.io(false, &["write -P 6 0 64k"]));
}

#[test]
fn what_was_written_and_closed_is_named_once_and_what_was_read_is_not() {
    let scene = Scene::new();
    let chain = [scene.image(), scene.image()];
    let closed = |domain: &str| {
        let mut attachment = scene.attachment();
        block_on(attachment.deactivate(&as_domain(domain))).unwrap();
        let closed = attachment.take_closed();
        assert_eq!(attachment.take_closed(), None);
        closed.map(|(node, _)| node)
    };
    scene.activate("7", Mode::ReadOnly, &chain);
    assert_eq!(closed("7"), None);
    scene.activate("7", Mode::ReadWrite, &chain);
    scene.activate("8", Mode::ReadWrite, &chain);
    assert_eq!(closed("7"), None);
    assert_eq!(closed("8"), Some(chain[0].node));
    scene.activate("7", Mode::ReadWrite, &chain);
    scene.activate("8", Mode::ReadOnly, &chain);
    let reader = scene.client(true);
    assert_eq!(closed("7"), None, "a client may still write");
    drop(reader);
    assert_eq!(closed("8"), Some(chain[0].node));
}

#[test]
fn a_connected_reader_keeps_a_volume_from_being_opened_for_writing() {
    let scene = Scene::new();
    let chain = [scene.image()];
    scene.activate("7", Mode::ReadOnly, &chain);
    let mut reader = scene.client(true);
    assert!(matches!(scene.try_activate("8", Mode::ReadWrite, &chain), Err(Error::VolumeInUse { .. })));
    assert!(reader.run("read 0 64k").starts_with("read "));
    drop(reader);
    scene.activate("8", Mode::ReadWrite, &chain);
    assert_eq!(scene.info("is_read_only"), json!(false));
}

#[test]
fn a_domain_that_is_activated_twice_keeps_the_more_it_may_do() {
    let scene = Scene::new();
    let chain = [scene.image()];
    for modes in [[Mode::ReadOnly, Mode::ReadWrite], [Mode::ReadWrite, Mode::ReadOnly]] {
        for mode in modes {
            scene.activate("7", mode, &chain);
        }
        assert_eq!(scene.attachment().domains()[&as_domain("7")], Use::ReadWrite);
        assert!(scene.io(false, &["write -P 1 0 64k"]));
        scene.deactivate("7");
    }
}

#[test]
fn a_migration_without_a_client_is_nobody() {
    let scene = Scene::new();
    let chain = [scene.image()];
    scene.activate("MIR012abc", Mode::ReadWrite, &chain);
    let client = scene.client(false);
    scene.activate("7", Mode::ReadWrite, &chain);
    assert_eq!(scene.attachment().domains()[&as_domain("MIR012abc")], Use::ReadWrite);
    drop(client);
    wait_until("the client is gone", || {
        let attachment = scene.attachment();
        plugin::qemu::block_on(attachment.clients()).unwrap() == 0
    });
    scene.activate("8", Mode::ReadWrite, &chain);
    assert_eq!(scene.attachment().domains()[&as_domain("MIR012abc")], Use::Attached);
    assert_eq!(scene.attachment().domains()[&as_domain("7")], Use::ReadWrite);
    for domain in ["7", "8"] {
        scene.deactivate(domain);
    }
    assert_eq!(scene.open_mode(), None);
}

#[test]
fn a_client_that_stays_is_cut_off_when_the_last_domain_goes() {
    let scene = Scene::new();
    let chain = [scene.image()];
    scene.activate("7", Mode::ReadWrite, &chain);
    let mut client = scene.client(false);
    client.write(8, "1M", "1M");
    scene.deactivate("7");
    assert_eq!(scene.open_mode(), None);
    scene.activate("7", Mode::ReadOnly, &chain);
    assert!(scene.io(true, &["read -P 8 1M 1M"]));
}
