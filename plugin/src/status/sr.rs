//! An SR and what brings its space back, as they are shown.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use serde::Serialize;

use super::Detail;
use super::trees::{Here, Tree, tree_of};
use crate::error::{Error, Result};
use crate::gc;
use crate::host::Host;
use crate::id::SrUuid;
use crate::store::Sr;

/// An SR.
#[derive(Debug, Default, Serialize)]
pub struct SrStatus {
    /// Its uuid.
    pub sr: String,
    /// Its name.
    pub name: String,
    /// Its directory.
    pub path: String,
    /// Why no more is told of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Bytes that are free.
    pub free: u64,
    /// Bytes that there are.
    pub total: u64,
    /// Trees.
    pub trees: usize,
    /// Volumes.
    pub volumes: usize,
    /// Nodes that no volume names.
    pub hidden: usize,
    /// Nodes of the longest chain.
    pub longest_chain: usize,
    /// Records that cannot be read, of trees for one: each with the reason.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unreadable: Vec<String>,
    /// Who brings space back, or did last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gc: Option<GcStatus>,
    /// The trees themselves, where they were looked at.
    #[serde(skip)]
    pub drawn: Vec<Tree>,
}

/// What brings space back.
#[derive(Debug, Serialize)]
pub struct GcStatus {
    /// What it does, while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub doing: Option<String>,
    /// Its process, while that runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<i32>,
    /// What it was doing when it was killed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub killed: Option<String>,
    /// Nodes that it has merged.
    pub merged: u64,
    /// What it left, and why.
    pub left: Vec<String>,
}

/// What is found while an SR is looked at.
enum Found {
    /// Something more is known.
    More,
    /// This is all.
    All(Box<SrStatus>),
}

/// A look at an SR, which the kernel may never come back from when its server is gone.
pub(super) struct Look {
    uuid: SrUuid,
    nothing: SrStatus,
    found: Receiver<Found>,
}

impl Look {
    /// Begins to look.
    pub(super) fn begin(host: &Host, uuid: SrUuid, detail: Detail) -> Self {
        // As the host's own record says, which is no file of the SR's.
        let path = Sr::attached_path(host, uuid).map(|path| path.display().to_string()).unwrap_or_default();
        let name = Sr::attached_names(host, uuid).map(|(name, _)| name).unwrap_or_default();
        let nothing = SrStatus { sr: uuid.to_string(), name, path, ..SrStatus::default() };
        let (tell, found) = channel();
        let host = host.clone();
        let look = move || {
            let status = look_at(&host, uuid, detail, &tell);
            let status =
                status.unwrap_or_else(|error| SrStatus { problem: Some(error.chain()), ..SrStatus::default() });
            // Who has given up does not want it.
            let _ = tell.send(Found::All(Box::new(status)));
        };
        // Without a thread it stays at nothing.
        let _ = thread::Builder::new().spawn(look);
        Self { uuid, nothing, found }
    }

    /// Gives what was found, once nothing more comes for as long as `patience`.
    pub(super) fn end(self, patience: Duration) -> SrStatus {
        let found = loop {
            match self.found.recv_timeout(patience) {
                Ok(Found::More) => {}
                Ok(Found::All(status)) => break *status,
                Err(RecvTimeoutError::Timeout) => {
                    let error = Error::Timeout {
                        doing: format!("asking the file system of SR {}", self.uuid),
                        seconds: patience.as_secs(),
                    };
                    break SrStatus { problem: Some(error.chain()), ..SrStatus::default() };
                }
                Err(RecvTimeoutError::Disconnected) => {
                    break SrStatus { problem: Some("nobody could look at it".to_owned()), ..SrStatus::default() };
                }
            }
        };
        let SrStatus { sr, name, path, .. } = self.nothing;
        if found.problem.is_some() { SrStatus { sr, name, path, ..found } } else { found }
    }
}

fn look_at(host: &Host, uuid: SrUuid, detail: Detail, tell: &Sender<Found>) -> Result<SrStatus> {
    let sr = Sr::attached(host, uuid)?;
    let described = sr.describe()?;
    let mut status = SrStatus {
        sr: uuid.to_string(),
        name: sr.record.name.clone(),
        path: sr.path.display().to_string(),
        free: described.free_space,
        total: described.total_space,
        ..SrStatus::default()
    };
    let here = Here::of(host);
    for id in sr.tree_ids()? {
        let _ = tell.send(Found::More);
        let loaded = match sr.read_tree(id) {
            Ok(Some(loaded)) => loaded,
            Ok(None) => continue,
            Err(error) => {
                status.unreadable.push(error.chain());
                continue;
            }
        };
        let tree = &loaded.tree;
        status.trees += 1;
        status.volumes += tree.volumes.len();
        status.hidden += tree.nodes.keys().filter(|node| !tree.is_named(**node)).count();
        let longest = tree.nodes.keys().map(|node| tree.chain(*node).len()).max().unwrap_or_default();
        status.longest_chain = status.longest_chain.max(longest);
        if detail == Detail::Full {
            status.drawn.push(tree_of(host, &here, &loaded));
        }
    }
    match gc::State::load(host, uuid) {
        Ok(state) => status.gc = state.map(|state| GcStatus::of(host, &sr, &state)),
        Err(error) => status.unreadable.push(error.chain()),
    }
    Ok(status)
}

impl GcStatus {
    fn of(host: &Host, sr: &Sr, state: &gc::State) -> Self {
        let doing = state.doing_now(host).map(str::to_owned);
        let left = state.still_undone(sr).into_iter();
        let left = left.map(|undone| format!("{} {}: {}", undone.subject(), undone.how(), undone.reason));
        Self {
            process: doing.as_ref().map(|_| state.worker.pid),
            killed: state.doing.clone().filter(|_| doing.is_none()),
            doing,
            merged: state.merged,
            left: left.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_sr_whose_file_system_does_not_answer_is_told_of_after_its_time() {
        let (uuid, (tell, found)) = (SrUuid::random(), channel());
        let nothing = SrStatus { sr: uuid.to_string(), name: "n".to_owned(), ..SrStatus::default() };
        // What is slow but comes is waited for.
        tell.send(Found::More).unwrap();
        let status = Look { uuid, nothing, found }.end(Duration::from_millis(10));
        assert_eq!((status.sr, status.name.as_str()), (uuid.to_string(), "n"));
        assert!(status.problem.unwrap().contains("asking the file system"));
        drop(tell);
    }
}
