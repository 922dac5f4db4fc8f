//! Proxies between two hosts whose plugin is a shell script and whose NBD server is an echo.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::*;

struct Pair {
    _dir: tempfile::TempDir,
    a: Arc<Host>,
    b: Arc<Host>,
}

/// Host b's plugin attaches everything to an echo server.
async fn pair() -> Pair {
    let dir = tempfile::Builder::new().prefix("fx-").tempdir_in("/tmp").unwrap();
    let echo = dir.path().join("echo.sock");
    let listener = UnixListener::bind(&echo).unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
        }
    });
    let script = |kind: &str, name: &str, method: &str, answer: &str| {
        let target = dir.path().join("plugins").join(kind).join(name);
        std::fs::create_dir_all(&target).unwrap();
        let path = target.join(method);
        std::fs::write(&path, format!("#!/bin/sh\ncat >/dev/null\necho '{answer}'\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    let query = r#"{"plugin":"test","name":"","description":"","vendor":"","copyright":"","version":"","required_api_version":"5.0","features":[],"configuration":{},"required_cluster_stack":[]}"#;
    script("volume", "org.xen.xapi.storage.test", "Plugin.Query", query);
    script("volume", "org.xen.xapi.storage.test", "SR.attach", "\"s\"");
    script(
        "volume",
        "org.xen.xapi.storage.test",
        "SR.stat",
        r#"{"sr":"s","name":"","description":"","free_space":1,"total_space":1,"datasources":[],"clustered":false,"health":["Healthy",""]}"#,
    );
    script(
        "volume",
        "org.xen.xapi.storage.test",
        "Volume.stat",
        r#"{"key":"k","name":"","description":"","read_write":true,"sharable":false,"virtual_size":1,"physical_utilisation":1,"uri":["qsd://s/k"],"keys":{}}"#,
    );
    script("datapath", "qsd", "Plugin.Query", query);
    let attach = format!(r#"{{"implementations":[["Nbd",{{"uri":"nbd:unix:{}:exportname=k"}}]]}}"#, echo.display());
    script("datapath", "qsd", "Datapath.attach", &attach);
    let log = CallLog::default();
    let plugins = PluginSource::Existing(dir.path().join("plugins"));
    let a = Host::start("a", &dir.path().join("a"), &plugins, &log).await.unwrap();
    let b = Host::start("b", &dir.path().join("b"), &plugins, &log).await.unwrap();
    b.sr_attach("t", "test", &Sr::from("s2"), &[]).await.unwrap();
    Pair { _dir: dir, a, b }
}

impl Pair {
    async fn connect(&self, sr: &str) -> UnixStream {
        let vm = Vm::from("MIR1");
        let listener = self.a.bind_export(&vm).unwrap();
        let path = ImportPath { vm: vm.clone(), sr: Sr::from(sr), vdi: Vdi::from("k"), dp: Dp::from("d") };
        self.a.run_export(listener, Vdi::from("src"), &self.b, path);
        UnixStream::connect(self.a.export_socket(&vm)).await.unwrap()
    }
}

async fn says(stream: &mut UnixStream, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    stream.write_all(bytes).await?;
    let mut answer = vec![0; bytes.len()];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("it takes too long")
}

#[tokio::test]
async fn a_connection_is_piped_to_the_destinations_nbd_server_and_counted() {
    let pair = pair().await;
    let mut stream = pair.connect("s2").await;
    let data = vec![7; 200_000];
    let (mut read, mut write) = stream.split();
    let mut back = vec![0; data.len()];
    let (sent, got) = soon(async { tokio::join!(write.write_all(&data), read.read_exact(&mut back)) }).await;
    sent.unwrap();
    got.unwrap();
    assert_eq!(back, data);
    write.shutdown().await.unwrap();
    assert_eq!(soon(read.read(&mut [0; 1])).await.unwrap(), 0, "the end of the file did not come back");
    let wires = pair.a.wires().all();
    assert_eq!(wires.len(), 1);
    assert_eq!((wires[0].to_destination(), wires[0].from_destination()), (200_000, 200_000));
    assert!(!wires[0].samples().is_empty());
    let methods: Vec<_> = pair.b.runner().log().order_since(4);
    assert_eq!(methods[methods.len() - 2..], ["b Volume.stat", "b Datapath.attach"]);
}

#[tokio::test]
async fn only_one_connection_is_accepted() {
    let pair = pair().await;
    let mut first = pair.connect("s2").await;
    assert_eq!(soon(says(&mut first, b"abc")).await.unwrap(), b"abc");
    let mut second = UnixStream::connect(pair.a.export_socket(&Vm::from("MIR1"))).await.unwrap();
    second.write_all(b"abc").await.unwrap();
    let waited = tokio::time::timeout(Duration::from_millis(300), second.read(&mut [0; 3])).await;
    assert!(waited.is_err(), "the second connection was served");
}

#[tokio::test]
async fn a_refused_import_leaves_the_plugin_with_a_silent_peer() {
    let pair = pair().await;
    let mut stream = pair.connect("unknown-sr").await;
    let waited = tokio::time::timeout(Duration::from_millis(500), stream.read(&mut [0; 1])).await;
    assert!(waited.is_err(), "{waited:?}");
    pair.a.close();
    assert_eq!(soon(stream.read(&mut [0; 1])).await.unwrap(), 0);
}

#[tokio::test]
async fn a_wire_is_cut_or_stalled_where_it_was_ordered() {
    let pair = pair().await;
    let order = |at, how| pair.a.wires().order(move |_| Some(WireFault { at, how }));

    order(WireMoment::Handshake, WireHarm::Cut);
    let mut stream = pair.connect("s2").await;
    assert!(soon(says(&mut stream, b"abc")).await.is_err());

    order(WireMoment::Bytes(7), WireHarm::Cut);
    let mut stream = pair.connect("s2").await;
    assert_eq!(soon(says(&mut stream, b"abc")).await.unwrap(), b"abc");
    assert!(soon(says(&mut stream, b"abc")).await.is_err());
    assert_eq!(pair.a.wires().all().last().map(|w| w.to_destination() + w.from_destination()), Some(7));

    order(WireMoment::Bytes(7), WireHarm::Stall);
    let mut stream = pair.connect("s2").await;
    assert_eq!(soon(says(&mut stream, b"abc")).await.unwrap(), b"abc");
    assert!(tokio::time::timeout(Duration::from_millis(300), says(&mut stream, b"abc")).await.is_err());

    order(WireMoment::Told, WireHarm::Cut);
    let mut stream = pair.connect("s2").await;
    assert_eq!(soon(says(&mut stream, b"abc")).await.unwrap(), b"abc");
    pair.a.wires().tell();
    assert!(soon(says(&mut stream, b"abc")).await.is_err());

    pair.a.wires().clear();
    let mut stream = pair.connect("s2").await;
    assert_eq!(soon(says(&mut stream, b"abc")).await.unwrap(), b"abc");
}

#[tokio::test]
async fn other_requests_get_an_http_answer() {
    let pair = pair().await;
    for (request, status) in [
        ("GET / HTTP/1.0\r\n\r\n".to_owned(), "404"),
        ("PUT /services/SM/nbdproxy/import/a/b/c/d?session_id=x HTTP/1.0\r\n\r\n".to_owned(), "401"),
        (format!("GET /services/SM/nbdproxy/import/a/b/c/d?session_id={} HTTP/1.0\r\n\r\n", pair.b.session), "405"),
    ] {
        let mut stream = UnixStream::connect(pair.b.http_socket()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        soon(stream.read_to_string(&mut answer)).await.unwrap();
        assert_eq!(answer.split(' ').nth(1), Some(status), "{request}: {answer}");
    }
}

#[tokio::test]
async fn leftovers_are_processes_sockets_and_files_of_the_host() {
    let pair = pair().await;
    assert!(pair.a.leftovers().is_empty(), "{:?}", pair.a.leftovers());
    let dir = pair.a.runtime_dir().join("volumes/x");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::create_dir_all(pair.a.runtime_dir().join("srs")).unwrap();
    std::fs::write(pair.a.runtime_dir().join("srs/y.json"), "").unwrap();
    assert!(pair.a.leftovers().is_empty());
    let _socket = UnixListener::bind(dir.join("nbd.sock")).unwrap();
    let mut child = tokio::process::Command::new("sleep")
        .arg("60")
        .env("XAPI_STORAGE_QCOW2_ROOT", pair.a.root())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let pid = child.id().unwrap();
    // Until the child has exec'd, /proc shows this process's environment.
    while pair.a.leftovers().processes.is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let left = pair.a.leftovers();
    assert_eq!(left.processes, [(pid, "sleep 60".to_owned())]);
    assert_eq!(left.sockets, [dir.join("nbd.sock").to_string_lossy()]);
    assert_eq!(left.files, [dir.join("nbd.sock")]);
    assert!(pair.b.leftovers().is_empty(), "another host's are shown");
    child.kill().await.unwrap();
}
