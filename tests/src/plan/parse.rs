//! A plan's JSON, read with errors that name the place.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Action, Error, Extent, GuestPlan, Plan, Step};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPlan {
    size: Option<u64>,
    disks: Option<Vec<Value>>,
    steps: Vec<Value>,
    guest: Option<RawGuest>,
    #[serde(default)]
    halted: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawGuest {
    writes_per_second: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDisk {
    size: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawStep {
    disk: Option<usize>,
    write: Option<RawWrite>,
    discard: Option<RawExtent>,
    zero: Option<RawExtent>,
    resize: Option<u64>,
    snapshot: Option<String>,
    revert: Option<String>,
    destroy: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawWrite {
    disk: Option<usize>,
    offset: u64,
    length: u64,
    seed: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawExtent {
    disk: Option<usize>,
    offset: u64,
    length: u64,
}

pub(super) fn read(json: &[u8]) -> Result<Plan, Error> {
    let raw: RawPlan = serde_json::from_slice(json).map_err(|error| Error(format!("the plan: {error}")))?;
    let disks = match (raw.disks, raw.size) {
        (Some(disks), size) => {
            let read = |(index, value)| read_disk(value, size).map_err(|why| Error(format!("disks[{index}]: {why}")));
            disks.into_iter().enumerate().map(read).collect::<Result<Vec<_>, _>>()?
        }
        (None, Some(size)) => vec![size],
        (None, None) => {
            return Err(Error("the plan: neither `size` nor `disks` is given".to_owned()));
        }
    };
    let count = disks.len();
    let read = |(index, value)| read_step(value, count).map_err(|why| Error(format!("steps[{index}]: {why}")));
    let steps = raw.steps.into_iter().enumerate().map(read).collect::<Result<Vec<_>, _>>()?;
    let guest =
        raw.guest.map(|guest| GuestPlan { writes_per_second: guest.writes_per_second.filter(|writes| *writes > 0) });
    Ok(Plan { disks, steps, guest, halted: raw.halted })
}

/// A disk without a size of its own has the plan's.
fn read_disk(value: Value, size: Option<u64>) -> Result<u64, String> {
    if let Some(size) = value.as_u64() {
        return Ok(size);
    }
    let disk: RawDisk = serde_json::from_value(value).map_err(|error| error.to_string())?;
    disk.size.or(size).ok_or_else(|| "it has no size, and neither has the plan".to_owned())
}

fn read_step(value: Value, disks: usize) -> Result<Step, String> {
    let RawStep { disk, write, discard, zero, resize, snapshot, revert, destroy } =
        serde_json::from_value(value).map_err(|error| error.to_string())?;
    let place = |inner: Option<usize>| {
        let disk = match (disk, inner) {
            (Some(outer), Some(inner)) if outer != inner => {
                return Err(format!("it says disk {outer} and disk {inner}"));
            }
            (outer, inner) => outer.or(inner).unwrap_or(0),
        };
        if disk < disks { Ok(disk) } else { Err(format!("there is no disk {disk}, only {disks}")) }
    };
    place(None)?;
    let mut found = Vec::new();
    if let Some(RawWrite { disk, offset, length, seed }) = write {
        let action = Action::Write { range: Extent { offset, length }, seed };
        found.push(Step::Disk { disk: place(disk)?, action });
    }
    if let Some(RawExtent { disk, offset, length }) = discard {
        found.push(Step::Disk { disk: place(disk)?, action: Action::Discard(Extent { offset, length }) });
    }
    if let Some(RawExtent { disk, offset, length }) = zero {
        found.push(Step::Disk { disk: place(disk)?, action: Action::Zero(Extent { offset, length }) });
    }
    if let Some(size) = resize {
        found.push(Step::Disk { disk: place(None)?, action: Action::Resize(size) });
    }
    found.extend(snapshot.map(Step::Snapshot));
    found.extend(revert.map(Step::Revert));
    found.extend(destroy.map(Step::Destroy));
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => Err("it is none of write, discard, zero, resize, snapshot, revert, destroy".to_owned()),
        count => Err(format!("it is {count} steps in one")),
    }
}

pub(super) fn write(plan: &Plan) -> Value {
    let steps: Vec<Value> = plan.steps.iter().map(write_step).collect();
    let mut json = json!({"disks": plan.disks, "steps": steps, "halted": plan.halted});
    if let Some(guest) = plan.guest {
        json["guest"] = json!({"writes_per_second": guest.writes_per_second.unwrap_or(0)});
    }
    json
}

fn write_step(step: &Step) -> Value {
    let extent = |extent: &Extent| json!({"offset": extent.offset, "length": extent.length});
    match step {
        Step::Snapshot(name) => json!({"snapshot": name}),
        Step::Revert(name) => json!({"revert": name}),
        Step::Destroy(name) => json!({"destroy": name}),
        Step::Disk { disk, action } => match action {
            Action::Write { range, seed } => {
                json!({"disk": disk, "write": {"offset": range.offset, "length": range.length, "seed": seed}})
            }
            Action::Discard(range) => json!({"disk": disk, "discard": extent(range)}),
            Action::Zero(range) => json!({"disk": disk, "zero": extent(range)}),
            Action::Resize(size) => json!({"disk": disk, "resize": size}),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error_of(text: &str) -> String {
        Plan::parse(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn a_plan_of_one_disk_is_read() {
        let plan = Plan::parse(
            br#"{"size": 8192, "steps": [{"write": {"offset": 0, "length": 4096, "seed": 1}}, {"snapshot": "a"},
                {"discard": {"offset": 0, "length": 4096}}, {"zero": {"offset": 4096, "length": 1}},
                {"resize": 16384}, {"revert": "a"}, {"destroy": "a"}], "guest": {"writes_per_second": 0}, "halted": true}"#,
        )
        .unwrap();
        assert_eq!(plan.disks, [8192]);
        assert_eq!(plan.steps.len(), 7);
        assert_eq!(plan.guest, Some(GuestPlan { writes_per_second: None }));
        assert!(plan.halted);
        let written = plan.to_json().to_string();
        assert_eq!(Plan::parse(written.as_bytes()).unwrap(), plan);
    }

    #[test]
    fn the_disk_of_a_step_stands_beside_its_action_or_inside() {
        let plan = Plan::parse(
            br#"{"disks": [4096, {"size": 8192}], "steps": [{"disk": 1, "zero": {"offset": 4096, "length": 4096}},
                {"zero": {"offset": 4096, "length": 4096, "disk": 1}}, {"resize": 8192}]}"#,
        )
        .unwrap();
        assert_eq!(plan.steps[0], plan.steps[1]);
        assert_eq!(plan.steps[2], Step::Disk { disk: 0, action: Action::Resize(8192) });
        assert_eq!(plan.guest, None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (plan, words) in [
            (r#"{"steps": []}"#, "neither `size` nor `disks`"),
            (r#"{"size": 4096, "steps": [], "hallted": true}"#, "unknown field `hallted`"),
            (r#"{"size": 0, "steps": []}"#, "disk 0 has no bytes"),
            (r#"{"disks": [], "steps": []}"#, "no disk"),
            (r#"{"disks": [{}], "steps": []}"#, "disks[0]: it has no size"),
            (r#"{"size": 4096, "steps": [{"snapshot": "a"}, {}]}"#, "steps[1]: it is none of"),
            (r#"{"size": 4096, "steps": [{"snapshot": "a", "resize": 8192}]}"#, "steps[0]: it is 2 steps"),
            (r#"{"size": 4096, "steps": [{"zero": {"offset": 4096, "length": 1}}]}"#, "steps[0]: 1 bytes at 4096"),
            (r#"{"size": 4096, "steps": [{"zero": {"offset": 0, "length": 0}}]}"#, "steps[0]: no bytes"),
            (r#"{"size": 4096, "steps": [{"zero": {"offset": -1, "length": 1}}]}"#, "steps[0]: "),
            (r#"{"size": 4096, "steps": [{"snapshot": "a"}, {"snapshot": "a"}]}"#, "\"a\" is taken"),
            (r#"{"size": 4096, "steps": [{"snapshot": ""}]}"#, "without a name"),
            (r#"{"size": 4096, "steps": [{"revert": "b"}]}"#, "no snapshot \"b\""),
            (r#"{"size": 4096, "steps": [{"snapshot": "a"}, {"destroy": "b"}]}"#, "no snapshot \"b\" to destroy"),
            (r#"{"size": 4096, "steps": [{"resize": 1024}]}"#, "only grow"),
            (r#"{"size": 4096, "steps": [{"disk": 1, "resize": 8192}]}"#, "there is no disk 1"),
            (
                r#"{"disks": [1, 1], "steps": [{"disk": 1, "zero": {"disk": 0, "offset": 0, "length": 1}}]}"#,
                "disk 1 and disk 0",
            ),
        ] {
            let error = error_of(plan);
            assert!(error.contains(words), "{plan}: {error}");
        }
    }
}
