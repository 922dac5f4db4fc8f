//! The block job of a mirror in the storage daemon, and the nodes that only it uses.

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::host::Host;
use crate::id::VolumeKey;
use crate::qemu::qmp::Client;

/// The job's id.
pub const JOB: &str = "mirror";

/// The node of the NBD client.
pub const TARGET_NODE: &str = "mirror-target";

/// The node above it that cuts a larger destination to the source's size.
pub const SIZED_NODE: &str = "mirror-sized";

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

/// Removes the job, which must have lost its peer, and the target's nodes; what is not there is no error.
///
/// # Errors
///
/// When the daemon does not answer, or the job does not end in `attempts` looks of 10 ms each.
pub async fn clear(client: &Client, attempts: u32) -> Result<()> {
    end(client, attempts).await?;
    remove_nodes(client).await
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

/// Removes the target's nodes, outermost first; the NBD client says goodbye to its server.
async fn remove_nodes(client: &Client) -> Result<()> {
    let nodes = client.execute("query-named-block-nodes", json!({"flat": true})).await?;
    for name in [SIZED_NODE, TARGET_NODE] {
        let is_there =
            |nodes: &Value| nodes.as_array().is_some_and(|nodes| nodes.iter().any(|node| node["node-name"] == name));
        if is_there(&nodes) {
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
