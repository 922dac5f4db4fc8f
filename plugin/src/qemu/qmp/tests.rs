//! The client against a monitor that each test plays itself, so that it can misbehave.

use std::path::PathBuf;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;

use super::*;

const PATIENCE: Duration = Duration::from_secs(60);

/// A listening socket in a directory of its own.
struct Monitor {
    _directory: tempfile::TempDir,
    path: PathBuf,
    listener: UnixListener,
}

impl Monitor {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp.sock");
        Self { listener: UnixListener::bind(&path).unwrap(), path, _directory: directory }
    }

    /// Accepts, greets and answers qmp_capabilities.
    async fn accept(&self) -> BufReader<UnixStream> {
        let mut stream = BufReader::new(self.listener.accept().await.unwrap().0);
        stream.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n").await.unwrap();
        let request = receive(&mut stream).await;
        assert_eq!(request["execute"], "qmp_capabilities");
        send(&mut stream, json!({"return": {}, "id": request["id"]})).await;
        stream
    }
}

async fn receive(stream: &mut BufReader<UnixStream>) -> Value {
    let mut line = String::new();
    stream.read_line(&mut line).await.unwrap();
    serde_json::from_str(&line).unwrap()
}

async fn send(stream: &mut BufReader<UnixStream>, value: Value) {
    stream.write_all(format!("{value}\r\n").as_bytes()).await.unwrap();
}

async fn connected() -> (Client, BufReader<UnixStream>) {
    let monitor = Monitor::new();
    let (client, stream) = tokio::join!(Client::connect(&monitor.path, PATIENCE), monitor.accept());
    (client.unwrap(), stream)
}

#[tokio::test]
async fn answers_find_their_calls_in_whatever_order_they_come() {
    let (client, mut stream) = connected().await;
    let monitor = async {
        let (first, second) = (receive(&mut stream).await, receive(&mut stream).await);
        for request in [second, first] {
            send(&mut stream, json!({"return": request["execute"], "id": request["id"]})).await;
        }
    };
    let (a, b, ()) = tokio::join!(client.execute("a", ()), client.execute("b", json!({"x": 1})), monitor);
    assert_eq!((a.unwrap(), b.unwrap()), (json!("a"), json!("b")));
}

#[tokio::test]
async fn an_answer_that_another_client_was_owed_is_not_taken() {
    let (client, mut stream) = connected().await;
    let monitor = async {
        let request = receive(&mut stream).await;
        for id in 0..8 {
            send(&mut stream, json!({"return": "theirs", "id": id})).await;
        }
        send(&mut stream, json!({"return": "ours", "id": request["id"]})).await;
    };
    let (answer, ()) = tokio::join!(client.execute("a", ()), monitor);
    assert_eq!(answer.unwrap(), json!("ours"));
}

#[tokio::test]
async fn a_refusal_keeps_its_class_and_description() {
    let (client, mut stream) = connected().await;
    let monitor = async {
        let request = receive(&mut stream).await;
        send(&mut stream, json!({"error": {"class": "DeviceNotFound", "desc": "no x"}, "id": request["id"]})).await;
    };
    let (result, ()) = tokio::join!(client.execute("a", ()), monitor);
    assert!(matches!(result, Err(Error::Qmp { command, class, desc })
            if command == "a" && class == "DeviceNotFound" && desc == "no x"));
}

#[tokio::test]
async fn every_pending_call_and_every_listener_ends_with_the_connection() {
    let (client, mut stream) = connected().await;
    let mut events = client.events();
    let monitor = async {
        receive(&mut stream).await;
        receive(&mut stream).await;
        drop(stream);
    };
    let (a, b, event, ()) = tokio::join!(client.execute("a", ()), client.execute("b", ()), events.next(), monitor);
    for error in [a.unwrap_err(), b.unwrap_err(), event.unwrap_err()] {
        assert!(error.to_string().contains("closed the connection"), "{error}");
    }
    assert!(client.execute("c", ()).await.is_err());
    assert!(client.events().next().await.is_err());
}

