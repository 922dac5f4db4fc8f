//! The comparison of source and destination after a mirror that did not send everything, where it is asked for.

use std::time::Duration;

use plugin::error::{Error, Result};
use plugin::mirror::job::{self, COMPARED, TARGET_NODE};
use plugin::mirror::{How, Plan};
use plugin::nbd::Connection;
use plugin::qemu::daemon::Sockets;
use plugin::qemu::graph;
use plugin::qemu::qmp::Client;
use serde_json::json;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::relay::Relay;
use super::send::CLEAR_LOOKS;
use super::supervisor::{Outcome, Supervisor, want_end};

/// How much is compared at once, in bytes.
const CHUNK: u64 = 1 << 20;

impl Supervisor {
    /// Tells whether the destination is to be compared with the source: someone asked for it, and not everything was
    /// sent.
    pub(super) fn verifies(&self) -> bool {
        let is_full = matches!(self.record.plan, None | Some(Plan::Full(_)));
        !is_full && self.is_to_verify
    }

    /// Compares the destination with the source, byte by byte. The job has ended, and nobody writes to the source any
    /// more.
    ///
    /// # Errors
    ///
    /// When they differ, with the place; or one of them cannot be read.
    pub(super) async fn verify(&mut self, client: &Client, relay: &mut Relay) -> Result<Outcome> {
        job::end(client, CLEAR_LOOKS).await?;
        let source = graph::node_name(self.record.node);
        for (name, node) in COMPARED.into_iter().zip([source.as_str(), TARGET_NODE]) {
            let export = json!({"type": "nbd", "id": name, "name": name, "node-name": node, "writable": false});
            self.bounded(relay, client.execute("block-export-add", export)).await?;
        }
        let socket = Sockets::of(&self.host.volume_dir(self.record.volume)).nbd();
        let connect = async |name| {
            let stream = UnixStream::connect(&socket).await.map_err(Error::on("connecting to", &socket))?;
            Connection::open(stream, name).await
        };
        let [source, target] = COMPARED;
        let (mut source, mut target) = (connect(source).await?, connect(target).await?);
        let seconds = self.settings.peer_silence_seconds;
        let mut offset = 0;
        while offset < source.size() {
            let step = tokio::select! {
                step = timeout(Duration::from_secs(seconds), difference(&mut source, &mut target, offset)) => step,
                (how, reason) = want_end(&mut self.ends, &mut self.waiting) => match how {
                    How::Cancel => return Ok(Outcome::Cancelled(reason)),
                    How::Finish => {
                        self.wanted = Some((how, reason));
                        // A read was given up in the middle of its answer.
                        (source, target) = (connect(COMPARED[0]).await?, connect(COMPARED[1]).await?);
                        continue;
                    }
                },
            };
            match step {
                Ok(Ok(None)) => offset += CHUNK,
                Ok(Ok(Some(place))) => {
                    let reason = format!("source and destination differ at byte {place}");
                    return Err(Error::Qemu { doing: "verifying the mirror".to_owned(), reason });
                }
                Ok(Err(error)) => return Err(error),
                Err(_) => return Err(self.silent_peer()),
            }
        }
        tracing::info!(mirror = %self.record.key, bytes = source.size(), "source and destination are the same");
        Ok(Outcome::Finished)
    }
}

/// Compares a chunk, and gives the place of the first byte that differs. A destination may be longer than the source.
async fn difference(
    source: &mut Connection<UnixStream>,
    target: &mut Connection<UnixStream>,
    offset: u64,
) -> Result<Option<u64>> {
    // No longer than a chunk, which fits.
    let length = CHUNK.min(source.size() - offset) as usize;
    let (mut left, mut right) = (vec![0; length], vec![0; length]);
    let (read, also_read) = tokio::join!(source.read(offset, &mut left), target.read(offset, &mut right));
    read?;
    also_read?;
    if left == right {
        return Ok(None);
    }
    let place = left.iter().zip(&right).position(|(one, other)| one != other);
    Ok(place.map(|place| offset + place as u64))
}
