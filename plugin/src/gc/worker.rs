//! The worker: one process that brings back what space can be, and ends.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::state::{MERGING, State, Undone};
use super::{NEXT, WORKING};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::id::{NodeId, TreeId};
use crate::lock::FileLock;
use crate::qemu::merge::{self, Copied};
use crate::qemu::{block_on, storage_daemon};
use crate::store::coalesce::{Ended, Merging, Next, Tried};
use crate::store::{Merge, Sr};
use crate::trace;

/// How often a worker that waits for the one before it looks whether it is still wanted.
const LOOK: Duration = Duration::from_secs(1);

/// How long those who stopped a merge are left alone.
const PAUSE: Duration = Duration::from_millis(300);

/// How often a worker takes up in one tree what others stop.
const STOPS: u32 = 100;

/// How often progress is written down.
const TOLD: Duration = Duration::from_secs(1);

/// Works until nothing is left that can be done now. `attached` says that the SR is attached on this host: then it works
/// no longer than that.
///
/// # Errors
///
/// When the SR cannot be used. What concerns one tree is no error, but kept in [`State`].
pub(super) fn run(host: &Host, sr: &Sr, attached: bool) -> Result<()> {
    let Some(next) = FileLock::try_acquire(&sr.path.join(NEXT))? else {
        tracing::info!("another worker is about to begin");
        return Ok(());
    };
    let is_wanted = || !attached || Sr::attached(host, sr.record.uuid).is_ok();
    let working = loop {
        match FileLock::acquire(&sr.path.join(WORKING), LOOK) {
            Err(Error::Timeout { .. }) if is_wanted() => {}
            lock => break lock?,
        }
    };
    // Whoever comes from now on may find what this one has passed already.
    unlock(next);
    let done = if is_wanted() { work(host, sr) } else { Ok(()) };
    unlock(working);
    done
}

/// Lets go of a lock whose file nobody needs.
fn unlock(lock: FileLock) {
    if let Err(error) = crate::record::remove(lock.path()) {
        tracing::warn!(error = error.chain(), "a lock's file is left");
    }
}

fn work(host: &Host, sr: &Sr) -> Result<()> {
    let uuid = sr.record.uuid;
    let directory = host.gc_dir(uuid);
    host.make_runtime_dir(&directory)?;
    let mut worker = Worker { host, sr, directory: &directory, state: State::begin(host)?, told: Instant::now() };
    worker.tell(Some("looking for garbage".to_owned()));
    let swept = sr.lock_sr(host).and_then(|lock| sr.sweep(host, &lock));
    if let Err(error) = swept {
        tracing::warn!(error = error.chain(), "garbage is left for later");
    }
    for tree in sr.tree_ids()? {
        if let Err(error) = worker.merge_all(tree) {
            tracing::warn!(%tree, error = error.chain(), "a tree is left as it is");
            worker.leave(tree, None, &error);
        }
    }
    worker.tell(None);
    let (merged, undone) = (worker.state.merged, worker.state.undone.len());
    tracing::info!(merged, undone, "done");
    trace::tag("qcow2.merged", merged);
    trace::tag("qcow2.undone", undone);
    drop(fs::remove_dir_all(&directory));
    if worker.state.undone.is_empty() { State::remove(host, uuid) } else { Ok(()) }
}

/// A worker at work.
struct Worker<'a> {
    host: &'a Host,
    sr: &'a Sr,
    /// Where it may make sockets.
    directory: &'a Path,
    state: State,
    /// When progress was written down last.
    told: Instant,
}

impl Worker<'_> {
    /// Merges what can be merged in a tree.
    fn merge_all(&mut self, tree: TreeId) -> Result<()> {
        // Without the lock: nearly all trees have nothing.
        if !self.sr.read_tree(tree)?.is_some_and(|loaded| loaded.has_merges()) {
            return Ok(());
        }
        let mut tried = Tried::default();
        let mut stops = 0;
        loop {
            let Some(mut locked) = self.sr.lock_tree(self.host, tree)? else { return Ok(()) };
            let next = locked.next_merge(self.host, &mut tried)?;
            drop(locked);
            match next {
                Next::Nothing(waiting) => {
                    let waiting = waiting.into_iter().map(|waiting| {
                        tracing::info!(%tree, node = %waiting.lower, reason = waiting.reason, "a node waits");
                        Undone { tree, node: Some(waiting.lower), reason: waiting.reason, failed: false }
                    });
                    self.state.undone.extend(waiting);
                    return Ok(());
                }
                Next::Merged => self.state.merged += 1,
                Next::Frozen => {}
                Next::Copy(merging) => {
                    let lower = merging.merge.lower;
                    match self.merge(*merging) {
                        Ok(Ended::Merged) => self.state.merged += 1,
                        Ok(Ended::Stopped) if stops == STOPS => {
                            let reason = "others always needed it".to_owned();
                            self.state.undone.push(Undone { tree, node: Some(lower), reason, failed: false });
                            tried.failed.insert(lower);
                        }
                        Ok(Ended::Stopped) => {
                            tracing::info!(%tree, node = %lower, "stopped");
                            stops += 1;
                            std::thread::sleep(PAUSE);
                        }
                        Err(error) => {
                            tracing::warn!(%tree, node = %lower, error = error.chain(), "a node is left");
                            self.leave(tree, Some(lower), &error);
                            tried.failed.insert(lower);
                        }
                    }
                }
            }
        }
    }

    /// Copies what is to be copied, without any lock but the merge's own, and makes the two nodes one.
    fn merge(&mut self, merging: Merging) -> Result<Ended> {
        let open = merging.live.map_or_else(String::new, |live| format!(", open for volume {}", live.volume));
        let Merge { lower, upper, direction } = merging.merge;
        let _timed = trace::timed("merge", &format!("{lower} {upper}"));
        let what = format!("{MERGING}{lower} and {upper}, {direction:?}{open}");
        tracing::info!(what, bytes = merging.bytes, "begins");
        self.tell(Some(what.clone()));
        let speed = self.host.settings()?.gc_live_mib.max(1) << 20;
        let live = merging.live.map(|_| speed);
        let task = merge::Task { chain: &merging.chain, direction: merging.merge.direction, live };
        let directory = self.directory;
        let copied = storage_daemon(self.host).and_then(|program| {
            let progress = |done, all| {
                if self.told.elapsed() >= TOLD {
                    self.tell(Some(format!("{what}: {done} of {all} bytes")));
                }
            };
            let stop = || merging.is_to_stop();
            block_on(merge::copy(&program.path, directory, task, merging.lock(), progress, stop))
        });
        match copied.and_then(|copied| merging.look_over(copied)) {
            Ok(Copied::All) => merging.end(self.host, self.sr),
            // Whoever asked takes the marker out.
            Ok(Copied::Stopped) => Ok(Ended::Stopped),
            Err(error) => {
                let undone = merging.abandon(self.host, self.sr);
                Err(error.undone(undone))
            }
        }
    }

    /// Notes what failed.
    fn leave(&mut self, tree: TreeId, node: Option<NodeId>, error: &Error) {
        self.state.undone.push(Undone { tree, node, reason: error.chain(), failed: true });
    }

    /// Writes down what it does.
    fn tell(&mut self, doing: Option<String>) {
        self.state.doing = doing;
        self.told = Instant::now();
        if let Err(error) = self.state.store(self.host, self.sr.record.uuid) {
            tracing::warn!(error = error.chain(), "what is done here cannot be seen");
        }
    }
}
