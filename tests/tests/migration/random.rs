//! Random plans, a third by each flow, in shards that run side by side.
//!
//! The plans are the same on every run. FAKE_XAPI_SEED chooses others, and FAKE_XAPI_PLANS how many a lane tries.

use fake_xapi::plan::Plan;
use fake_xapi::scenario::{Outcome, Subject, place_with};
use fake_xapi::sxm::Flow;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use crate::strategy::plans;
use crate::{migrate_in, wrong};

/// Plans a lane; three flows have four shards of two lanes each, which makes 48 plans. `make sweep` tries 216, of which
/// these are the first.
const PLANS: u32 = 2;

/// Lanes of a shard, which run at once: a migration waits as long as it computes.
const LANES: u8 = 2;

/// Bytes that must be free in memory for the plans to run there.
const ROOM: u64 = 2 << 30;

fn number(variable: &str) -> Option<u32> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

fn holds(flow: Flow, shard: u8) {
    let lane = |lane| move || try_plans(flow, shard * LANES + lane);
    let lanes = std::thread::scope(|scope| {
        let lanes: Vec<_> = (0..LANES).map(|number| scope.spawn(lane(number))).collect();
        lanes.into_iter().map(|lane| lane.join().unwrap()).collect::<Vec<_>>()
    });
    for tried in lanes {
        tried.unwrap();
    }
}

fn try_plans(flow: Flow, lane: u8) -> Result<(), TestError<Plan>> {
    let cases = number("FAKE_XAPI_PLANS").unwrap_or(PLANS);
    let mut seed = [lane; 32];
    seed[..4].copy_from_slice(&number("FAKE_XAPI_SEED").unwrap_or(0).to_le_bytes());
    let config = Config { cases, failure_persistence: None, max_shrink_time: 120_000, ..Config::default() };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let place = place_with(ROOM);
    let case = |plan: Plan| {
        let subject = Subject::of(plan.clone()).unwrap();
        let Outcome { report, calls, .. } = runtime.block_on(migrate_in(place, subject, flow, false));
        let seconds: Vec<_> = report.seconds.iter().map(|(phase, seconds)| format!("{phase} {seconds:.1}")).collect();
        println!("{} {lane}: {} steps, {}", flow.name(), plan.steps.len(), seconds.join(", "));
        match wrong(&report) {
            None => Ok(()),
            Some(report) => Err(TestCaseError::fail(format!("{}\n{report}\n{}", plan.to_json(), calls.join("\n")))),
        }
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    TestRunner::new_with_rng(config, rng).run(&plans(), case)
}

macro_rules! shards {
    ($($name:ident: $flow:ident $shard:literal;)*) => {$(
        #[test]
        fn $name() {
            holds(Flow::$flow, $shard);
        }
    )*};
}

shards! {
    random_plans_by_the_flow_leaf_0: Leaf 0;
    random_plans_by_the_flow_leaf_1: Leaf 1;
    random_plans_by_the_flow_leaf_2: Leaf 2;
    random_plans_by_the_flow_leaf_3: Leaf 3;
    random_plans_by_the_flow_tree_0: Tree 0;
    random_plans_by_the_flow_tree_1: Tree 1;
    random_plans_by_the_flow_tree_2: Tree 2;
    random_plans_by_the_flow_tree_3: Tree 3;
    random_plans_by_the_flow_base_0: Base 0;
    random_plans_by_the_flow_base_1: Base 1;
    random_plans_by_the_flow_base_2: Base 2;
    random_plans_by_the_flow_base_3: Base 3;
}