#[tokio::test]
async fn events_of_any_name_reach_who_listened_before_the_command() {
    let (client, mut stream) = connected().await;
    let mut events = client.events();
    let monitor = async {
        let request = receive(&mut stream).await;
        send(&mut stream, json!({"event": "NEVER_HEARD_OF", "data": {"x": [1]}, "timestamp": {}})).await;
        send(&mut stream, json!({"return": null, "id": request["id"]})).await;
    };
    let (result, ()) = tokio::join!(client.execute("a", ()), monitor);
    assert_eq!(result.unwrap(), Value::Null);
    let event = events.next().await.unwrap();
    assert_eq!(event, Event { name: "NEVER_HEARD_OF".to_owned(), data: json!({"x": [1]}) });
}

#[tokio::test]
async fn an_answer_that_comes_too_late_is_dropped() {
    let (client, mut stream) = connected().await;
    let result = client.execute_within(Duration::ZERO, "slow", ()).await;
    assert!(matches!(result, Err(Error::Timeout { .. })));
    let monitor = async {
        for _ in 0..2 {
            let request = receive(&mut stream).await;
            send(&mut stream, json!({"return": request["execute"], "id": request["id"]})).await;
        }
    };
    let (result, ()) = tokio::join!(client.execute("next", ()), monitor);
    assert_eq!(result.unwrap(), json!("next"));
}

#[tokio::test]
async fn nonsense_ends_the_connection() {
    for nonsense in ["\n", "[]\n", "{}\n", "{\"return\": {}}\n", "{\"error\": {\"class\": \"x\", \"desc\": \"y\"}}\n"]
    {
        let (client, mut stream) = connected().await;
        let monitor = async {
            receive(&mut stream).await;
            stream.write_all(nonsense.as_bytes()).await.unwrap();
            receive_end(&mut stream).await;
        };
        let call = async {
            let result = client.execute("a", ()).await;
            drop(client);
            result
        };
        let (result, ()) = tokio::join!(call, monitor);
        assert!(matches!(result, Err(Error::Qemu { .. })), "{nonsense}");
    }
}

#[tokio::test]
async fn a_monitor_that_greets_again_is_not_taken_for_one_that_listens() {
    let monitor = Monitor::new();
    let greet_again = async {
        let mut stream = monitor.listener.accept().await.unwrap().0;
        for _ in 0..2 {
            stream.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n").await.unwrap();
        }
        stream
    };
    let (result, _stream) = tokio::join!(Client::connect(&monitor.path, PATIENCE), greet_again);
    let Err(Error::Qemu { reason, .. }) = result else { panic!("{result:?}") };
    assert_eq!(reason, "the monitor greeted twice");
}

/// Waits until the client has closed the connection.
async fn receive_end(stream: &mut BufReader<UnixStream>) {
    let mut rest = Vec::new();
    drop(tokio::io::AsyncReadExt::read_to_end(stream, &mut rest).await);
}

#[tokio::test]
async fn a_line_without_end_takes_bounded_memory() {
    let (client, mut stream) = connected().await;
    let monitor = tokio::spawn(async move {
        let piece = vec![b'x'; 1 << 20];
        let mut sent = 0;
        // Ends because the client stops reading and closes.
        while sent < 64 && stream.write_all(&piece).await.is_ok() {
            sent += 1;
        }
        sent
    });
    let result = client.execute("a", ()).await;
    assert!(result.unwrap_err().to_string().contains("a line of over"));
    drop(client);
    assert!(monitor.await.unwrap() < 64);
}

#[tokio::test]
async fn a_socket_that_is_no_monitor_is_an_error_and_one_that_is_silent_times_out() {
    let monitor = Monitor::new();
    let talk = async {
        let mut stream = monitor.listener.accept().await.unwrap().0;
        stream.write_all(b"NBDMAGIC\n").await.unwrap();
        stream
    };
    let (result, _stream) = tokio::join!(Client::connect(&monitor.path, PATIENCE), talk);
    assert!(matches!(result, Err(Error::Qemu { .. })));
    // Nobody accepts: the connection stays in the queue, as with a stopped daemon.
    let result = Client::connect(&monitor.path, Duration::from_millis(20)).await;
    assert!(matches!(result, Err(Error::Timeout { .. })));
    let missing = Client::connect(&monitor.path.with_extension("none"), PATIENCE).await;
    assert!(matches!(missing, Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound));
}
