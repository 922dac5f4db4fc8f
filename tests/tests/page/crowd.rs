//! A run in which there was far too much of everything.

use fake_xapi::report::Report;
use fake_xapi::story::{Call, Failure, Felt, Guest, Kind, Mirror, Node, Pause, Phase, Sent, Story};

const MINUTES: f64 = 600_000.0;

/// A report and a story with tens of thousands of calls and samples, hundreds of nodes and mirrors.
pub fn crowd() -> (Report, Story) {
    let name = |n: usize| format!("{n} {}", crate::NAMES[n % crate::NAMES.len()]);
    let nodes = (0..500).map(|n| Node {
        name: name(n),
        kind: [Kind::Snapshot, Kind::Hidden, Kind::Other, Kind::Leaf][if n == 499 { 3 } else { n % 3 }],
        parent: n.checked_sub(1 + n % 3),
        size: 1 << 40,
        own: n as u64 * 77_777,
        sent: Some(1 << 33),
        identical: (n % 2 == 0).then_some(n % 4 == 0),
    });
    let nodes: Vec<Node> = nodes.collect();
    let methods =
        ["SR.ls", "Volume.stat", "Volume.snapshot", "Volume.set", "Datapath.attach", "Data.mirror", "Data.stat"];
    let calls = (0..20_000).map(|n| {
        let from = f64::from(n) * 30.5 - 900.0;
        Call {
            host: if n % 2 == 0 { "a".into() } else { "b".into() },
            method: methods[n as usize % methods.len()].into(),
            volume: name(n as usize % 90),
            from,
            to: (n % 5003 != 1).then_some(from + if n == 9000 { 77_777.0 } else { f64::from(n % 40) }),
            failed: n % 19 == 3,
            answer: format!("{} {}", "an answer of some length ".repeat(6), name(n as usize)),
            fault: (n % 400 == 3).then(|| "Kill(3ms)".into()),
        }
    });
    let mirrors = (0..300).map(|n| {
        let (from, each) = (n as f64 * 1900.0, 100.0);
        let samples = (0..300).map(|s| Sent { at: from + f64::from(s) * each, bytes: (s * s) as u64 * 12_345 });
        Mirror {
            volume: name(n),
            destination: format!("{n:08x}…"),
            from,
            complete: (n % 7 != 0).then_some(from + 20_000.0),
            samples: samples.collect(),
            sent: 299 * 299 * 12_345,
            received: 4711,
        }
    });
    let guests = (0..6).map(|disk| {
        let felt = |n: u32| {
            let wave = 1.5 + f64::from(n * (disk + 1)).sin();
            let worst = if n == 4444 { 31_337.0 } else { wave * 3.0 };
            Felt { at: f64::from(n) * 100.0 - 300.0, commands: 900, p50: wave, p99: wave * 2.0, worst }
        };
        Guest { disk: name(disk as usize), moments: (0..6000).map(felt).collect() }
    });
    let phase = |name: &str, from: f64, to: f64| Phase { name: name.into(), from, to };
    let story = Story {
        title: crate::NAMES[1].into(),
        hosts: ("a".into(), "b".into()),
        ended: MINUTES,
        phases: vec![
            phase("prepare", 0.0, 3.0),
            phase("copy", 3.0, 400_000.0),
            phase("mirror", 400_000.0, 560_000.0),
            phase("metadata", 560_000.0, 560_100.0),
            phase("switch", 560_100.0, 562_000.0),
            phase("clean up", 562_000.0, MINUTES),
        ],
        pause: Some(Pause { from: 560_200.0, to: 561_900.0, judged: 1000.0 }),
        calls: calls.collect(),
        mirrors: mirrors.collect(),
        guests: guests.collect(),
        source_after: nodes.clone(),
        destination_after: nodes.clone(),
        source_before: nodes,
        failure: Some(Failure {
            error: name(4),
            phase: "switch".into(),
            swept: (0..500).map(name).collect(),
            restarted: true,
        }),
    };
    let problems = (0..5000).map(name).collect();
    (Report { flow: "tree".into(), problems, bytes_on_the_wire: 1 << 45, ..Report::default() }, story)
}
