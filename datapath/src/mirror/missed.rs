//! What a guest writes while its mirror starts, and the mirror's job does not see (docs/qemu.md).
//!
//! ```text
//!   bitmap added ─► job starts ─► looks for what is allocated ─► follows writes ─► bitmap stopped ─► … ─► job ends
//!                        └───── a write to a new block is lost ─────┘                                      │
//!                                                                             what the bitmap has is sent ◄┘
//! ```
//!
//! A bitmap of our own sees every write. It is filled for as long as the job starts, which takes milliseconds, and
//! what it has is sent again when nobody writes any more.

use std::time::{Duration, Instant};

use plugin::error::Result;
use plugin::mirror::How;
use plugin::mirror::job::{self, BITMAP, COMPARED, JOB, JobInfo};
use plugin::nbd::Connection;
use plugin::qemu::daemon::Sockets;
use plugin::qemu::qmp::Client;
use plugin::qemu::{devices, graph};
use serde_json::json;
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

use super::relay::Relay;
use super::send::{CLEAR_LOOKS, broken};
use super::supervisor::{Outcome, Supervisor, want_end};

/// How often the job is looked at that sends what was missed: the guest is waiting.
const LOOK: Duration = Duration::from_millis(5);

/// What is known of writes that the job has not seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Missed {
    /// There are none.
    #[default]
    Nothing,
    /// The job starts, and they are noted.
    Noting,
    /// The job sees every write by now; these were noted before.
    Noted,
}

impl Supervisor {
    /// Begins to note what is written, before the job of a source that a guest writes to starts.
    pub(super) async fn note_writes(&mut self, client: &Client) -> Result<()> {
        let node = graph::node_name(self.record.node);
        client.execute("block-dirty-bitmap-add", json!({"node": node, "name": BITMAP})).await?;
        self.missed = Missed::Noting;
        Ok(())
    }

    /// Stops to note what is written once the job sees it: it has then said how much there is to do.
    pub(super) async fn stop_noting(&mut self, client: &Client, job: &JobInfo) -> Result<()> {
        if self.missed != Missed::Noting || (job.total == 0 && job.status != "ready") {
            return Ok(());
        }
        let node = graph::node_name(self.record.node);
        client.execute("block-dirty-bitmap-disable", json!({"node": node, "name": BITMAP})).await?;
        let device = devices::device(client, &node).await?;
        let noted = device.and_then(|device| device.bitmap(BITMAP).map(|bitmap| bitmap.bytes));
        if noted == Some(0) {
            self.missed = Missed::Nothing;
            client.execute("block-dirty-bitmap-remove", json!({"node": node, "name": BITMAP})).await?;
        } else {
            tracing::info!(mirror = %self.record.key, noted, "bytes were written while the mirror started");
            self.missed = Missed::Noted;
        }
        Ok(())
    }

    /// Sends again what was noted, and flushes it. The mirror's job has ended, and nobody writes any more.
    pub(super) async fn send_missed(&mut self, client: &Client, relay: &mut Relay) -> Result<Outcome> {
        if self.missed == Missed::Nothing {
            return Ok(Outcome::Finished);
        }
        job::end(client, CLEAR_LOOKS).await?;
        let arguments = json!({
            "job-id": JOB, "device": graph::node_name(self.record.node), "target": self.target, "sync": "bitmap",
            "bitmap": BITMAP, "bitmap-mode": "never", "auto-dismiss": false,
            "on-source-error": "report", "on-target-error": "report",
        });
        self.bounded(relay, client.execute("blockdev-backup", arguments)).await?;
        let limit = Duration::from_secs(self.settings.drain_seconds);
        let until = Instant::now() + limit;
        loop {
            match job::query(client).await? {
                Some(job) if job.status == "concluded" => match job.error {
                    None => break,
                    Some(reason) => return Err(broken(reason)),
                },
                Some(_) if Instant::now() < until => {}
                Some(_) => return Err(self.silent_peer()),
                None => return Err(broken("the job of the last writes disappeared".to_owned())),
            }
            tokio::select! {
                (how, reason) = want_end(&mut self.ends, &mut self.waiting) => if how == How::Cancel {
                    return Ok(Outcome::Cancelled(reason));
                },
                () = sleep(LOOK) => {}
            }
        }
        // A backup does not flush.
        let [_, name] = COMPARED;
        let export = json!({"type": "nbd", "id": name, "name": name, "node-name": self.target, "writable": true});
        self.bounded(relay, client.execute("block-export-add", export)).await?;
        let socket = Sockets::of(&self.host.volume_dir(self.record.volume)).nbd();
        let flush = async {
            let stream = UnixStream::connect(&socket).await.map_err(plugin::Error::on("connecting to", &socket))?;
            let mut target = Connection::open(stream, name).await?;
            target.flush().await?;
            target.close().await
        };
        timeout(limit, flush).await.unwrap_or_else(|_| Err(self.silent_peer()))?;
        job::clear_exports(client, CLEAR_LOOKS).await?;
        Ok(Outcome::Finished)
    }
}
