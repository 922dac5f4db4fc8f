//! The block job of a mirror in the storage daemon, and the nodes that only it uses.

use serde_json::json;

use crate::error::{Error, Result};
use crate::host::Host;
use crate::id::VolumeKey;
use crate::qemu::qmp::Client;
use crate::qemu::{devices, graph};

/// The job's id.
pub const JOB: &str = "mirror";

/// The node of the NBD client.
pub const TARGET_NODE: &str = "mirror-target";

/// The node above it that cuts a larger destination to the source's size.
pub const SIZED_NODE: &str = "mirror-sized";

/// The two nodes of a layer that is sent by a job of its own, the upper one first.
pub const LAYER_NODES: [&str; 2] = ["mirror-layer", "mirror-layer-file"];

/// The exports by which source and target are compared.
pub const COMPARED: [&str; 2] = ["mirror-source", "mirror-target"];

/// The bitmap of what is written to a node while the mirror's job starts.
pub const BITMAP: &str = "mirror-start";

/// What QEMU says of a job (QAPI JobInfo).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobInfo {
    /// Its status: `running`, `ready`, `concluded`, ….
    pub status: String,
    /// How much was done.
    pub current: u64,
    /// How much there is to do.
    pub total: u64,
    /// Why it failed, once it is concluded.
    pub error: Option<String>,
}

/// Asks for the state of the mirror's job; `None` when there is no such job.
///
/// # Errors
///
/// When the daemon does not answer.
pub async fn query(client: &Client) -> Result<Option<JobInfo>> {
    let jobs = client.execute("query-jobs", json!({})).await?;
    let jobs = jobs.as_array().map(Vec::as_slice).unwrap_or_default();
    Ok(jobs.iter().find(|job| job["id"] == JOB).map(|job| JobInfo {
        status: job["status"].as_str().unwrap_or_default().to_owned(),
        current: job["current-progress"].as_u64().unwrap_or_default(),
        total: job["total-progress"].as_u64().unwrap_or_default(),
        error: job["error"].as_str().map(str::to_owned),
    }))
}

/// Removes the job, which must have ended or lost its peer, and everything else of a mirror, the guest's pace among it;
/// what is not there is no error.
///
/// # Errors
///
/// When the daemon does not answer, or something does not go in `attempts` looks of 10 ms each.
pub async fn clear(client: &Client, attempts: u32) -> Result<()> {
    // First of all: the guest is not to wait for whatever else does not go.
    graph::pace(client, None).await?;
    end(client, attempts).await?;
    clear_exports(client, attempts).await?;
    remove_bitmap(client).await?;
    let [layer, file] = LAYER_NODES;
    remove_nodes(client, &[SIZED_NODE, TARGET_NODE, layer, file]).await
}

/// Removes the job, which has ended well, and its nodes: what is left of a mirror that was not compared.
///
/// # Errors
///
/// As [`clear`].
pub async fn finish(client: &Client, attempts: u32) -> Result<()> {
    // At once: the downtime of a migration waits for it. A node that is not there is refused.
    let delete = |name: &str| ("blockdev-del", json!({"node-name": name}));
    let commands = [("job-dismiss", json!({"id": JOB})), delete(SIZED_NODE), delete(TARGET_NODE)];
    if let [Ok(_), _, Ok(_)] = client.execute_all(&commands).await?.as_slice() {
        return Ok(());
    }
    end(client, attempts).await?;
    remove_nodes(client, &[SIZED_NODE, TARGET_NODE]).await
}

/// Removes the job of one layer, which has ended, and what only that needed; the target stays.
///
/// # Errors
///
/// As [`clear`].
pub async fn clear_layer(client: &Client, attempts: u32) -> Result<()> {
    end(client, attempts).await?;
    let [layer, file] = LAYER_NODES;
    remove_nodes(client, &[SIZED_NODE, layer, file]).await
}

/// Ends the job, whatever of it is left undone, and keeps the target's nodes; no job is no error.
///
/// # Errors
///
/// As [`clear`].
pub async fn end(client: &Client, attempts: u32) -> Result<()> {
    let mut asked = false;
    for _ in 0..attempts {
        match query(client).await? {
            None => return Ok(()),
            Some(job) if job.status == "concluded" => {
                client.execute("job-dismiss", json!({"id": JOB})).await?;
            }
            Some(_) => {
                if !asked {
                    asked = true;
                    // Refused while the job is ending by itself, which is as good.
                    let _ = client.execute("block-job-cancel", json!({"device": JOB, "force": true})).await;
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        }
    }
    Err(Error::Timeout { doing: "ending the mirror's block job".to_owned(), seconds: u64::from(attempts / 100) })
}

/// Removes the bitmap, whichever node has it.
async fn remove_bitmap(client: &Client) -> Result<()> {
    for device in devices::devices(client).await? {
        if device.bitmap(BITMAP).is_some() {
            client.execute("block-dirty-bitmap-remove", json!({"node": device.name, "name": BITMAP})).await?;
        }
    }
    Ok(())
}

/// Removes the exports by which source and target are compared, and cuts off who reads them.
///
/// # Errors
///
/// As [`clear`].
pub async fn clear_exports(client: &Client, attempts: u32) -> Result<()> {
    for _ in 0..attempts {
        let exports = client.execute("query-block-exports", json!({})).await?;
        let exports = exports.as_array().map(Vec::as_slice).unwrap_or_default();
        let ours = exports.iter().filter_map(|export| export["id"].as_str()).filter(|id| COMPARED.contains(id));
        let ours: Vec<&str> = ours.collect();
        if ours.is_empty() {
            return Ok(());
        }
        for id in ours {
            // Refused for one that is going already.
            let _ = client.execute("block-export-del", json!({"id": id, "mode": "hard"})).await;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    Err(Error::Timeout { doing: "removing a mirror's exports".to_owned(), seconds: u64::from(attempts / 100) })
}

/// Removes nodes that are there, in the order given: outermost first. The NBD client says goodbye to its server.
async fn remove_nodes(client: &Client, names: &[&str]) -> Result<()> {
    let devices = devices::devices(client).await?;
    for name in names {
        if devices.iter().any(|device| device.name.as_deref() == Some(name)) {
            client.execute("blockdev-del", json!({"node-name": name})).await?;
        }
    }
    Ok(())
}

/// Removes what a dead supervisor left in the storage daemon of a volume, if that lives.
///
/// # Errors
///
/// When the daemon lives and does not answer.
pub fn clear_after_death(host: &Host, volume: VolumeKey) -> Result<()> {
    let settings = host.settings()?;
    let socket = host.volume_dir(volume).join("mirror.sock");
    crate::qemu::block_on(async {
        match Client::connect(&socket, settings.qmp()).await {
            Ok(client) => clear(&client, 1000).await,
            // Nobody listens: a daemon that is gone took its jobs with it.
            Err(Error::Io { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    })
}
