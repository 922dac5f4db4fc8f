//! The worked example, with its file systems checked at every node.

use fake_xapi::demo::History;
use fake_xapi::scenario::Subject;
use fake_xapi::sxm::Flow;

use crate::{migrate, wrong};

async fn holds_by(flow: Flow) {
    let outcome = migrate(Subject::Example(History::make().unwrap()), flow, false).await;
    assert_eq!(wrong(&outcome.report), None, "\n{outcome}");
    assert_eq!(outcome.report.nodes.len(), 5);
    assert!(outcome.report.guests[0].acknowledged > 100, "\n{outcome}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_worked_example_migrates_by_the_flow_tree() {
    holds_by(Flow::Tree).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_worked_example_migrates_by_the_flow_base() {
    holds_by(Flow::Base).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_worked_example_migrates_by_the_flow_leaf() {
    holds_by(Flow::Leaf).await;
}
