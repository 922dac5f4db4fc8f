//! The NBD client.

use std::time::Duration;

use bytes::Bytes;
use fake_xapi::nbd::{Client, Error, Options, Uri};

use crate::daemon::Daemon;

const MIB: u64 = 1 << 20;

#[tokio::test]
async fn the_export_is_told_with_its_size_description_and_block_sizes() {
    let daemon = Daemon::new(4 * MIB);
    let client = daemon.client().await;
    let export = client.export();
    assert_eq!(export.size, 4 * MIB);
    assert_eq!(export.description.as_deref(), Some("a test's disk"));
    assert!(!export.read_only());
    assert!(export.structured);
    assert!(export.minimum_block <= export.preferred_block && export.preferred_block <= export.maximum_block);
    client.disconnect().await;
}

#[tokio::test]
async fn what_is_written_zeroed_and_trimmed_is_read_back_with_either_kind_of_reply() {
    for structured in [true, false] {
        let daemon = Daemon::new(4 * MIB);
        let client = daemon.client_with(Options { structured }).await;
        assert_eq!(client.export().structured, structured);
        client.write(65536, Bytes::from(vec![7; 3 * 65536])).await.unwrap();
        client.write_zeroes(2 * 65536, 65536).await.unwrap();
        client.flush().await.unwrap();
        let mut expected = vec![0; 5 * 65536];
        expected[65536..2 * 65536].fill(7);
        expected[3 * 65536..4 * 65536].fill(7);
        assert_eq!(client.read(0, 5 * 65536).await.unwrap(), expected);
        client.trim(65536, 65536).await.unwrap();
        let trimmed = client.read(65536, 65536).await.unwrap();
        assert!(trimmed.iter().all(|byte| *byte == 0) || trimmed.iter().all(|byte| *byte == 7));
        client.disconnect().await;
    }
}

#[tokio::test]
async fn many_commands_in_flight_each_get_their_own_answer() {
    let daemon = Daemon::new(8 * MIB);
    let client = daemon.client().await;
    let block = |index: u64| Bytes::from(vec![(index % 251) as u8; 4096]);
    let mut tasks = Vec::new();
    for index in 0..1024 {
        let client = client.clone();
        tasks.push(tokio::spawn(async move {
            client.write(index * 4096, block(index)).await.unwrap();
            client.read(index * 4096, 4096).await.unwrap() == block(index)
        }));
    }
    for task in tasks {
        assert!(task.await.unwrap());
    }
    client.disconnect().await;
}

#[tokio::test]
async fn an_unknown_export_and_an_absent_socket_are_told_apart() {
    let daemon = Daemon::new(MIB);
    daemon.client().await.disconnect().await;
    let other = Uri::new(daemon.uri().socket(), "other");
    let error = Client::connect(&other).await.unwrap_err();
    assert!(matches!(&error, Error::Refused { reply, .. } if reply == "NBD_REP_ERR_UNKNOWN"), "{error}");
    let nowhere = Uri::new(daemon.path().join("no.sock"), "disk");
    let error = Client::connect(&nowhere).await.unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
}

#[tokio::test]
async fn a_request_outside_the_export_is_refused_before_it_is_sent() {
    let daemon = Daemon::new(MIB);
    let client = daemon.client().await;
    for (offset, length) in [(MIB, 1), (MIB - 1, 2), (u64::MAX, 1), (0, 0)] {
        let error = client.read(offset, length).await.unwrap_err();
        assert!(matches!(error, Error::Request(_)), "{error}");
    }
    assert!(client.read(0, 1).await.is_ok());
}

#[tokio::test]
async fn a_killed_server_fails_every_command_in_flight_and_every_later_one() {
    let mut daemon = Daemon::new(64 * MIB);
    let client = daemon.client().await;
    let mut tasks = Vec::new();
    for index in 0..8u64 {
        let client = client.clone();
        tasks.push(tokio::spawn(async move {
            loop {
                if let Err(error) = client.write(index * MIB, Bytes::from(vec![1; 1 << 20])).await {
                    return error;
                }
            }
        }));
    }
    client.read(0, 4096).await.unwrap();
    daemon.kill();
    for task in tasks {
        let error = tokio::time::timeout(Duration::from_secs(20), task).await.unwrap().unwrap();
        assert!(matches!(error, Error::Lost(_)), "{error}");
        assert!(error.is_uncertain() && error.is_fatal());
    }
    assert!(matches!(client.read(0, 4096).await, Err(Error::Lost(_))));
}

#[tokio::test]
async fn a_server_that_is_not_nbd_is_a_protocol_error() {
    use tokio::io::AsyncWriteExt;
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"HTTP/1.0 500 Internal Server Error\r\n\r\n").await.unwrap();
        stream
    });
    let error = Client::connect(&Uri::new(&socket, "disk")).await.unwrap_err();
    assert!(matches!(error, Error::Protocol(_)), "{error}");
    server.await.unwrap();
}
