//! Clients of an export that do not speak NBD, or speak it wrongly.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::scene::{SIZE, Scene};

/// What the daemon may hold at most after all of it, in KiB.
const MEMORY: u64 = 256 << 10;

/// An option as a client sends it.
fn option(number: u32, length: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT".as_slice(), &number.to_be_bytes(), &length.to_be_bytes(), data].concat()
}

/// A request as a client sends it.
fn request(magic: u32, kind: u16, offset: u64, length: u32) -> Vec<u8> {
    let (flags, cookie) = (0_u16, 7_u64);
    [
        &magic.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

/// The most memory that a process ever held, in KiB.
fn peak(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn a_client_that_talks_nonsense_is_answered_or_hung_up_on_and_the_guest_goes_on() {
    const READ: u16 = 0;
    const WRITE: u16 = 1;
    const MAGIC: u32 = 0x2560_9513;
    let scene = Scene::new();
    scene.call("Datapath.attach", "7");
    scene.call("Datapath.activate", "7");
    assert!(scene.io("write -P 5 0 1M"));
    let daemons = scene.processes();
    let name = scene.uri.volume.to_string();
    let about = [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &[0, 0]].concat();
    let flags = 3_u32.to_be_bytes().to_vec();
    let go = [flags.clone(), option(7, about.len() as u32, &about)].concat();
    let after_go = |more: &[u8]| [go.clone(), more.to_vec()].concat();
    let said = [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 1 << 20],
        [flags.clone(), option(7, u32::MAX, &[0; 4096])].concat(),
        [flags.clone(), option(7, 8, &[0xff; 8])].concat(),
        [flags.clone(), option(0xdead, 1 << 30, b"")].concat(),
        // As many options as it takes, none of them known.
        [flags, option(99, 0, b"").repeat(10_000)].concat(),
        after_go(&request(0xbad0_bad0, READ, 0, 512)),
        after_go(&request(MAGIC, 0xffff, 0, 512)),
        after_go(&request(MAGIC, READ, SIZE, 512)),
        after_go(&request(MAGIC, READ, u64::MAX, 512)),
        after_go(&request(MAGIC, READ, 0, u32::MAX)),
        after_go(&request(MAGIC, WRITE, SIZE - 512, 1 << 20)),
        after_go(&request(MAGIC, WRITE, 0, u32::MAX)),
    ];
    for (case, bytes) in said.iter().enumerate() {
        let mut stream = UnixStream::connect(scene.directory_of_volume().join("nbd.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        // One that was hung up on does not take it all.
        let _ = stream.write_all(bytes);
        let mut answer = vec![0; 1 << 16];
        while stream.read(&mut answer).is_ok_and(|length| length > 0) {}
        drop(stream);
        assert!(scene.io("read -P 5 0 1M"), "after {case}");
    }
    assert_eq!(scene.processes(), daemons);
    assert!(peak(daemons[0]) < MEMORY, "{} KiB", peak(daemons[0]));
    scene.call("Datapath.detach", "7");
    scene.assert_nothing_left();
}
