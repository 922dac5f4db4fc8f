//! Chains, and the daemon that opens them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use plugin::attachment::Attachment;
use plugin::qemu::chain_filename;
use plugin::store::Mode;

use super::scene::Scene;

#[test]
fn a_chain_reads_as_its_layers_lie_whatever_the_headers_say() {
    let scene = Scene::new();
    let mut chain = Vec::new();
    let commands: [&[&str]; 3] = [
        &["write -P 1 0 3M"],
        &["write -P 2 1M 1M", "write -z 2M 512k"],
        &["write -P 3 64k 64k", "discard 1M 128k", "write -z -u 0 32k"],
    ];
    for commands in commands {
        chain.insert(0, scene.image());
        scene.activate("7", Mode::ReadWrite, &chain);
        assert_eq!(scene.top(), Some(chain[0].node));
        assert!(scene.io(false, commands));
        scene.deactivate("7");
    }
    let expected = scene.path("expected");
    let convert = ["convert", "-O", "raw", &chain_filename(&chain).unwrap()];
    assert!(Command::new("qemu-img").args(convert).arg(&expected).status().unwrap().success());
    scene.activate("7", Mode::ReadOnly, &chain);
    let copied = scene.path("copied");
    assert!(Command::new("nbdcopy").arg(scene.nbd()).arg(&copied).status().unwrap().success());
    assert!(fs::read(&expected).unwrap() == fs::read(&copied).unwrap());
    assert!(scene.io(true, &["read -P 0 0 32k", "read -P 3 64k 64k", "read -P 0 1M 128k", "read -P 2 1152k 896k"]));
    assert!(scene.io(true, &["read -P 0 2M 512k", "read -P 1 2560k 512k", "read -P 0 3M 5M"]));
}

#[test]
fn a_long_chain_opens_and_closes() {
    let scene = Scene::new();
    let chain: Vec<_> = (0..40).map(|_| scene.image()).collect();
    scene.activate("7", Mode::ReadWrite, &chain);
    assert!(scene.io(false, &["write -P 9 0 8M", "read -P 9 0 8M"]));
    scene.deactivate("7");
    scene.detach("7");
    assert!(scene.daemons().is_empty());
}

#[test]
fn twenty_domains_share_one_daemon_and_leave_nothing() {
    let scene = Scene::new();
    let domains: Vec<String> = (0..20).map(|number| format!("domain{number}")).collect();
    for domain in domains.iter().chain(&domains) {
        scene.attach(domain);
    }
    assert_eq!((scene.daemons().len(), scene.attachment().domains().len()), (1, 20));
    let image = [scene.image()];
    for domain in &domains {
        scene.activate(domain, Mode::ReadOnly, &image);
    }
    for (left, domain) in domains.iter().enumerate().map(|(index, domain)| (domains.len() - index, domain)) {
        assert_eq!(scene.open_mode(), Some(Mode::ReadOnly), "{left} domains left");
        scene.deactivate(domain);
        scene.detach(domain);
        scene.detach(domain);
    }
    assert!(scene.daemons().is_empty());
    assert!(!scene.host.volume_dir(scene.uri.volume).exists());
    assert!(Attachment::lock_existing(&scene.host, scene.uri.volume).unwrap().is_none());
}

#[test]
fn looking_at_a_volume_that_nobody_uses_leaves_nothing() {
    let scene = Scene::new();
    assert!(scene.attachment().domains().is_empty());
    assert!(!scene.host.volume_dir(scene.uri.volume).exists());
    scene.deactivate("7");
    scene.detach("7");
    assert!(!scene.host.volume_dir(scene.uri.volume).exists());
}

#[test]
fn the_daemon_has_none_of_its_callers_descriptors_and_its_files_are_private() {
    let scene = Scene::new();
    let path = scene.path("leaked");
    let leaked = fs::File::create(&path).unwrap();
    rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
    scene.attach("7");
    let descriptors = fs::read_dir(format!("/proc/{}/fd", scene.daemons()[0])).unwrap();
    let targets: Vec<_> = descriptors.map(|entry| fs::read_link(entry.unwrap().path()).unwrap()).collect();
    assert!(targets.len() >= 3);
    let own = |target: &str| {
        ["socket:", "anon_inode:", "/dev/null"].iter().any(|start| target.starts_with(start))
            || target.ends_with("/daemon.log")
            || target.ends_with("/daemon.pid")
    };
    for target in targets {
        assert!(own(target.to_str().unwrap()), "{}", target.display());
    }
    let directory = scene.host.volume_dir(scene.uri.volume);
    for entry in fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).chain([directory.clone()]) {
        let mode = fs::metadata(&entry).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{}: {mode:o}", entry.display());
    }
}

#[test]
fn a_chain_that_cannot_be_opened_leaves_nothing_open() {
    let scene = Scene::new();
    let (top, base) = (scene.image(), scene.image());
    fs::write(&top.path, "no image").unwrap();
    assert!(scene.try_activate("7", Mode::ReadWrite, &[top.clone(), base.clone()]).is_err());
    assert_eq!(scene.open_mode(), None);
    fs::remove_file(&top.path).unwrap();
    assert!(scene.try_activate("7", Mode::ReadWrite, &[top, base.clone()]).is_err());
    scene.activate("7", Mode::ReadWrite, &[base]);
    assert!(scene.io(false, &["write -P 1 0 1M"]));
}
