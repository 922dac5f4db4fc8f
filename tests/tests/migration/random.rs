//! Random plans by every flow; FAKE_XAPI_PLANS says how many a flow.

use fake_xapi::plan::Plan;
use fake_xapi::scenario::Subject;
use fake_xapi::sxm::Flow;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use crate::strategy::plans;
use crate::{migrate, wrong};

fn holds_by(flow: Flow) {
    let cases = std::env::var("FAKE_XAPI_PLANS").ok().and_then(|text| text.parse().ok()).unwrap_or(5);
    let config = Config { cases, failure_persistence: None, max_shrink_time: 120_000, ..Config::default() };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let case = |plan: Plan| {
        let subject = Subject::of(plan.clone()).unwrap();
        match wrong(&runtime.block_on(migrate(subject, flow, false)).report) {
            None => Ok(()),
            Some(report) => Err(TestCaseError::fail(format!("{}\n{report}", plan.to_json()))),
        }
    };
    TestRunner::new(config).run(&plans(), case).unwrap();
}

#[test]
fn random_plans_migrate_by_the_flow_leaf() {
    holds_by(Flow::Leaf);
}

#[test]
fn random_plans_migrate_by_the_flow_tree() {
    holds_by(Flow::Tree);
}

#[test]
fn random_plans_migrate_by_the_flow_base() {
    holds_by(Flow::Base);
}
