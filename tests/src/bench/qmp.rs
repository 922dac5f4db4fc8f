//! A bare QMP client on one open connection: what a plugin's calls are held against.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// No command and no event of a measurement takes longer, unless something hangs.
const BOUND: Duration = Duration::from_secs(300);

/// A connection to a monitor.
pub(super) struct Qmp {
    lines: tokio::io::Lines<BufReader<OwnedReadHalf>>,
    writer: OwnedWriteHalf,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects and negotiates.
    pub(super) async fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).await.with_context(|| socket.display().to_string())?;
        let (reader, writer) = stream.into_split();
        let mut client = Self { lines: BufReader::new(reader).lines(), writer, events: VecDeque::new() };
        client.next().await.context("no greeting")?;
        client.execute("qmp_capabilities", json!({})).await?;
        Ok(client)
    }

    /// Runs a command.
    pub(super) async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        self.writer.write_all(line.as_bytes()).await?;
        loop {
            let message = self.next().await.with_context(|| format!("no answer to {command}"))?;
            if let Some(error) = message.get("error") {
                bail!("{command}: {error}");
            }
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(answer) = message.get("return") {
                return Ok(answer.clone());
            }
        }
    }

    /// Waits for an event; one that came since the last that was waited for counts, and those before it are forgotten.
    pub(super) async fn event(&mut self, wanted: impl Fn(&str, &Value) -> bool) -> Result<()> {
        loop {
            let message = match self.events.pop_front() {
                Some(message) => message,
                None => self.next().await?,
            };
            if wanted(message["event"].as_str().unwrap_or_default(), &message["data"]) {
                return Ok(());
            }
        }
    }

    /// Runs a mirror job to READY.
    pub(super) async fn mirror(&mut self, arguments: Value) -> Result<()> {
        self.execute("blockdev-mirror", arguments).await?;
        self.event(|name, data| match (name, data["status"].as_str()) {
            ("JOB_STATUS_CHANGE", Some(status)) => ["ready", "concluded", "aborting"].contains(&status),
            _ => false,
        })
        .await
    }

    /// Ends a mirror job that is READY: drains it, and sees that it ended well.
    pub(super) async fn end_mirror(&mut self, job: &str) -> Result<()> {
        self.execute("block-job-cancel", json!({"device": job, "force": false})).await?;
        self.event(|name, data| name == "JOB_STATUS_CHANGE" && data["status"] == "concluded").await?;
        let jobs = self.execute("query-jobs", json!({})).await?;
        if let Some(error) = jobs.as_array().and_then(|jobs| jobs.iter().find_map(|job| job.get("error"))) {
            bail!("the mirror failed: {error}");
        }
        self.execute("job-dismiss", json!({"id": job})).await.map(drop)
    }

    async fn next(&mut self) -> Result<Value> {
        let line = tokio::time::timeout(BOUND, self.lines.next_line()).await.context("the monitor is silent")??;
        let line = line.context("the monitor has closed")?;
        serde_json::from_str(&line).with_context(|| format!("the monitor says {line}"))
    }
}

/// The NBD client's node of a mirror, as the plugin's supervisor adds it.
pub(super) fn nbd_node(name: &str, socket: &Path, export: &str) -> Value {
    json!({
        "driver": "nbd", "node-name": name, "export": export, "discard": "unmap", "detect-zeroes": "unmap",
        "server": {"type": "unix", "path": socket},
    })
}

/// A whole mirror of a node to a target node, as the plugin's supervisor starts it.
pub(super) fn mirror_job(job: &str, from: &str, target: &str) -> Value {
    json!({
        "job-id": job, "device": from, "target": target, "sync": "full", "copy-mode": "background",
        "auto-dismiss": false, "on-source-error": "report", "on-target-error": "report",
    })
}
