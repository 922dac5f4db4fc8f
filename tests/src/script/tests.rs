//! Runs small shell scripts the way the daemon runs a plugin's.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::*;

fn plugin(scripts: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("fx-").tempdir().unwrap();
    for (name, body) in scripts {
        let path = dir.path().join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    dir
}

fn runner() -> Runner {
    Runner::new("a", Path::new("/tmp/fx-root"), CallLog::default(), Faults::default())
}

fn stat() -> Request {
    Request::volume("Volume.stat", "OpaqueRef:t", "sr", "k")
}

async fn call(body: &str) -> Result<Json, Failure> {
    let dir = plugin(&[("Volume.stat", body)]);
    runner().call(dir.path(), &stat()).await
}

#[tokio::test]
async fn a_script_gets_the_daemons_environment() {
    let answer = call(
        r#"in=$(cat); sig=$(sed -n 's/^SigIgn:\t//p' /proc/self/status)
           printf '["%s","%s","%s","%s","%s","%s"]' "$0" "$*" "$PWD" "$XAPI_STORAGE_QCOW2_ROOT" "${#in}" "$sig""#,
    )
    .await
    .unwrap();
    let parts = answer.strings("answer").unwrap();
    assert!(parts[0].starts_with('/') && parts[0].ends_with("/Volume.stat"), "{}", parts[0]);
    assert_eq!(parts[1..4], ["--json", "/", "/tmp/fx-root"]);
    assert_eq!(parts[4], stat().encode().len().to_string());
    let ignored = u64::from_str_radix(&parts[5], 16).unwrap();
    assert_ne!(ignored & (1 << 12), 0, "SIGPIPE is not ignored: {ignored:x}");
}

#[tokio::test]
async fn a_script_inherits_stray_descriptors() {
    let answer = call(r#"cat >/dev/null; n=0; for f in /proc/$$/fd/*; do n=$((n+1)); done; echo $n"#).await.unwrap();
    assert!(answer.int("n").unwrap() >= 3 + 6, "{answer:?}");
}

#[tokio::test]
async fn a_method_is_found_whatever_its_case_and_missing_ones_say_so() {
    let dir = plugin(&[("Plugin.Query", "cat >/dev/null; echo null")]);
    assert_eq!(runner().call(dir.path(), &Request::query("t")).await, Ok(Json::Null));
    let missing = runner().call(dir.path(), &stat()).await.unwrap_err();
    assert_eq!(missing.code, "SCRIPT_MISSING");
    std::fs::write(dir.path().join("Volume.stat"), "").unwrap();
    std::fs::set_permissions(dir.path().join("Volume.stat"), std::fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(runner().call(dir.path(), &stat()).await.unwrap_err().code, "SCRIPT_NOT_EXECUTABLE");
}

#[tokio::test]
async fn a_well_formed_error_keeps_its_code_and_any_other_loses_it() {
    let good = r#"echo '{"code":"C","params":["p"],"backtrace":{"error":"","files":[],"lines":[]}}'; exit 1"#;
    assert_eq!(call(good).await.unwrap_err().code, "C");
    for bad in ["exit 1", "echo '{}'; exit 1", "echo oops; exit 2", "echo null; exit 1"] {
        assert_eq!(call(bad).await.unwrap_err().code, "SCRIPT_FAILED", "{bad}");
    }
    let signalled = call("kill -9 $$").await.unwrap_err();
    assert_eq!((signalled.code.as_str(), signalled.params[1].as_str()), ("SCRIPT_FAILED", "signalled"));
}

#[tokio::test]
async fn anything_but_one_document_on_stdout_fails_and_stderr_does_not() {
    assert_eq!(call("echo noise >&2; echo null").await, Ok(Json::Null));
    for bad in ["echo log; echo null", "echo null; echo log", "true", "echo 9223372036854775808"] {
        assert_eq!(call(bad).await.unwrap_err().code, "SCRIPT_FAILED", "{bad}");
    }
}

#[tokio::test]
async fn a_background_child_that_holds_a_pipe_is_reported_by_method_and_pid() {
    let failure = call("sleep 7 2>/dev/null & echo null").await.unwrap_err();
    assert!(failure.params[0].ends_with("Volume.stat"), "{failure}");
    assert!(failure.params[2].contains("sleep 7"), "{failure}");
    assert_eq!(call("sleep 7 >/dev/null 2>&1 & echo null").await, Ok(Json::Null));
}

#[tokio::test]
async fn large_answers_and_requests_nobody_reads_do_not_hang() {
    let answer = call(
        "head -c 300000 /dev/zero | tr '\\0' e >&2; printf '\"'; head -c 300000 /dev/zero | tr '\\0' o; printf '\"'",
    )
    .await;
    assert_eq!(answer.unwrap().string("s").unwrap().len(), 300_000);
    let dir = plugin(&[("Volume.set", "echo null")]);
    let request = Request::volume_set("t", "sr", "k", "k", &"v".repeat(1 << 20));
    assert_eq!(runner().call(dir.path(), &request).await, Ok(Json::Null));
}

#[tokio::test]
async fn faults_strike_the_call_they_were_ordered_for() {
    let count = tempfile::NamedTempFile::new().unwrap();
    let body = format!("cat >/dev/null; echo x >> {}; echo null", count.path().display());
    let dir = plugin(&[("Volume.stat", &body), ("Volume.set", "exec sleep 20")]);
    let runner = runner();
    let runs = || std::fs::read_to_string(count.path()).unwrap().lines().count();

    runner.faults().nth_of("a", "Volume.stat", 1, Fault::FailInstead);
    assert!(runner.call(dir.path(), &stat()).await.is_ok());
    assert_eq!(runner.call(dir.path(), &stat()).await.unwrap_err().code, "INJECTED");
    assert!(runner.call(dir.path(), &stat()).await.is_ok());
    assert_eq!(runs(), 2);

    runner.faults().nth_of("a", "Volume.stat", 0, Fault::FailAfter);
    assert!(runner.call(dir.path(), &stat()).await.is_err());
    assert_eq!(runs(), 3);
    for twice in [Fault::TwiceAtOnce, Fault::TwiceInARow] {
        let before = runs();
        runner.faults().nth_of("a", "Volume.stat", 0, twice);
        assert!(runner.call(dir.path(), &stat()).await.is_ok());
        assert_eq!(runs(), before + 2);
    }
    runner.faults().nth_of("a", "Volume.set", 0, Fault::Kill(std::time::Duration::from_millis(50)));
    let killed = runner.call(dir.path(), &Request::volume_set("t", "sr", "k", "k", "v")).await.unwrap_err();
    assert_eq!(killed.params[1..], ["signalled", "9"]);

    let calls = runner.log().calls();
    assert_eq!(calls.len(), 7);
    assert_eq!(calls[1].fault.as_deref(), Some("FailInstead"));
    assert!(calls.iter().all(|c| c.ended.is_some()));
    assert_eq!(runner.log().order_since(6), ["a Volume.set"]);
}
