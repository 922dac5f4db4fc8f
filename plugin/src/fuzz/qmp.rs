//! A monitor that says anything: greetings, answers, events, half lines.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;

use super::judge;
use crate::error::Error;
use crate::qemu::fuzzed::{FileIdentity, understand};
use crate::qemu::qmp::Client;

/// The commands that are sent, behind that for the use of the monitor.
const COMMANDS: [&str; 3] = ["one", "two", "three"];

/// Says the input to a client: `@0` to `@3` in it are the ids of its commands, and where it has a zero byte the line is
/// broken off for a moment.
pub(super) fn run(input: &[u8]) {
    if let Err(reason) = understand(input, FileIdentity::default()) {
        assert!(!reason.is_empty() && reason.len() <= 2000, "{reason:.200}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let directory = tempfile::Builder::new().prefix("fx-fuzz-").tempdir().unwrap();
        let path = directory.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let monitor = async {
            let mut stream = BufReader::new(listener.accept().await.unwrap().0);
            let mut ids = Vec::new();
            let mut line = String::new();
            while ids.len() <= COMMANDS.len() && stream.read_line(&mut line).await.unwrap() > 0 {
                let command: Value = serde_json::from_str(&line).unwrap();
                ids.push(command["id"].to_string().into_bytes());
                line.clear();
            }
            for part in said(input, &ids).split(|byte| *byte == 0) {
                // The client may have hung up.
                if stream.write_all(part).await.is_err() {
                    return;
                }
                tokio::task::yield_now().await;
            }
            let _ = stream.shutdown().await;
            let _ = stream.read_to_end(&mut Vec::new()).await;
        };
        let client = async {
            let client = Client::connect_at_once(&path, Duration::from_secs(60)).await.unwrap();
            let mut events = client.events();
            match client.execute_all(&COMMANDS.map(|command| (command, json!({})))).await {
                Ok(answers) => {
                    assert_eq!(answers.len(), COMMANDS.len());
                    answers.iter().filter_map(|answer| answer.as_ref().err()).for_each(judge_answer);
                }
                Err(error) => judge_answer(&error),
            }
            let last = loop {
                match events.next().await {
                    Ok(event) => drop(event),
                    Err(error) => break error,
                }
            };
            judge_answer(&last);
        };
        tokio::join!(monitor, client);
    });
}

/// Puts the ids of the client's commands in their places.
fn said(input: &[u8], ids: &[Vec<u8>]) -> Vec<u8> {
    let mut said = Vec::with_capacity(input.len());
    let mut rest = input;
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        let id = after.first().and_then(|digit| ids.get(usize::from(digit.wrapping_sub(b'0'))));
        match id.filter(|_| *byte == b'@') {
            Some(id) => {
                said.extend(id);
                rest = &after[1..];
            }
            None => said.push(*byte),
        }
    }
    said
}

/// Judges why a command failed, or no event will come.
fn judge_answer(error: &Error) {
    assert!(matches!(error, Error::Qemu { .. } | Error::Qmp { .. } | Error::NoSpace { .. }), "{error:?}");
    judge(error, "QMP");
}
