//! Everything at once: VMs that share two hosts, each with SRs of its own, whose guests write all the time while their disks
//! are snapshotted, reverted, resized, cloned and migrated to and fro, space is brought back, and things break at random.
//! What every block of every volume may hold is known all along.
//!
//! ```text
//!   lane 0 ── VM, 1 or 2 disks, guests ── an SR on host a ◄── migrations ──► an SR on host b
//!   lane 1 ── …                                 (the hosts, their /run and their proxies are everybody's)
//! ```
//!
//! `FAKE_XAPI_SOAK` gives the minutes that it takes, `FAKE_XAPI_SEED` other choices. What a lane does follows from the seed
//! alone; when something breaks in the middle of what is another lane's moment, so that a failure may need several runs.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "a test talks to people")]

mod breaks;
mod disk;
mod lane;
mod migrate;
mod site;

use std::time::{Duration, Instant};

use lane::Lane;
use site::Site;

/// VMs.
const LANES: usize = 3;

/// What a VM goes through in `make test`.
const OPERATIONS: usize = 14;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

#[test]
fn whatever_breaks_no_byte_is_lost_and_nothing_is_left() {
    let seed = number("FAKE_XAPI_SEED").unwrap_or(1);
    let until = number("FAKE_XAPI_SOAK").map(|minutes| Instant::now() + Duration::from_secs(minutes * 60));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    let result = local.block_on(&runtime, async {
        let site = Site::build(LANES).await?;
        let lanes = (0..LANES).map(|index| {
            let site = site.clone();
            tokio::task::spawn_local(async move {
                let mut lane = Lane::new(site, index, seed).await?;
                let result = lane.live(until, OPERATIONS).await;
                if let Err(error) = result {
                    anyhow::bail!("lane {index}: {error:#}\n{}", lane.told().await);
                }
                anyhow::Ok(lane.done())
            })
        });
        let mut done = Vec::new();
        let mut failed = Vec::new();
        for lane in lanes.collect::<Vec<_>>() {
            match lane.await? {
                Ok(counts) => done.push(counts),
                Err(error) => failed.push(error.to_string()),
            }
        }
        anyhow::ensure!(
            failed.is_empty(),
            "{}\n\nAgain: FAKE_XAPI_SEED={seed} cargo test -p fake-xapi --test soak",
            failed.join("\n\n")
        );
        site.ends_well().await?;
        anyhow::Ok(done)
    });
    for (index, counts) in result.unwrap().into_iter().enumerate() {
        eprintln!("soak: seed {seed}, lane {index}: {counts:?}");
    }
}
