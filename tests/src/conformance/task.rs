//! Task.*: the operations of Data, asked for by their keys.

use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use uuid::Uuid;

use super::bench::{DBG, MIB, refused};
use super::mirror::{completed, target};
use super::relay::Relay;
use super::request::remote_of;
use super::{Bench, Group, Need};
use crate::wire::{Json, Operation, Request};

const STAT: Need = Need::Method("Task.stat");
const MIRROR: Need = Need::Method("Data.mirror");

pub(super) fn checks(group: &mut Group<'_>) {
    group.add("Task.stat follows a mirror from pending to completed", &[STAT, MIRROR], followed);
    group.add("Task.ls lists a mirror until Task.destroy", &[Need::Method("Task.ls"), MIRROR], listed);
    group.add(
        "Task.destroy of a task that goes on is refused, and Task.cancel makes it failed",
        &[STAT, MIRROR],
        cancel,
    );
    group.add("an unknown task is refused or nothing, and never a crash", &[STAT], unknown);
}

fn task(method: &'static str, key: &str) -> Request {
    Request::new(method, DBG, vec![("id", key.into())])
}

/// The tag and payload of a task's state, with the other fields looked at.
async fn state(b: &Bench, key: &str) -> Result<(String, Json)> {
    let answer = b.call(&task("Task.stat", key)).await?;
    let f = answer.fields("task")?;
    ensure!(f.required("id", Json::string)? == key, "another task's id");
    ensure!(f.required("debug_info", Json::string)? == DBG, "the caller is not named");
    ensure!(f.required("ctime", Json::number)? > 1e9, "it was started long ago");
    Ok(f.required("state", |value, at| value.variant(at).map(|(tag, payload)| (tag.to_owned(), payload.clone())))?)
}

/// A mirror that cannot go on for now.
async fn stalled(b: &Bench) -> Result<(String, Operation, Relay)> {
    let volume = b.create(4 * MIB).await?;
    b.write(&volume, 0, 2 * MIB as usize, 1).await?;
    let (_, uri) = target(b, 4 * MIB).await?;
    let relay = Relay::start(b.directory(), "relay", &uri, 300 << 10)?;
    b.attach(&volume, "u0_mirror").await?;
    let operation = b.mirror(&volume, "-1", &remote_of(relay.uri())).await?;
    match &operation {
        Operation::Mirror(key) => Ok((key.clone(), operation, relay)),
        Operation::Copy(_) => bail!("a mirror is called a copy"),
    }
}

async fn followed(b: Arc<Bench>) -> Result<()> {
    let (key, operation, relay) = stalled(&b).await?;
    let (tag, progress) = state(&b, &key).await?;
    ensure!(tag == "Pending" && (0.0..=1.0).contains(&progress.number("progress")?), "{tag} {progress:?}");
    relay.allow(u64::MAX);
    completed(&b.data_wait(&operation).await?)?;
    let (tag, completion) = state(&b, &key).await?;
    ensure!(tag == "Completed", "{tag} {completion:?}");
    ensure!(completion.fields("completion")?.required("duration", Json::number)? >= 0.0, "{completion:?}");
    Ok(())
}

async fn listed(b: Arc<Bench>) -> Result<()> {
    let list = Request::new("Task.ls", DBG, vec![]);
    ensure!(tasks(&b.call(&list).await?)?.is_empty(), "there are tasks that nobody started");
    let (key, operation, relay) = stalled(&b).await?;
    ensure!(tasks(&b.call(&list).await?)? == [key.clone()], "it is not listed alone");
    relay.allow(u64::MAX);
    completed(&b.data_wait(&operation).await?)?;
    for _ in 0..2 {
        b.call(&task("Task.destroy", &key)).await?;
    }
    ensure!(tasks(&b.call(&list).await?)?.is_empty(), "destroyed, but listed");
    refused(state(&b, &key).await)?;
    Ok(())
}

async fn cancel(b: Arc<Bench>) -> Result<()> {
    let (key, operation, _relay) = stalled(&b).await?;
    refused(b.call(&task("Task.destroy", &key)).await)?;
    for _ in 0..2 {
        b.call(&task("Task.cancel", &key)).await?;
        let (tag, why) = state(&b, &key).await?;
        ensure!(tag == "Failed", "{tag} {why:?}");
        why.string("reason")?;
    }
    let status = b.data_stat(&operation).await?;
    ensure!(status.failed && !status.complete, "{status:?}");
    b.call(&task("Task.destroy", &key)).await.map(drop)
}

async fn unknown(b: Arc<Bench>) -> Result<()> {
    for key in [Uuid::new_v4().to_string(), "../../x".to_owned(), String::new()] {
        refused(b.call(&task("Task.stat", &key)).await)?;
        for method in ["Task.cancel", "Task.destroy"] {
            if let Err(error) = b.call(&task(method, &key)).await {
                refused::<()>(Err(error))?;
            }
        }
    }
    Ok(())
}

fn tasks(answer: &Json) -> Result<Vec<String>> {
    Ok(answer.strings("tasks")?)
}
