//! A migration to the other side, and what breaks in it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fake_xapi::host::Host;
use fake_xapi::smapiv2::Vdi;
use fake_xapi::sxm::{self, Event, Failed, Flow, Migration};
use tokio::task::JoinHandle;

use crate::lane::Lane;

/// What breaks.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Break {
    Nothing,
    Script,
    Wire,
    SourceDaemon,
    DestinationDaemon,
    Supervisor,
    Cancelled,
}

const BREAKS: [Break; 10] = [
    Break::Nothing,
    Break::Nothing,
    Break::Nothing,
    Break::Script,
    Break::Script,
    Break::Wire,
    Break::SourceDaemon,
    Break::DestinationDaemon,
    Break::Supervisor,
    Break::Cancelled,
];

impl Lane {
    /// Migrates the VM. Where nothing breaks that succeeds; else it either does, or leaves everything as it was.
    pub async fn migrate(&mut self) -> Result<()> {
        let (here, there) = (self.here(), self.there());
        let halted = self.random.below(5) == 0;
        let flow = *self.random.pick(&[Flow::Tree, Flow::Base]);
        let mut harm = *self.random.pick(&BREAKS);
        if halted && harm == Break::SourceDaemon {
            harm = Break::Nothing;
        }
        self.tell(format!("migrate by {}{}: {harm:?}", flow.name(), if halted { ", halted" } else { "" }));
        if halted {
            self.halt().await?;
        }
        let migration =
            Migration { poll: Duration::from_millis(20), ..Migration::new(self.vm, &there.host, &there.sr, flow) };
        let volumes = self.volumes(self.vm)?;
        let hit = self.random.below(volumes.len());
        let killer = self.arm(harm, &migration, &volumes[hit])?;
        let failures_before = self.disks.failures().await.0;
        let result = sxm::migrate(&self.site.xapi, &migration, &*self.disks).await;
        self.disks.at_nothing();
        let names: Vec<&str> = volumes.iter().map(|volume| volume.0.as_str()).collect();
        self.site.breaks.none_of(&[&here.sr, &there.sr], &names);
        let guest_was_hit = killer.end().await;
        match result {
            Ok(migrated) => {
                self.at = 1 - self.at;
                self.tell("  succeeded".to_owned());
                if harm == Break::Nothing {
                    ensure!(migrated.not_destroyed.is_empty(), "left: {:?}", migrated.not_destroyed);
                }
                sxm::release(&here.host, &migrated.stale).await.context("the release of a halted VM's receiver")?;
            }
            Err(failed) => {
                let Failed { error, phase, restarted, .. } = &*failed;
                self.tell(format!("  failed in {phase}: {error}, restarted {restarted}"));
                ensure!(harm != Break::Nothing, "it failed in {phase} although nothing broke: {error}");
            }
        }
        if harm != Break::Nothing {
            self.clean_by_hand().await?;
        }
        if halted {
            self.boot().await?;
        } else if self.site.xapi.vm(self.vm)?.domid.is_none() {
            // What broke kept it from being started again.
            self.boot().await?;
        } else if self.disks.is_hit(hit).await {
            self.disks.crash(hit).await;
            self.reboot().await?;
        }
        if !guest_was_hit {
            let (failures, errors) = self.disks.failures().await;
            ensure!(failures == failures_before, "the guests' commands failed: {errors:?}");
        }
        self.disks.writes(5).await.context("the guests after a migration")?;
        self.there().is_empty().await.context("the side without the VM")
    }

    /// Has something break.
    fn arm(&mut self, harm: Break, migration: &Migration, leaf: &Vdi) -> Result<Killer> {
        let killer = Killer::default();
        let (here, there) = (self.here(), self.there());
        match harm {
            Break::Nothing => {}
            Break::Script => {
                let told = self.site.breaks.a_script(&mut self.random, &[&here.sr, &there.sr]);
                self.tell(format!("  breaks: {told}"));
            }
            Break::Wire => {
                let told = self.site.breaks.a_wire(&mut self.random, &leaf.0);
                self.tell(format!("  breaks: {told}"));
            }
            Break::Cancelled => {
                let (cancel, after) = (migration.cancel.clone(), self.random.below(2500) as u64);
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(after)).await;
                    cancel.ask();
                });
            }
            Break::SourceDaemon | Break::DestinationDaemon | Break::Supervisor => {
                let (leaf, killer, disks) = (leaf.clone(), killer.clone(), Arc::clone(&self.disks));
                let after = Duration::from_millis(self.random.below(700) as u64);
                self.disks.at(move |event| {
                    let Event::Started { source, destination } = event else { return };
                    if *source != leaf {
                        return;
                    }
                    let (source, destination, disks) = (source.clone(), destination.clone(), Arc::clone(&disks));
                    let (from, to) = (Arc::clone(&here.host), Arc::clone(&there.host));
                    killer.begin(tokio::spawn(async move {
                        tokio::time::sleep(after).await;
                        match harm {
                            Break::SourceDaemon => disks.kill_daemon(&from, &source).await,
                            Break::DestinationDaemon => disks.kill_daemon(&to, &destination).await,
                            _ => {
                                kill_supervisor(&from, &source);
                                false
                            }
                        }
                    }));
                });
            }
        }
        Ok(killer)
    }
}

/// Whoever kills something in a migration. What comes after it is not his.
#[derive(Clone, Default)]
struct Killer(Arc<Mutex<Option<JoinHandle<bool>>>>);

impl Killer {
    fn begin(&self, task: JoinHandle<bool>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
    }

    /// Kills nothing any more. Tells whether a guest has lost its daemon.
    async fn end(&self) -> bool {
        let Some(task) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() else { return false };
        task.abort();
        task.await.unwrap_or(false)
    }
}

/// Kills the supervisors whose mirrors are of a volume.
fn kill_supervisor(host: &Host, volume: &Vdi) {
    let Ok(entries) = std::fs::read_dir(host.runtime_dir().join("mirrors")) else { return };
    let keys = entries.flatten().filter(|entry| {
        std::fs::read_to_string(entry.path().join("state.json")).is_ok_and(|record| record.contains(&volume.0))
    });
    let keys: Vec<String> = keys.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    host.kill(|command| command.contains("mirror-supervisor") && keys.iter().any(|key| command.contains(key)));
}
