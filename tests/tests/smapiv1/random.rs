//! Random disks under random guests, one trouble each.
//!
//! They are the same on every run. FAKE_XAPI_SEED chooses others, and FAKE_XAPI_PLANS, of which `make sweep` has nine,
//! how many times as many are tried.

use anyhow::{Context, Result, ensure};
use fake_xapi::sxm::Quiet;
use fake_xapi::sxm::v1::{Import, Stretch};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

use crate::breaks::Break;
use crate::world::World;
use crate::{calls, moments};

/// Plans that `make test` tries.
const PLANS: u32 = 4;

const SECTOR: u64 = 512;

#[derive(Debug, Clone)]
struct Plan {
    size: u64,
    stretches: Vec<Stretch>,
    seed: u64,
    writes: u64,
    rests: bool,
    trouble: Index,
}

enum Trouble {
    Nothing,
    Call(calls::Case),
    Moment(moments::Case),
    Break(Break),
}

/// Any number of sectors: neither qcow2's nor this project's units.
fn plans() -> impl Strategy<Value = Plan> {
    let size = prop_oneof![1u64..=64, 65u64..=8192].prop_map(|sectors| sectors * SECTOR);
    let stretch = |size: u64| {
        (0..size, 1..=size, any::<u8>()).prop_map(move |(offset, length, byte)| {
            let offset = offset / SECTOR * SECTOR;
            Stretch { offset, length: length.min(size - offset), byte }
        })
    };
    let disk = size.prop_flat_map(move |size| (Just(size), prop::collection::vec(stretch(size), 0..6)));
    (disk, any::<u64>(), 0u64..80, any::<bool>(), any::<Index>()).prop_map(
        |((size, stretches), seed, writes, rests, trouble)| Plan { size, stretches, seed, writes, rests, trouble },
    )
}

fn troubles() -> Vec<Trouble> {
    let made = calls::calls_blocking();
    let nothing = (0..made.len()).map(|_| Trouble::Nothing);
    let moments = [moments::What::Cancelled, moments::What::Restarted].map(|what| moments::of_calls(what, &made));
    let kills = ["import-relay", "qemu-storage-daemon"].map(|what| Trouble::Break(Break::Kill(what)));
    let all = nothing.chain(calls::every(&made).into_iter().map(Trouble::Call));
    let all = all.chain(moments.into_iter().flatten().map(Trouble::Moment));
    all.chain(kills).collect()
}

fn number(variable: &str) -> Option<u32> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

async fn run(plan: &Plan, trouble: &Trouble, kept: &mut Option<World>) -> Result<()> {
    let mut world = match kept.take() {
        Some(world) => world,
        None => World::empty().await.context("the world")?,
    };
    (world.seed, world.writes, world.rests) = (plan.seed, plan.writes, plan.rests);
    world.replace_disk(plan.size, &plan.stretches).await?;
    *kept = Some(world);
    match trouble {
        Trouble::Call(case) => case.run(kept).await,
        Trouble::Moment(case) => case.run(kept).await,
        Trouble::Break(case) => case.run(kept).await,
        Trouble::Nothing => {
            let world = kept.as_ref().context("there is one")?;
            world.go_on().await;
            let import: Import<'_> = world.import();
            let migrated = world.migrate(&import, &Quiet).await?;
            world.arrived(&import, migrated).await
        }
    }
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nothing => f.write_str("nothing"),
            Self::Call(case) => case.fmt(f),
            Self::Moment(case) => case.fmt(f),
            Self::Break(case) => case.fmt(f),
        }
    }
}

#[test]
fn random_disks_arrive_whatever_happens() {
    let troubles = troubles();
    let cases = PLANS * number("FAKE_XAPI_PLANS").unwrap_or(1);
    let mut seed = [3; 32];
    seed[..4].copy_from_slice(&number("FAKE_XAPI_SEED").unwrap_or(0).to_le_bytes());
    let config = Config { cases, failure_persistence: None, max_shrink_time: 120_000, ..Config::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let kept = std::cell::RefCell::new(None);
    let case = |plan: Plan| {
        let trouble = plan.trouble.get(&troubles);
        println!("{} bytes, {} stretches, {} writes, {trouble}", plan.size, plan.stretches.len(), plan.writes);
        let mut world = kept.borrow_mut();
        let done = runtime.block_on(run(&plan, trouble, &mut world));
        done.map_err(|error| {
            // What a failure has left is not the next one's.
            *world = None;
            TestCaseError::fail(format!("{trouble}: {error:#}"))
        })
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    TestRunner::new_with_rng(config, rng).run(&plans(), case).unwrap();
    let closed = kept.take().map(|world| runtime.block_on(world.close()));
    let closed = closed.unwrap_or(Ok(())).and_then(|()| {
        ensure!(cases > 0, "nothing was tried");
        Ok(())
    });
    closed.unwrap();
}
