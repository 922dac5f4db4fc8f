//! Plans carried out on real images, and the model held against what came of them.

use fake_xapi::demo::{DISK, History, SNAPSHOTS};
use fake_xapi::disk::model_holds;
use fake_xapi::plan::{Plan, run};
use proptest::prelude::*;

use crate::machine::Chains;
use crate::strategy::plans;

async fn holds(plan: &Plan) -> Result<(), String> {
    let model = plan.model().map_err(|error| error.to_string())?;
    let mut chains = Chains::new(&plan.disks);
    let mut steps = 0;
    run(plan, &mut chains, |done| steps = done).await.map_err(|error| format!("{error:#}"))?;
    assert_eq!(steps, plan.steps.len());
    chains.close();
    for (index, disk) in model.disks().iter().enumerate() {
        if let Some(wrong) = model_holds(chains.leaf(index), disk, None).unwrap() {
            return Err(format!("disk {index}: {wrong}"));
        }
    }
    for snapshot in model.snapshots() {
        for (index, disk) in model.disks_of(snapshot).unwrap().iter().enumerate() {
            if let Some(wrong) = model_holds(chains.snapshot_image(snapshot, index), disk, None).unwrap() {
                return Err(format!("{snapshot}, disk {index}: {wrong}"));
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_plan_leaves_what_its_model_says(plan in plans()) {
        let plan = Plan { halted: true, ..plan };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        prop_assert_eq!(runtime.block_on(holds(&plan)), Ok(()), "{}", plan.to_json());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_random_plan_is_valid_and_survives_its_json(plan in plans()) {
        let json = plan.to_json().to_string();
        prop_assert_eq!(Plan::parse(json.as_bytes()), Ok(plan), "{}", json);
    }
}

#[tokio::test]
async fn the_worked_example_holds_its_file_systems_at_every_node() {
    let history = History::make().unwrap();
    let mut chains = Chains::new(&[DISK]);
    let mut told = Vec::new();
    history.play(&mut chains, &mut |what| told.push(what)).await.unwrap();
    chains.close();
    for name in SNAPSHOTS {
        history.check(Some(name), chains.snapshot_image(name, 0)).unwrap();
    }
    history.check(None, chains.leaf(0)).unwrap();
    assert!(history.check(Some("snap2"), chains.leaf(0)).is_err());
    assert_eq!(told.iter().filter(|what| what.starts_with("taking")).count(), 4);
}
